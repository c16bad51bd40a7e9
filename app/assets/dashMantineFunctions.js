/* Lists to choose from: of very many options the first are shown, and how many more typing would find. */
(window.dashMantineFunctions = window.dashMantineFunctions || {}).firstOptions = function ({ options, search }) {
  const MOST = 500; // a list of fifty thousand takes a browser half a minute to open
  const words = search.trim().toLowerCase();
  const found = options.filter((option) => option.label.toLowerCase().includes(words));
  if (found.length <= MOST) return found;
  const more = `${(found.length - MOST).toLocaleString("en")} more: type to find`;
  return [...found.slice(0, MOST), { value: "\u0000more", label: more, disabled: true }];
};

/* In a frame of another site, such as a notebook's, a browser may keep storage shut, and Dash would not start: what
   would be kept then lasts as long as the page. */
(function () {
  "use strict";
  function memory() {
    const held = new Map();
    return {
      get length() { return held.size; },
      key: (place) => [...held.keys()][place] ?? null,
      getItem: (name) => held.get(String(name)) ?? null,
      setItem: (name, value) => { held.set(String(name), String(value)); },
      removeItem: (name) => { held.delete(String(name)); },
      clear: () => { held.clear(); },
    };
  }
  for (const kind of ["localStorage", "sessionStorage"]) {
    try {
      window[kind].getItem("");
    } catch {
      Object.defineProperty(window, kind, { value: memory() });
    }
  }
})();

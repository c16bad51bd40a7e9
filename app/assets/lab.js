/* The lab: the button that generates, and a file that is read in the browser. */
window.dash_clientside = window.dash_clientside || {};
(function () {
  "use strict";
  const LARGEST = 1 << 20; // bytes that are sent at all; the server takes less and says so

  window.dash_clientside.moescope_lab = {
    /* A field that is being left sets the place first; then the button counts. */
    go: (clicks) =>
      clicks ? new Promise((done) => window.setTimeout(() => done({ at: Date.now() }), 450)) : window.dash_clientside.no_update,
  };

  document.addEventListener("click", function (event) {
    const box = event.target.closest("[data-lab-file]");
    if (!box) return;
    const input = document.createElement("input");
    input.type = "file";
    input.accept = ".yaml,.yml,.json";
    input.addEventListener("change", function () {
      const file = input.files[0];
      if (!file) return;
      const reader = new FileReader();
      const tell = (content) =>
        window.dash_clientside.set_props(box.dataset.labFile, { data: { name: file.name, content, at: Date.now() } });
      reader.addEventListener("load", () => tell(String(reader.result)));
      reader.addEventListener("error", () => tell(""));
      reader.readAsDataURL(file.slice(0, LARGEST));
    });
    input.click();
  });
})();

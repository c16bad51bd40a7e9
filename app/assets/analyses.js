/* The page of analyses: a parameter's control shows what the address says, and a button copies a line. */
window.dash_clientside = window.dash_clientside || {};
(function () {
  "use strict";
  const read = function (options, name) {
    for (const part of (options || "").split(";")) {
      const at = part.indexOf(":");
      if (at > 0 && part.slice(0, at) === name)
        return part.slice(at + 1).split(",").map((text) => { try { return decodeURIComponent(text); } catch { return text; } }).join(",");
    }
    return null;
  };
  window.dash_clientside.moescope_analyses = {
    option: function (place, id, now) {
      if (!place || (place.question ?? "") !== id.of) return window.dash_clientside.no_update;
      const value = read(place.options, id.name);
      if (value !== null) return String(now) === value ? window.dash_clientside.no_update : value;
      // Empty and the default are the same: neither is changed under the person's hand.
      if (now === null || now === undefined || now === "" || String(now) === id.default) return window.dash_clientside.no_update;
      return id.default && typeof now === "string" ? id.default : "";
    },
  };
  document.addEventListener("click", function (event) {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    if (!navigator.clipboard) { // over plain HTTP from another machine: the person copies it
      window.getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      return;
    }
    navigator.clipboard.writeText(button.dataset.copy).then(function () {
      const label = button.querySelector(".mantine-Button-label") || button;
      const said = (label.dataset.said ??= label.textContent);
      label.textContent = "Copied";
      window.setTimeout(() => { label.textContent = said; }, 1200);
    });
  });
})();

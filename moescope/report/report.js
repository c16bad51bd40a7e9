"use strict";
// Draws the figures from the JSON blocks of this page, in the colours of the page, and again when these change.
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const templates = { light: read("template-light"), dark: read("template-dark") };
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const settings = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  function draw() {
    for (const place of document.querySelectorAll("[data-figure]")) {
      try {
        const figure = read(place.dataset.figure);
        figure.layout.template = night.matches ? templates.dark : templates.light;
        place.textContent = "";
        Plotly.newPlot(place, figure.data, figure.layout, settings);
      } catch (error) {
        place.textContent = "This figure could not be drawn: " + error.message;
        place.classList.add("failed");
      }
    }
  }
  draw();
  night.addEventListener("change", () => {
    document.querySelectorAll("[data-figure]").forEach((place) => Plotly.purge(place));
    draw();
  });
})();

/* Plotly is fetched and compiled while the first page is on its way: figures take it, or this promise of it. */
(function () {
  "use strict";
  const script = document.createElement("script");
  script.src = "/_dash-component-suites/plotly/package_data/plotly.min.js";
  window.Plotly = new Promise(function (have, fail) {
    script.onload = () => have(window.Plotly); // which is the library by now
    script.onerror = function () { delete window.Plotly; fail(new Error("plotly.js did not load")); };
  });
  window.Plotly.catch(() => {}); // figures say so; a page without any, or that is left meanwhile, need not
  document.head.append(script);
})();

/* What happens in the browser alone: which panel is out of date, the mark of the selected expert, keys, clicks on tokens. */
window.dash_clientside = window.dash_clientside || {};
(function () {
  "use strict";
  const same = () => window.dash_clientside.no_update;
  const marked = new Map(); // of each map, the last call that outlines something in it
  const told = new Map(); // what the place last said of each control
  let set = { from: null, values: new Map() }; // what was set in controls at the place as it is

  /* Leads to an address of this app without loading the page again, as its links do; another page begins at its top. */
  function go(href) {
    const before = window.location.pathname;
    window.history.pushState({}, "", href);
    window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
    if (window.location.pathname !== before) window.scrollTo(0, 0);
  }
  const tell = (id, value) => window.dash_clientside.set_props(id, { data: { ...value, at: Date.now() } });
  const layoutChanged = () => window.setTimeout(() => window.dispatchEvent(new Event("resize")), 30);

  /* A circle, in pixels: as one, plotly would flatten it on a logarithmic axis, which has nothing below nought. */
  const RING = "M11,0C11,6.1 6.1,11 0,11C-6.1,11 -11,6.1 -11,0C-11,-6.1 -6.1,-11 0,-11C6.1,-11 11,-6.1 11,0Z";
  const OUTLINE = { name: "selected", line: { width: 2.5, color: "#d6336c" }, layer: "above" };

  /* The ring round the selected expert in a map of points: each carries [layer, expert, …], wherever it stands. */
  function pointOf(meta, place, plot) {
    const sees = (ids) => ids && String(ids[0]) === String(place.layer) && Number(ids[1]) === place.expert;
    return plot.data.flatMap((trace, number) => {
      const at = (trace.customdata || []).findIndex(sees);
      if (at < 0) return [];
      const { x, y } = plot.calcdata[number][at], axes = { xref: trace.xaxis || "x", yref: trace.yaxis || "y" };
      return [{ ...OUTLINE, ...axes, type: "path", path: RING, xsizemode: "pixel", ysizemode: "pixel", xanchor: x, yanchor: y }];
    });
  }

  /* Its cell in maps whose x is the expert and whose y is the layer. */
  function cellOf(meta, place) {
    const row = meta.cell.indexOf(String(place.layer));
    const at = { x0: place.expert - 0.5, x1: place.expert + 0.5, y0: row - 0.5, y1: row + 0.5 };
    return row < 0 ? [] : meta.axes.map(([x, y]) => ({ ...OUTLINE, type: "rect", xref: x, yref: y, ...at }));
  }

  /* Its row in maps whose y is an expert of the selected layer. */
  function rowOf(meta, place) {
    const at = { x0: 0, x1: 1, y0: place.expert - 0.5, y1: place.expert + 0.5 };
    return meta.axes.map(([x, y]) => ({ ...OUTLINE, type: "rect", xref: x + " domain", yref: y, ...at }));
  }

  window.dash_clientside.moescope = {
    /* The key of what a panel shows: [store, version, trouble, fields it reads…]; unchanged, nobody asks the server. */
    wanted: function (place, theme, reads, before) {
      if (!place) return same();
      const value = (name) => (name === "theme" ? theme : place[name] ?? null);
      const key = ["store", "version", "trouble", ...(reads || [])].map(value);
      return JSON.stringify(key) === JSON.stringify(before) ? same() : key;
    },
    /* Outlines the selected expert in a map, once it is drawn. */
    mark: function (place, figure, id) {
      const meta = figure && figure.layout && figure.layout.meta;
      const outline = meta && (meta.points ? pointOf : meta.cell ? cellOf : meta.row ? rowOf : null);
      if (!place || !outline) return "";
      const name = JSON.stringify(id, Object.keys(id).sort());
      const newest = {}; // what is still waited for counts no more once something else is selected
      marked.set(name, newest);
      window.setTimeout(function draw() {
        const box = document.getElementById(name), plot = box && box.querySelector(".js-plotly-plot");
        if (!box || marked.get(name) !== newest) return;
        if (!plot || !plot.layout || !plot.calcdata) { window.setTimeout(draw, 60); return; }
        const kept = (plot.layout.shapes || []).filter((shape) => shape.name !== "selected");
        const has = (plot.layout.shapes || []).length;
        if (place.expert !== null) kept.push(...outline(meta, place, plot));
        if (kept.length || has) window.Plotly.relayout(plot, { shapes: kept });
      }, 60);
      return "";
    },
    /* A control shows what the place says, or its default. */
    setting: function (place, id, now) {
      if (!place) return same();
      const value = place[id.field] ?? (id.default === "" ? null : id.default);
      // A place that is late does not take back what has been set since; a control that is new shows its default.
      const control = JSON.stringify(id), old = told.get(control) === String(value);
      told.set(control, String(value));
      if (old && ![null, undefined, ""].includes(now) && String(now) !== id.default) return same();
      if (value === null) return now === null || now === "" ? same() : typeof now === "string" && ["find", "prompt", "recipe", "markers"].includes(id.field) ? "" : null;
      return String(value) === String(now) ? same() : typeof now === "number" ? Number(value) : String(value);
    },
    /* What is set in controls counts together until the place has changed. */
    chosen: function (place) {
      if (!place || place.trouble) return same();
      if (set.from !== place.href) set = { from: place.href, values: new Map() };
      const now = window.dash_clientside.callback_context.triggered.filter(({ prop_id }) => prop_id.startsWith("{"));
      for (const { prop_id, value } of now) set.values.set(prop_id.slice(0, prop_id.lastIndexOf(".")), value);
      return now.length ? { from: set.from, values: [...set.values].map(([id, value]) => [JSON.parse(id), value]) } : same();
    },
    /* What there is to choose from, where that changes. */
    choices: function (offered, id, now) {
      const found = offered && offered[id.field];
      if (!found) return same();
      const data = found.map((one) => (Array.isArray(one) ? one : [one, one])).map(([value, label]) => ({ value: String(value), label: String(label) }));
      return JSON.stringify(data) === JSON.stringify(now) ? same() : data;
    },
    /* Which columns of a table are seen: those that the place does not leave out; all, if it leaves out all. */
    columns: function (place, defs, id) {
      if (place && defs && defs.length)
        window.dash_ag_grid.getApiAsync(id).then((api) => window.setTimeout(function () {
          if (api.isDestroyed()) return;
          const columns = api.getColumns() || [], out = (column) => (place.without || []).includes(id.view + "." + column.getColId());
          const all = columns.every(out);
          for (const seen of [true, false]) api.setColumnsVisible(columns.filter((column) => (all || !out(column)) === seen), seen);
          listed(id.view, api);
        }, 30));
      return "panel-table";
    },
    refill: function (columns, id) {
      if (columns && columns.length)
        window.dash_ag_grid.getApiAsync(id).then((api) => window.setTimeout(() => api.isDestroyed() || api.purgeInfiniteCache(), 30));
      return "panel-grid";
    },
    theme: function (clicks, now) {
      const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const turned = window.dash_clientside.callback_context.triggered.some((t) => t.prop_id === "theme-switch.n_clicks" && t.value);
      const next = turned ? ((now || system) === "dark" ? "light" : "dark") : now || system;
      document.documentElement.dataset.agThemeMode = next;
      return [next, next];
    },
    help: (clicks, open) => (clicks ? !open : false),
    /* After each move: which panel fills the window, which token is pinned. */
    settle: function (place) {
      window.setTimeout(function () {
        let changed = false;
        document.querySelectorAll(".panel.full").forEach((panel) => {
          if (!place || panel.id !== "panel-" + place.full) { panel.classList.remove("full"); changed = true; }
        });
        const wide = place && place.full && document.getElementById("panel-" + place.full);
        if (wide && !wide.classList.contains("full")) { wide.classList.add("full"); changed = true; }
        document.body.classList.toggle("has-full", Boolean(wide));
        if (changed) layoutChanged();
        if (place) document.title = ["MoEscope", place.store, place.page].filter(Boolean).join(" · ");
      }, 60);
      return "";
    },
  };

  function table(view) {
    return window.dash_ag_grid && window.dash_ag_grid.getApi({ type: "grid", of: "table", view });
  }

  /* The list of a table's columns, where it is open: one box each; the last one shown stays. */
  function listed(view, api, anew) {
    const list = document.querySelector(`[data-columns="${view}"][open] .how`), columns = api.getColumns() || [];
    if (!list) return;
    const boxes = [...list.querySelectorAll("input")];
    if (!anew && boxes.map((box) => box.name).join() === columns.map((column) => column.getColId()).join()) {
      boxes.forEach((box) => { box.checked = api.getColumn(box.name).isVisible(); });
      return;
    }
    list.replaceChildren(...columns.map((column) => {
      const box = Object.assign(document.createElement("input"), { type: "checkbox", name: column.getColId(), checked: column.isVisible() });
      box.addEventListener("change", () => {
        if (!box.checked && api.getColumns().filter((one) => one.isVisible()).length === 1) { box.checked = true; return; }
        api.setColumnsVisible([column], box.checked);
        tell("key", { do: "columns", view, leave: api.getColumns().filter((one) => !one.isVisible()).map((one) => one.getColId()) });
      });
      const label = document.createElement("label");
      label.append(box, " " + api.getDisplayNameForColumn(column, null));
      return label;
    }));
  }
  document.addEventListener("toggle", function (event) {
    const details = event.target, view = details.dataset && details.dataset.columns;
    if (view && details.open)
      window.dash_ag_grid.getApiAsync({ type: "grid", of: "table", view }).then((api) => listed(view, api, true));
  }, true);

  /* Saves a file of the app; where there is none, its reason is shown on the page. */
  async function save(href) {
    const answer = await window.fetch(href).catch(() => null);
    if (answer && answer.ok) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = href.slice("/file/".length, href.indexOf("?"));
      link.click();
      window.setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    } else {
      const props = { title: "The file was not saved", color: "red", withCloseButton: true,
        children: answer ? await answer.text() : "The app does not answer." };
      window.dash_clientside.set_props("alarm", { children: { namespace: "dash_mantine_components", type: "Alert", props } });
    }
  }

  /* Buttons of panels: data-act says what, data-view where; anything with data-go is a link within the app. */
  function act(button) {
    const view = button.dataset.view;
    const at = encodeURIComponent(window.location.pathname + window.location.search);
    const theme = document.documentElement.dataset.agThemeMode || "light";
    switch (button.dataset.act) {
      case "retry":
      case "cancel":
        tell({ type: "act", of: button.dataset.of, view }, { do: button.dataset.act });
        break;
      case "full":
        tell("key", { do: "full", view });
        break;
      case "save":
        save(`/file/${view}.html?at=${at}&theme=${theme}`);
        break;
      case "csv":
      case "parquet": {
        const api = table(view);
        const filter = api ? encodeURIComponent(JSON.stringify(api.getFilterModel())) : "";
        const sort = api
          ? encodeURIComponent(JSON.stringify(api.getColumnState().filter((c) => c.sort).sort((a, b) => a.sortIndex - b.sortIndex)
              .map((c) => ({ colId: c.colId, sort: c.sort }))))
          : "";
        save(`/file/${view}.${button.dataset.act}?at=${at}&filter=${filter}&sort=${sort}`);
        break;
      }
    }
  }

  /* A link says what it changes of the place it was drawn at; what has been chosen since then stays chosen. */
  function follow(link) {
    const drawn = link.closest("[data-at]");
    const here = window.location.pathname + window.location.search;
    if (drawn && drawn.dataset.at !== here) tell("jump", { from: drawn.dataset.at, to: link.dataset.go });
    else go(link.dataset.go);
  }

  /* Steps pressed faster than the server answers count from where the first was pressed. */
  let steps = [], from = "", pressed = 0;
  function walk(step) {
    if (Date.now() - pressed > 60_000) steps = [];
    if (!steps.length) from = window.location.pathname + window.location.search;
    pressed = Date.now();
    steps = [...steps, step];
    tell("key", { do: "walk", from, steps });
  }
  const stand = () => { steps = []; };
  document.addEventListener("pointerdown", stand, true);
  window.addEventListener("popstate", stand);

  document.addEventListener("click", function (event) {
    document.querySelectorAll("details.how-to-read[open]").forEach((how) => { if (!how.contains(event.target)) how.open = false; });
    const link = event.target.closest("[data-go]");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) { event.preventDefault(); follow(link); return; }
    const button = event.target.closest("[data-act]");
    if (button) act(button);
  });

  document.addEventListener("keydown", function (event) {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === "Shift") return;
    /* What stands in the box now: the server may hear of the last letters only after Enter. */
    if (event.key === "Enter" && target.id === "search") { tell("seek", { text: target.value }); target.blur(); return; }
    if (event.key === "Enter" && !event.shiftKey && target.dataset && target.dataset.go) { event.preventDefault(); follow(target); return; }
    if (event.key === "Escape" && document.body.classList.contains("has-full") && !document.querySelector(".mantine-Modal-content")) {
      tell("key", { do: "full", view: "" });
      return;
    }
    if (target.closest && target.closest("input, textarea, select, [contenteditable], .ag-root, [role=combobox]")) { stand(); return; }
    const step = { j: "next-expert", k: "previous-expert", J: "next-layer", K: "previous-layer" }[event.key];
    if (step) { walk(step); event.preventDefault(); return; }
    stand();
    if (event.key === "/") { const box = document.getElementById("search"); if (box) { box.focus(); event.preventDefault(); } }
    else if (event.key === "?") document.getElementById("help-switch").click();
    else if (event.key === "t") document.getElementById("theme-switch").click();
  });
})();

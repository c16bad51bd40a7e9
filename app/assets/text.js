/* The page of texts: tooltips, keys and the pin of tokens, and the replay; all of it without asking the server. */
window.dash_clientside = window.dash_clientside || {};
(function () {
  "use strict";
  const PACE = 220; // milliseconds per token
  let timer = null, tip = null, step = null, seen = "", waiting = null;
  const heard = new WeakSet(); // the plots whose drawing is listened to

  const box = () => document.querySelector(".tokens[data-first]");
  const tokens = () => [...document.querySelectorAll(".tokens[data-first] > .token")];
  const first = () => Number(box().dataset.first);
  const one = (number) => (box() ? box().children[number - first()] || null : null);
  const here = () => new URL(window.location.href);
  const asked = (name) => { const value = here().searchParams.get(name); return value !== null && /^\d+$/.test(value) ? Number(value) : null; };

  /* Leads to the same page with other fields; `quiet`: the address follows, and nobody is asked. */
  function move(changes, { quiet = false, replace = false } = {}) {
    const url = here();
    for (const [name, value] of Object.entries(changes))
      if (value === null) url.searchParams.delete(name); else url.searchParams.set(name, value);
    const href = url.pathname + url.search;
    if (href !== window.location.pathname + window.location.search)
      window.history[quiet || replace ? "replaceState" : "pushState"]({}, "", href);
    if (!quiet) window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
  }

  /* --- one token: focus, pin, tooltip --- */
  function focus(token) {
    tokens().forEach((other) => { if (other.tabIndex === 0) other.tabIndex = -1; });
    token.tabIndex = 0;
    token.focus();
  }
  function pin(token) {
    tokens().forEach((other) => { if (other.tabIndex === 0) other.tabIndex = -1; });
    token.tabIndex = 0;
    move({ token: token.dataset.token });
  }
  function element(kind, name, text) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text; // never as markup: it comes from a corpus
    return made;
  }
  function show(token) {
    hide();
    tip = element("div", "token-tip");
    tip.setAttribute("role", "tooltip");
    const head = element("div", "tip-text");
    head.append(element("bdi", "", token.dataset.text));
    tip.append(head, element("div", "tip-facts", `token ${token.dataset.token} · position ${token.dataset.place} · ${token.dataset.phase}`),
      element("div", "tip-facts", token.dataset.words));
    const routes = token.dataset.routes.split(" ").filter(Boolean).map((pair) => pair.split(":"));
    const most = Math.max(...routes.map(([, weight]) => Math.abs(Number(weight))), 1e-12);
    tip.append(element("div", "tip-layer", routes.length ? `experts of layer ${box().dataset.layer}` : `no expert in layer ${box().dataset.layer}`));
    const chosen = String(asked("expert"));
    for (const [expert, weight] of routes) {
      const row = element("div", expert === chosen ? "tip-row chosen" : "tip-row");
      const bar = element("span", "bar");
      bar.style.setProperty("--w", Math.abs(Number(weight)) / most || 0);
      row.append(element("span", "tip-expert", expert), bar, element("span", "number", Number(weight).toPrecision(3)));
      tip.append(row);
    }
    document.body.append(tip);
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const below = at.bottom + 6 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - tip.offsetHeight - 6)}px`;
  }
  function hide() { if (tip) { tip.remove(); tip = null; } }

  const tokenOf = (event) => (event.target.closest ? event.target.closest(".tokens[data-first] > .token") : null);
  document.addEventListener("mouseover", (event) => { const token = tokenOf(event); if (token) show(token); else hide(); });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token && token.matches(":focus-visible")) show(token); else hide(); });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("click", function (event) {
    const token = tokenOf(event);
    if (token && String(window.getSelection()) === "") pin(token);
    const button = event.target.closest("[data-replay]");
    if (button) replay(button.dataset.replay);
  });
  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !box()) return;
    const token = tokenOf(event);
    if (!token && event.target.closest(".player") && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      replay(event.key === "ArrowLeft" ? "back" : "on");
      event.preventDefault();
      return;
    }
    if (!token) {
      if (event.key === "p" && !event.target.closest("input, textarea, select, [contenteditable], .ag-root, [role=combobox]")) replay("play");
      return;
    }
    if (event.key === "Escape") { hide(); return; }
    if (event.key === "p") { replay("play"); return; }
    if (event.key === "Enter" || event.key === " ") { pin(token); event.preventDefault(); return; }
    const all = tokens(), at = all.indexOf(token);
    let next = null;
    if (event.key === "ArrowRight") next = at + 1;
    else if (event.key === "ArrowLeft") next = at - 1;
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = all.length - 1;
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") next = line(all, at, event.key === "ArrowDown" ? 1 : -1);
    if (next === null) return;
    event.preventDefault();
    next = Math.max(0, Math.min(next, all.length - 1));
    focus(all[next]);
    if (step !== null && timer === null) to(first() + next, false);
  });
  /* The token above or below, nearest across. */
  function line(all, at, way) {
    const rect = (token) => token.getClientRects()[0] || token.getBoundingClientRect();
    const from = rect(all[at]);
    let best = null, top = null;
    for (let i = at + way; i >= 0 && i < all.length; i += way) {
      const r = rect(all[i]);
      if (Math.abs(r.top - from.top) < 4) continue;
      if (top === null) top = r.top;
      if (Math.abs(r.top - top) > 4) break;
      if (best === null || Math.abs(r.left - from.left) < Math.abs(rect(all[best]).left - from.left)) best = i;
    }
    return best === null ? at : best;
  }

  /* --- replay --- */
  function plot() {
    const found = document.querySelector("#panel-text-replay .js-plotly-plot");
    if (!found || !found.data || !found.data[0] || !found.data[0].meta || !window.Plotly) return null;
    if (!heard.has(found)) { heard.add(found); found.on("plotly_afterplot", fill); }
    return found;
  }
  function replay(what) {
    if (!box()) return;
    const last = first() + tokens().length - 1, now = step === null ? first() - 1 : step;
    if (what === "play") { if (timer === null) play(last); else pause(); return; }
    stop();
    if (what === "end") { to(null, false); return; }
    to(what === "begin" ? first() : what === "back" ? Math.max(now - 1, first()) : Math.min(now + 1, last), false);
  }
  function play(last) {
    let now = step === null || step >= last ? first() - 1 : step;
    const tick = function () {
      if (!box()) { stop(); return; }
      now += 1;
      to(now, true);
      if (now >= last) pause();
    };
    timer = window.setInterval(tick, PACE);
    label();
    tick();
  }
  function stop() { if (timer !== null) window.clearInterval(timer); timer = null; label(); }
  function pause() { stop(); move({ step }, { replace: true }); }
  function label() { document.querySelectorAll('[data-replay="play"]').forEach((b) => { b.textContent = timer === null ? "▶" : "❚❚"; b.setAttribute("aria-pressed", String(timer !== null)); }); }
  /* Shows the replay at a token; null: no replay, all of it. */
  function to(number, playing) {
    step = number;
    draw(playing);
    move({ step: number }, { quiet: playing, replace: true });
  }
  function draw(playing) {
    if (!box()) return;
    const begin = first(), all = tokens();
    all.forEach((token, i) => {
      token.classList.toggle("ahead", step !== null && begin + i > step);
      token.classList.toggle("now", begin + i === step);
    });
    const word = document.querySelector(".replay-word"), current = step === null ? null : one(step);
    if (word) {
      word.setAttribute("aria-live", playing ? "off" : "polite");
      word.textContent = current
        ? `token ${step}, ${step - begin + 1} of ${all.length} here: ${current.dataset.text} (${current.dataset.phase})`
        : "Steps through the tokens shown: the map below is filled as they are read.";
    }
    if (playing && current && box().scrollHeight > box().clientHeight) {
      const r = current.getBoundingClientRect(), b = box().getBoundingClientRect();
      if (r.top < b.top || r.bottom > b.bottom) box().scrollTop += r.top - b.top - b.height / 3;
    }
    fill();
  }
  /* Brings the map to the replay's token: now, when the map is there, and whenever it was drawn anew. */
  function fill() {
    window.clearTimeout(waiting);
    const shown = plot();
    if (!shown) { if (box()) waiting = window.setTimeout(fill, 250); return; }
    const { experts, ranks, first: begin, filled } = shown.data[0].meta;
    const names = shown.layout.yaxis.categoryarray, n = names.length;
    const all = experts ? experts.split(" ").map(Number) : [], length = all.length / (n * ranks);
    const now = step === null ? length - 1 : step - begin;
    if (now < -1 || now >= length || filled === step) return;
    const of = (t, l) => all.slice((t * n + l) * ranks, (t * n + l + 1) * ranks);
    const z = base(shown).map((row) => row.slice());
    for (let t = 0; t <= now; t++)
      for (let l = 0; l < n; l++) for (const e of of(t, l)) if (e >= 0) z[l][e] += 1;
    const x = [], y = [];
    if (now >= 0 && step !== null) for (let l = 0; l < n; l++) for (const e of of(now, l)) if (e >= 0) { x.push(e); y.push(names[l]); }
    const data = shown.data.slice(); // not restyle: it would forget that layers are categories
    data[0] = { ...data[0], z, meta: { ...data[0].meta, filled: step } };
    data[1] = { ...data[1], x, y };
    const most = Math.max(1, ...z.flat().map((n) => n || 0));
    const layout = { ...shown.layout, coloraxis: { ...shown.layout.coloraxis, cmin: 0, cmax: most } };
    window.Plotly.react(shown, data, layout);
  }
  /* A table of noughts, and nothing where a layer has no such expert. */
  function base(shown) {
    const layers = shown.data[0].meta.n_experts, widest = Math.max(...layers);
    return layers.map((n) => Array.from({ length: widest }, (_, e) => (e < n ? 0 : null)));
  }

  window.dash_clientside.moescopeText = {
    /* After each move and each drawing: the pin, the part that holds it, where the replay stands. */
    follow: function (place) {
      hide();
      window.setTimeout(function () {
        if (!place || place.page !== "text" || !box()) { if (timer !== null) stop(); return; }
        const begin = first(), last = Number(box().dataset.last);
        const pinned = asked("token"), held = asked("held");
        tokens().forEach(function (token, i) {
          token.classList.toggle("pinned", begin + i === pinned);
          token.classList.toggle("held", begin + i === held);
          token.setAttribute("aria-selected", String(begin + i === pinned));
        });
        const key = [box().dataset.doc, begin, pinned].join();
        const other = asked("doc");
        if (pinned !== null && (other === null || String(other) === box().dataset.doc) && key !== seen) {
          const was = seen.split(",");
          seen = key;
          if (pinned >= begin && pinned < last) {
            const token = one(pinned), r = token.getBoundingClientRect(), b = box().getBoundingClientRect();
            if (r.top < b.top || r.bottom > b.bottom) box().scrollTop += r.top - b.top - b.height / 3;
          } else if (was[2] !== String(pinned)) {
            // A pin elsewhere in the document: its part is shown.
            move({ start: Math.floor(pinned / Number(box().dataset.long)) * Number(box().dataset.long) }, { replace: true });
          }
        }
        if (timer === null) { step = asked("step"); draw(false); }
      }, 60);
    },
  };
})();

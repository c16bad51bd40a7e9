"""A person in a real browser: goes somewhere, waits until the page is drawn, and notices whatever goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"

# Dash's own list of callbacks that are still to run or to be answered. Those of clocks do not count, they go on for
# ever; but for the one that follows the store, whose answer may stand for that of a new address.
_BUSY = """() => {
  const shown = (e) => e.offsetParent !== null;
  if (!document.querySelector('#page') || !document.querySelector('#page').children.length) return 'no page';
  const { stored, completed, ...lists } = window.store.getState().callbacks;
  for (const asked of Object.values(lists).flat()) {
    const by = Object.keys(asked.changedPropIds);
    if (!by.length || by.some((prop) => !prop.endsWith('.n_intervals') || prop === 'watch.n_intervals'))
      return 'not answered: ' + (by.join() || asked.callback.output);
  }
  if ([...document.querySelectorAll('.note.pending')].some(shown)) return 'pending';
  for (const panel of document.querySelectorAll('.panel')) {
    const note = panel.querySelector('[role=status]'), body = panel.querySelector('[id*=body]');
    if (!body || (note && note.innerText.trim())) continue;
    const graph = body.querySelector('.dash-graph');
    if (graph) {
      const plot = graph.querySelector('.js-plotly-plot');
      if (!plot || !plot._fullLayout || !plot.layout.uirevision) return 'drawing ' + panel.id;
      if (graph.style.display === 'none') return 'hidden ' + panel.id;
    } else if (body.matches('.panel-table')) {
      if (!body.querySelector('.ag-header-cell-text')) return 'no columns ' + panel.id;
      const seen = body.getBoundingClientRect();
      if (seen.top > window.innerHeight || seen.bottom < 0) continue; // a table is filled when it comes into sight
      if (body.querySelector('.ag-loading, .ag-overlay-loading-center')) return 'loading ' + panel.id;
      const rows = [...body.querySelectorAll('.ag-center-cols-container .ag-row')];
      if (rows.length && !rows.some((row) => row.innerText.trim())) return 'loading ' + panel.id;
    } else if (!body.innerText.trim() && !body.children.length) return 'empty ' + panel.id;
  }
  return '';
}"""


class Visitor:
    """One tab."""

    def __init__(self, page, base: str) -> None:
        self.page, self.base, self.trouble = page, base, []
        page.context.set_default_timeout(120_000)
        page.on("console", lambda said: said.type in ("error", "warning") and self.trouble.append(said.text))
        page.on("pageerror", lambda error: self.trouble.append(str(error)))
        page.on("request", self._asked)
        page.on(
            "response", lambda answer: answer.status >= 500 and self.trouble.append(f"{answer.status} {answer.url}")
        )
        page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _asked(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.base:
            self.trouble.append(f"a request left this machine: {request.url}")

    def go(self, href: str) -> Visitor:
        """Opens an address and waits for all its panels."""
        self.page.goto(self.base + href)
        return self.settle()

    def arrive(self, href: str) -> Visitor:
        """Waits until the address is this one (whatever follows it), and its page is drawn."""
        self.page.wait_for_url(lambda url: url.removeprefix(self.base).startswith(href))
        return self.settle()

    def settle(self, seconds: float = 300) -> Visitor:
        """Waits until every question has its answer and no panel is waiting."""
        self.page.wait_for_timeout(250)
        waited, quiet = 0.0, 0
        while waited < seconds:
            busy = self.page.evaluate(_BUSY)
            quiet = 0 if busy else quiet + 1
            if quiet == 2:
                return self
            self.page.wait_for_timeout(200)
            waited += 0.2
        raise AssertionError(f"{self.page.url}: still {busy} after {seconds} s; {self.trouble}")

    def sees(self, read: Callable[[], Any], wanted: Any, seconds: float = 120) -> None:
        """Waits until `read()` gives what is wanted: what the page shows may follow its address a moment later."""
        found, waited = read(), 0.0
        while found != wanted and waited < seconds:
            self.page.wait_for_timeout(100)
            found, waited = read(), waited + 0.1
        assert found == wanted

    def holds(self, prop: str) -> list[Any]:
        """The questions that a change of this property asks, from now on held back; `lets_go` answers them."""
        held: list[Any] = []

        def late(route: Any) -> None:
            changed = " ".join((route.request.post_data_json or {}).get("changedPropIds", []))
            held.append(route) if prop in changed else route.continue_()

        self.page.route("**/_dash-update-component**", late)
        return held

    def lets_go(self) -> None:
        """Ends what `holds` began."""
        self.page.unroute("**/_dash-update-component**")

    @property
    def href(self) -> str:
        """The address without scheme and host."""
        return self.page.url.removeprefix(self.base)

    def shot(self, name: str) -> None:
        """Writes a screenshot of the whole page to build/screenshots, to be looked at."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        for table in self.page.locator(".ag-root-wrapper").all():
            if table.is_visible():
                table.scroll_into_view_if_needed()
                self.page.wait_for_timeout(150)
        self.page.evaluate("() => window.scrollTo(0, 0)")
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def overflow(self) -> list[str]:
        """What reaches beyond the window to the right."""
        return self.page.evaluate(
            """() => document.documentElement.scrollWidth <= window.innerWidth + 1 ? [] :
              [...document.querySelectorAll('#page *')]
                .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1)
                .slice(0, 3).map((e) => e.outerHTML.slice(0, 160))"""
        )

    def buttons(self) -> set[str]:
        """What the figures' own buttons offer."""
        return set(self.page.eval_on_selector_all(".modebar-btn", "all => all.map((one) => one.dataset.title)"))

    def well(self) -> None:
        """Nothing went wrong until now."""
        assert not self.trouble, self.trouble

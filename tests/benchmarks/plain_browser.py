"""When the overview's first finding and its map stand, in a browser that nobody debugs.

Under a debugger, as Playwright is one, Chromium evaluates plotly's script in twice the time: it works out the source
position of every exception that the script throws and catches. So the page times itself here, with a script that this
server adds to it, and the browser is an ordinary one.

    python -m tests.benchmarks.plain_browser FOLDER       the server alone: a line of JSON for each view of /wait
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flask import Response, request

from moescope.app import server
from moescope.app.place import Place
from tests.app.visiting import BROWSER

_WAIT = """window.setTimeout(() => window.location.replace("HREF"), 2000);"""
_CLOCK = """(() => {
  const seen = {};
  const look = () => {
    const finding = document.querySelector("#panel-even .finding-head");
    const plot = document.querySelector("#panel-grid .js-plotly-plot");
    if (!seen.finding && finding && finding.innerText.trim()) seen.finding = performance.now() / 1000;
    if (plot && plot._fullLayout && plot.querySelector(".hm, .heatmaplayer image")) {
      seen.map = performance.now() / 1000;
      fetch("/seen?" + new URLSearchParams(seen));
    } else window.setTimeout(look, 10);
  };
  look();
})();"""


def first_views(address: str, process: subprocess.Popen, times: int) -> list[tuple[float, float]]:
    """Seconds from asking for the overview until (its first finding, its map) stands; each in a new browser profile."""
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
            browser = subprocess.Popen(
                [*command, "--window-size=1280,800", f"{address}/wait"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                assert process.stdout is not None
                seen = json.loads(process.stdout.readline())
            finally:
                browser.kill()
                browser.wait()
        found.append((float(seen["finding"]), float(seen["map"])))
    return found


def main(folder: str) -> None:
    """Serves a folder as `moescope app` does, with the clock in its pages."""
    real = server.build

    def build(*args: Any, **more: Any) -> Any:
        app = real(*args, **more)
        name = app.server.extensions["moescope"].shelf.sole()
        scripts = {"wait": _WAIT.replace("HREF", Place("overview", name).href), "clock": _CLOCK}
        app.index_string = app.index_string.replace("</body>", '<script src="/clock.js"></script></body>')
        page = '<!DOCTYPE html><html><body>…<script src="/wait.js"></script></body></html>'
        app.server.add_url_rule("/wait", "wait", lambda: page)
        for script, code in scripts.items():
            answer = Response(code, mimetype="text/javascript")
            app.server.add_url_rule(f"/{script}.js", script + "_script", lambda answer=answer: answer)

        @app.server.get("/seen")
        def _seen() -> str:
            print(json.dumps(request.args), flush=True)
            return ""

        return app

    server.build = build
    server.serve(Path(folder), port=0)


if __name__ == "__main__":
    main(sys.argv[1])

"""The app on 50 million token-layer rows, in a real browser, beside loading them in pandas and plotting; in one run.

What is measured: seconds from opening the address until the overview's first map is drawn: of a store in which nothing
has been counted, by a server that has just started, and by one that has been looked at; milliseconds of every
callback, as the browser sees them, on a walk over all pages with other layers, experts, documents and labels each
time; the most memory that the server ever took.
Beside it a plain script: every layer's ids into one pandas frame, counted by layer and expert, drawn with plotly.

    python -m tests.benchmarks.app [--store FOLDER]        makes the store if it is not there (about a minute)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from moescope.app.place import Place
from moescope.store import Store
from tests.app.visiting import BROWSER, Visitor
from tests.benchmarks.synthetic import count_for_pages, synthetic

RESULTS = Path(__file__).with_name("app.json")
TARGETS = {"first view, s": 2.0, "callbacks, p95, ms": 150.0, "memory, GB": 1.5}
ROWS = 50_000_000
PLACES = 3  # of each page, on each tour
_DRAWN = """() => {
  const plot = document.querySelector('.js-plotly-plot');
  return plot && plot._fullLayout && plot.querySelector('.hm, .heatmaplayer image');
}"""
_GO = """(href) => {
  history.pushState({}, '', href);
  window.dispatchEvent(new CustomEvent('_dashprivate_pushstate'));
}"""


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """A server process of its own, and its address, once it answers."""
    command = [sys.executable, "-m", "moescope.cli", "app", str(folder), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    base = process.stdout.readline().split()[1].rstrip("/")
    urllib.request.urlopen(base).read()
    return process, base


def peak(process: subprocess.Popen) -> float:
    """The most memory a process has held, in GB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e6


def first_view(browser: Any, base: str, name: str) -> float:
    """Seconds from asking for the address until the first map of the overview is drawn, in a new browser profile."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    begun = time.perf_counter()
    page.goto(base + Place("overview", name).href, wait_until="commit")
    page.wait_for_function(_DRAWN, timeout=120_000, polling=20)
    seconds = time.perf_counter() - begun
    context.close()
    return seconds


def walk(name: str, store: Store, seed: int) -> list[Place]:
    """A tour of all pages, each several times with something else chosen."""
    rng = np.random.default_rng(seed)
    layers, experts = [str(site.layer) for site in store.sites], store.sites[0].n_experts
    labels, places = store.labels, []
    for page in ("overview", "expert", "text", "specialisation", "flow", "outliers", "map"):
        for _ in range(PLACES):
            layer, expert = str(rng.choice(layers)), int(rng.integers(experts))
            place = Place(page, name, layer=layer, expert=expert, by=str(rng.choice(labels)) if labels else None)
            if page == "text":
                place = place.go(doc=int(rng.integers(store.n_documents)), token=int(rng.integers(200)))
            if page == "flow":
                place = place.go(layer=str(rng.choice(layers[:-1])))
            places.append(place)
    return places


def tour(browser: Any, base: str, places: list[Place]) -> dict[str, Any]:
    """Goes to each place as a click does; milliseconds of each callback, seconds until each page was still."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    visitor = Visitor(context.new_page(), base)
    times: list[float] = []

    def answered(request: Any) -> None:
        if "/_dash-update-component" in request.url:
            timing = request.timing
            times.append(timing["responseEnd"] - timing["requestStart"])

    visitor.page.on("requestfinished", answered)
    visitor.go(places[0].href)
    still: dict[str, list[float]] = {}
    for place in places[1:]:
        begun = time.perf_counter()
        visitor.page.evaluate(_GO, place.href)
        visitor.settle(300)
        still.setdefault(place.page, []).append(time.perf_counter() - begun)
    visitor.well()
    context.close()
    return {"times": times, "still": {page: statistics.median(seconds) for page, seconds in still.items()}}


def pandas_script(folder: Path) -> dict[str, float]:
    """What people write: all ids in one frame, counted, drawn; again for one label. In a process of its own."""
    code = f"""
import resource, time
import numpy as np, pandas as pd, plotly.express as px
from moescope.store import Store
begun = time.perf_counter()
store = Store.open({str(folder)!r})
label = store.documents(["document", *store.labels]).to_pandas().set_index("document")
label = label[store.labels[0]].astype("category")
of_token = label.cat.codes.reindex(store.tokens(["document"])["document"].to_numpy()).to_numpy()
frame = pd.concat([
    pd.DataFrame(np.asarray(store.routing(site.key).expert), columns=[f"e{{r}}" for r in range(site.top_k)])
      .assign(layer=np.int16(site.layer), label=of_token) for site in store.sites], ignore_index=True)
loaded = time.perf_counter() - begun
def count(frame):
    parts = [frame.groupby(["layer", name]).size() for name in frame if name.startswith("e")]
    total = parts[0]
    for part in parts[1:]:
        total = total.add(part, fill_value=0)
    return total.unstack(fill_value=0)
px.imshow(count(frame)).to_html()
first = time.perf_counter() - begun
begun = time.perf_counter()
px.imshow(count(frame[frame.label == 1])).to_html()
print(loaded, first, time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded, first, again, memory = map(float, out)
    return {"loaded, s": loaded, "first view, s": first, "one label, s": again, "memory, GB": memory}


def run(folder: Path) -> dict[str, Any]:
    """All of it."""
    from playwright.sync_api import sync_playwright

    store = Store.open(folder)
    found: dict[str, Any] = {
        "rows": store.n_tokens * len(store.sites),
        "tokens": store.n_tokens,
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        shutil.rmtree(folder / "aggregates", ignore_errors=True)
        process, base = serve(folder)
        found["first view, nothing counted yet, s"] = first_view(browser, base, folder.name)
        process.terminate()
        process.wait()
        count_for_pages(store)
        process, base = serve(folder)
        try:
            found["first view, s"] = first_view(browser, base, folder.name)
            found["first view again, s"] = statistics.median(first_view(browser, base, folder.name) for _ in range(3))
            first, second = (tour(browser, base, walk(folder.name, store, seed)) for seed in (0, 1))
            for words, seen in (("first tour", first), ("second tour", second)):
                found[words] = {
                    "callbacks": len(seen["times"]),
                    "median, ms": float(np.median(seen["times"])),
                    "p95, ms": float(np.percentile(seen["times"], 95)),
                    "longest, ms": float(np.max(seen["times"])),
                    "page still, median s": seen["still"],
                }
            both = [*first["times"], *second["times"]]
            found["callbacks, p95, ms"] = float(np.percentile(both, 95))
            found["memory, GB"] = peak(process)
        finally:
            process.terminate()
            process.wait()
        browser.close()
    found["pandas"] = pandas_script(folder)
    return found


def main() -> None:
    """Write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="a store; made with 50 million rows if it is not there")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    folder = given.store or Path(tempfile.gettempdir()) / "moescope-app-benchmark"
    synthetic(folder, given.rows // 16, texts=True)
    found = run(folder)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

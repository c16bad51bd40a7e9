"""The app on 50 million token-layer rows, in a real browser, beside loading them in pandas and plotting; in one run.

What is measured: seconds from opening the address, in a new profile of a browser that nobody debugs, until the first
finding of the overview can be read and until its map is drawn: of a store in which nothing has been counted, by
servers that have just started (each of five, and their median), and by one that has been looked at; milliseconds of
every callback, as the browser sees them, on a walk over all pages with other layers, experts, documents and labels
each time (and of those alone that are not a waiting panel's question whether its answer is there); the most memory
that the server and its solvers ever took.
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
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from moescope.app.place import Place
from moescope.store import Store
from tests.app.visiting import BROWSER, Visitor
from tests.benchmarks.plain_browser import first_views
from tests.benchmarks.synthetic import count_for_pages, synthetic

RESULTS = Path(__file__).with_name("app.json")
ROWS = 50_000_000
PLACES = 3  # of each page, on each tour
SERVERS = 5  # started one after the other, each seen first by one browser
_GO = """(href) => {
  history.pushState({}, '', href);
  window.dispatchEvent(new CustomEvent('_dashprivate_pushstate'));
}"""


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """A server process of its own, and its address, once it answers."""
    command = [sys.executable, "-m", "tests.benchmarks.plain_browser", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    base = process.stdout.readline().split()[1].rstrip("/")
    urllib.request.urlopen(base).read()
    return process, base


class Watch(threading.Thread):
    """The most memory that a process and those it began have held together, in GB."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process, self.over, self.most = psutil.Process(process.pid), threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.1):
            held = 0
            for one in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    held += one.memory_info().rss
            self.most = max(self.most, held)

    def peak(self) -> float:
        """Also what the kernel saw of the server between two looks."""
        self.over.set()
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        kernel = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
        return max(self.most, kernel) / 1e9


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
    times: list[tuple[float, bool]] = []

    def answered(request: Any) -> None:
        if "/_dash-update-component" in request.url:
            timing = request.timing
            polls = any('"type":"tick"' in prop for prop in request.post_data_json["changedPropIds"])
            times.append((timing["responseEnd"] - timing["requestStart"], polls))

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


def spread(times: list[tuple[float, bool]]) -> dict[str, float]:
    """Of callbacks (milliseconds, whether it only asked if an answer was there)."""
    every = np.array([time for time, _ in times])
    others = np.array([time for time, polls in times if not polls])
    return {
        "callbacks": every.size,
        "median, ms": float(np.median(every)),
        "p95, ms": float(np.percentile(every, 95)),
        "longest, ms": float(every.max()),
        "not polls": others.size,
        "p95 of these, ms": float(np.percentile(others, 95)),
    }


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
        found["nothing counted yet: finding, map, s"] = first_views(base, process, 1)[0]
        process.terminate()
        process.wait()
        count_for_pages(store)
        os.sync()  # what was counted is still on its way to the disk
        first = []
        for _ in range(SERVERS - 1):
            process, base = serve(folder)
            first += first_views(base, process, 1)
            process.terminate()
            process.wait()
        process, base = serve(folder)
        watch = Watch(process)
        try:
            first += first_views(base, process, 1)
            found["first: finding, map, s"] = first
            found["first finding, s"], found["first map, s"] = np.median(first, axis=0).tolist()
            again = first_views(base, process, 5)
            found["again: finding, map, s"] = tuple(np.median(again, axis=0).tolist())
            both = []
            for words, seed in (("first tour", 0), ("second tour", 1)):
                seen = tour(browser, base, walk(folder.name, store, seed))
                found[words] = spread(seen["times"]) | {"page still, median s": seen["still"]}
                both += seen["times"]
            found["callbacks"] = spread(both)
            found["memory, GB"] = watch.peak()
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

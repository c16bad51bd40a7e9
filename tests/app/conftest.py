"""A shelf of real stores behind a running app, and a browser to visit it."""

from __future__ import annotations

import itertools
import json
import shutil
import threading

import numpy as np
import pytest

from tests.analysis.made_stores import random_truth, write
from tests.app.visiting import BROWSER, Visitor

LAUNCH = {"executable_path": BROWSER, "args": ["--no-sandbox", "--disable-gpu"]}
SIZE = {"width": 1280, "height": 800}
collect_documents = 16  # of each domain: enough for every panel to have something to say, captured in seconds


def small_corpus() -> list[dict]:
    """A few texts of every domain of the bundled corpus."""
    from moescope.data import CORPUS

    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    by_domain = itertools.groupby(sorted(rows, key=lambda row: row["domain"]), lambda row: row["domain"])
    return [row for _, group in by_domain for row in itertools.islice(group, collect_documents)]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder with: `demo` (every tier, loss and sinks), `masked` (the same texts under an edit), `broken`.

    And of unusual shape: `decoded` (generated tokens), `twins` (two routers to a layer), `plain` (no label, one layer
    of its own width).
    """
    import moescope as ms
    from moescope.capturing import TIERS
    from moescope.hooks.aliases import BUNDLED

    root = tmp_path_factory.mktemp("shelf")
    texts = small_corpus()
    model = ms.load(BUNDLED, dtype="float32")
    ms.capture(model, ms.Corpus(texts, labels=["domain"]), root / "demo", TIERS, loss=True, sinks=True)
    with model.edited(ms.Recipe([ms.Mask(layer=3, expert=7)])):
        ms.capture(model, ms.Corpus(texts, labels=["domain"]), root / "masked", ["routing"])
    going_on = ms.Corpus(texts[::16], labels=["domain"])
    ms.capture(model, going_on, root / "decoded", ["routing"], max_length=32, generate={"max_new_tokens": 12})
    rng, domain = np.random.default_rng(5), ["code", "math", "prose"] * 8
    keys = [f"L{layer:03d}-{side}" for layer in range(2) for side in ("encoder", "decoder")]
    twins = random_truth(rng, len(domain), [8] * 4, [2, 1] * 2)
    write(root / "twins", twins, [8] * 4, {"domain": domain}, layers=[0, 0, 1, 1], keys=keys)
    write(root / "plain", random_truth(rng, 24, [4, 24], [1, 3]), [4, 24], {})
    shutil.copytree(root / "masked", root / "broken")
    part = next((root / "broken" / "shards").glob("*/routing.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    return root


@pytest.fixture(scope="session")
def served(shelf):
    """The app's address."""
    from moescope.app import build
    from moescope.app.server import listen

    server = listen(build(shelf))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def player():
    """What drives browsers; tests skip without one."""
    if BROWSER is None:
        pytest.skip("no Chromium here: the app is not seen in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as player:
        yield player


@pytest.fixture(scope="session")
def chromium(player):
    """A browser that keeps nothing: each of its contexts is somebody else's."""
    browser = player.chromium.launch(**LAUNCH)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def profile(player, tmp_path_factory):
    """A browser as a person has it: it has been here before, and keeps the page's scripts compiled."""
    folder = tmp_path_factory.mktemp("profile")
    context = player.chromium.launch_persistent_context(folder, viewport=SIZE, color_scheme="light", **LAUNCH)
    yield context
    context.close()


@pytest.fixture
def visitor(profile, served):
    """One tab at 1280 x 800 in the light theme, of a person who has chosen nothing yet."""
    yield Visitor(profile.new_page(), served)
    blank = profile.pages[0]
    for page in profile.pages[1:]:
        page.close()
    profile.clear_permissions()
    session = profile.new_cdp_session(blank)
    session.send("Storage.clearDataForOrigin", {"origin": served, "storageTypes": "cookies,local_storage"})
    session.detach()

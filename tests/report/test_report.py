"""The report: complete, offline, and deaf to whatever the corpus says; opened in a real browser where there is one."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moescope import report
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=http://127.0.0.1:9/x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "{{ 7*7 }} {% raw %} ${window.hacked=1} %{x}",
    "<!--<script>",
    "]]>\u2028\u202e\ud800\x00",
    '<a href="javascript:window.hacked=1">here</a>',
    "' onmouseover='window.hacked=1",
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def hostile_store(path, with_outliers=True):
    """A store whose texts, token texts, labels, ids and names all try to break out of the page."""
    rng = np.random.default_rng(0)
    documents = 40
    names = [HOSTILE[0], HOSTILE[5].replace("\ud800", ""), "plain", HOSTILE[6]]
    labels = [names[d % 4] for d in range(documents)]
    prefer = np.zeros((documents, 2, 8))
    for d in range(documents):
        prefer[d, 1, d % 4] = 3.0
    made = random_truth(rng, documents, [8, 6], [2, 2], prefer=prefer, vocabulary=len(HOSTILE))
    maxima = np.exp(rng.normal(0, 0.1, (2, 8)))
    maxima[0, 3] = 300.0
    return write(
        path,
        made,
        [8, 6],
        {"domain": labels},
        layers=[1, 2],
        cuts=2,
        vocabulary={i: text.replace("\ud800", "") for i, text in enumerate(HOSTILE)},
        texts=[HOSTILE[d % 5] for d in range(documents)],
        maxima=maxima if with_outliers else None,
        hidden=[1.0, 250.0, 260.0],
        name=HOSTILE[1],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return report.write(hostile_store(folder / "store"), folder / "report.html")


class Markup(HTMLParser):
    """What a browser would take for markup: every tag with its attributes, and the contents of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.words.append(data)


OURS = {
    "html",
    "head",
    "meta",
    "title",
    "link",
    "style",
    "script",
    "noscript",
    "body",
    "header",
    "main",
    "footer",
    "section",
    "article",
    "nav",
    "h1",
    "h2",
    "h3",
    "p",
    "a",
    "b",
    "small",
    "span",
    "div",
    "bdi",
    "mark",
    "ul",
    "li",
    "details",
    "summary",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}


def test_hostile_text_is_shown_and_not_obeyed(page):
    found = Markup(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in found.tags} <= OURS
    for tag, attributes in found.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")], tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:,"))
    # Four figures, two templates, plotly and our own script: no text added or ended one.
    assert len(found.scripts) == 8
    for block in found.scripts[:6]:
        assert not set("<>&\u2028") & set(block)
        json.loads(block)
    shown = "".join(found.words)
    assert "window.hacked=1" in shown
    assert "{{␣7*7␣}}" in shown or "{{ 7*7 }}" in shown
    assert "default-src 'none'" in dict(found.tags[3][1])["content"]


def test_it_says_what_was_found(page):
    text = page.read_text(encoding="utf-8")
    for words in (
        "How to read this",
        "L1E3 is a super expert",
        "Who specialises in what",
        "beyond chance",
        "fair share",
    ):
        assert words in text
    assert text.count('class="expert"') >= 4
    assert '<mark style="--w:' in text


def test_what_a_store_lacks_is_said(tmp_path):
    made = random_truth(np.random.default_rng(0), 4, [4], [2])
    text = report.render(write(tmp_path / "s", made, [4], {}))
    assert "label columns" in text
    assert "no outliers tier" in text
    assert 'id="figure-load"' in text
    assert 'id="figure-npmi"' not in text


def test_one_label_and_nobody_special(tmp_path):
    made = random_truth(np.random.default_rng(0), 8, [4], [2])
    one = report.render(write(tmp_path / "one", made, [4], {"domain": ["only"] * 8}))
    assert "nothing can be compared" in one
    two = report.render(write(tmp_path / "two", made, [4], {"domain": ["a", "b"] * 4}))
    assert "No expert specialises in a domain more than chance explains" in two
    assert "No expert specialises in “b” more than chance explains" in two
    few = report.render(write(tmp_path / "few", made, [4], {"domain": ["a", "b"] * 4}), permutations=2)
    assert "Too few permutations to tell who specialises in “" in few


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made = random_truth(np.random.default_rng(0), 4, [4], [2])
    store = write(tmp_path / "s", made, [4], {})
    target = tmp_path / "report.html"
    target.write_text("before")

    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MoescopeError, match="No space left"):
            report.write(store, target)
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    assert report.write(store, target) == target
    assert target.stat().st_size > 4_000_000  # plotly is in it


def test_mistakes_are_named(tmp_path):
    made = random_truth(np.random.default_rng(0), 4, [4], [2])
    store = write(tmp_path / "s", made, [4], {"domain": ["a", "b"] * 2})
    with pytest.raises(MoescopeError, match="does not exist"):
        report.write(store, tmp_path / "no" / "report.html")
    with pytest.raises(MoescopeError, match="is a folder"):
        report.write(store, tmp_path)
    with pytest.raises(MoescopeError, match="no label 'topic'"):
        report.write(store, tmp_path / "r.html", by="topic")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(page):
    """No console message, no request but the file, no injected script, every figure drawn, nothing too wide."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            for width, scheme in ((1280, "light"), (1920, "dark")):
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                open_and_look(tab, page, width)
                tab.close()
        finally:
            browser.close()


def open_and_look(tab, page: Path, width: int) -> None:
    complaints, requests = [], []
    tab.set_default_timeout(60_000)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    every = "[...document.querySelectorAll('[data-figure]')]"
    # A function: the page's policy forbids to evaluate an expression a second time.
    tab.wait_for_function(f"() => {every}.length == 4 && {every}.every(figure => figure.querySelector('.main-svg'))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # The map stands on the first screen, and its cells answer to the mouse.
    left, top, across, down = tab.evaluate(
        "(r => [r.left, r.top, r.width, r.height])"
        "(document.querySelector('[data-figure=figure-load] .heatmaplayer').getBoundingClientRect())"
    )
    assert top + down <= 900
    tab.mouse.move(left + across * 0.07, top + down * 0.25)
    tab.wait_for_selector("[data-figure=figure-load] .hovertext")
    assert "its fair share" in tab.text_content("[data-figure=figure-load] .hovertext")
    # Each panel is two maps, one of them blank at any cell: both must answer.
    for place in (0.06, 0.31, 0.44, 0.94):
        layer = tab.locator("[data-figure=figure-npmi] .heatmaplayer").first
        layer.scroll_into_view_if_needed()
        box = layer.bounding_box()
        tab.mouse.move(box["x"] + box["width"] * place, box["y"] + box["height"] * 0.25)
        tab.wait_for_selector("[data-figure=figure-npmi] .hovertext")
        assert "99th percentile" in tab.text_content("[data-figure=figure-npmi] .hovertext")
    buttons = tab.eval_on_selector_all(".modebar-btn", "all => all.map((one) => one.dataset.title)")
    known = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert set(buttons) == known  # none sends a figure anywhere
    assert tab.evaluate("window.hacked") is None
    assert complaints == []
    assert requests == [page.as_uri()]

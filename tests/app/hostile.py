"""A store of hostile texts: what tries to be markup, script, another direction or nothing at all must show as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moescope.store import Store
from tests.analysis.made_stores import Made, write

TEXTS = (
    "<script>window.hacked = 1</script> and then plain words",
    "<img src=x onerror=\"window.hacked = 2\"> <svg onload='window.hacked = 3'>",
    "</textarea></script></style><style>body{display:none}</style><iframe src='javascript:window.hacked=4'>",
    '[click](javascript:window.hacked=5) <a href="javascript:window.hacked=6">here</a> {{7*7}} ${window.hacked=7}',
    "safe \u202eesrever\u202c \u2066isolated\u2069 \u200bzero\u200dwidth\u00ad \ufeffbom \u2028line\u2029paragraph",
    "w" * 10_000,
    "an emoji 👩‍👩‍👧 that tokens share, 🏳️‍🌈 too, and e\u0301\u0301\u0301\u0301 with marks",
    "NUL \x00 bell \x07 escape \x1b[31m delete \x7f tab\tline\r\nnext\n\n\n   spaces   ",
    "\"'><b onmouseover=window.hacked=8>%s %n &amp; &lt;script&gt; \\u003cscript\\u003e ]]>",
)
"""Each document's text; a page on which one of them has run has `window.hacked`."""

LABELS = ("<b onclick=window.hacked=9>bold</b>", "\u202eidib", "'; DROP TABLE labels; --")
SIZE = 4  # characters of a token; of the long word's, 100


def write_hostile(path: Path) -> Store:
    """Writes a store with routing of two layers of eight experts; its emoji are split over two tokens each."""
    rng = np.random.default_rng(7)
    starts, ends, documents, words = [], [], [], []
    for number, text in enumerate(TEXTS):
        size = 100 if len(text) > 1_000 else SIZE
        for at in range(0, len(text), size):
            until = min(at + size, len(text))
            pieces = [(at, until)]
            if any(ord(character) > 0xFFFF for character in text[at:until]):
                pieces *= 2  # bytes of one character in two tokens: both have its span
            for piece in pieces:
                starts.append(piece[0])
                ends.append(piece[1])
                documents.append(number)
                words.append(text[piece[0] : piece[1]])
    entries = {word: number for number, word in enumerate(dict.fromkeys(words))}
    document = np.array(documents)
    position = np.concatenate([np.arange(n) for n in np.bincount(document)])
    n = document.size
    expert = [np.argsort(rng.random((n, 8)), axis=1)[:, :2] for _ in range(2)]
    weight = [rng.dirichlet((2, 1), n).astype(np.float32) for _ in range(2)]
    truth = Made(
        document, document, position, np.array([entries[word] for word in words]), expert, weight,
        [np.ones((n, 2), bool)] * 2,
    )  # fmt: skip
    return write(
        path,
        truth,
        (8, 8),
        {"domain": [LABELS[number % len(LABELS)] for number in range(len(TEXTS))]},
        texts=list(TEXTS),
        vocabulary={number: word for word, number in entries.items()},
        spans=(np.array(starts), np.array(ends)),
        name="made/<i>hostile</i>",
        phase=np.where(position < 20, "prefill", "decode").astype(object),
    )

"""Classes of tokens by their text, and which experts specialise in them.

The classes overlap: " The" begins a word and is capitalised. They are read off the text of the token alone, as the
store's vocabulary holds it, and not off what stands around it: a piece that begins with a letter counts as going on a
word, though at the beginning of a line, or after a bracket, it begins one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import xarray as xr

from moescope.analysis.counts import Phase, sites_of
from moescope.analysis.label_tests import Alternative, Correction, LabelTest
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.property_tests import npmi_of_counts
from moescope.analysis.question import LAYERS, PHASE, RESAMPLES, SEED, Analysis, Parameter
from moescope.analysis.token_properties import SignaturesOfIds, property_counts
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

TokenClass = str | Sequence[str | int] | Callable[[str], bool]
"""A user's class: a regular expression that the whole text matches, a list of texts and token ids, or a function."""

_SPECIAL = re.compile(r"<\|.+\|>|<｜.+｜>|</?[A-Za-z_]\w*>|\[/?[A-Z_]+\]")


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalpha())


def _made_of(text: str, kinds: str) -> bool:
    core = text.strip()
    return bool(core) and all(unicodedata.category(c)[0] in kinds for c in core)


def _is_special(text: str) -> bool:
    return bool(_SPECIAL.fullmatch(text.strip()))


CLASSES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "whitespace": ("nothing but spaces, tabs and line breaks", lambda t: bool(t) and t.isspace()),
    "line break": ("whitespace with a line break in it", lambda t: t.isspace() and ("\n" in t or "\r" in t)),
    "word start": (
        "a space and then a letter",
        lambda t: len(t) > 1 and t[0].isspace() and t.lstrip()[:1].isalpha(),
    ),
    "word continuation": (
        "begins with a letter, without a space before it",
        lambda t: t[:1].isalpha() and not _is_special(t),
    ),
    "capitalised": (
        "its first letter is upper case",
        lambda t: _letters(t)[:1].isupper() and t.lstrip()[:1].isalpha() and not _is_special(t),
    ),
    "all capitals": (
        "two letters or more, all upper case",
        lambda t: len(_letters(t)) > 1 and _letters(t).isupper() and not _is_special(t),
    ),
    "digits": ("nothing but digits, a space before them allowed", lambda t: _made_of(t, "N")),
    "punctuation": (
        "nothing but punctuation and symbols, a space before them allowed",
        lambda t: _made_of(t.replace("\ufffd", "x"), "PS") and not _is_special(t),
    ),
    "brackets": ("nothing but brackets", lambda t: bool(t.strip()) and set(t.strip()) <= set("()[]{}<>")),
    "special": ("written like a control token: <|…|>, <tag>, </tag>, [TAG]", _is_special),
    "piece of a character": ("bytes that are no whole character", lambda t: "\ufffd" in t),
}
"""The classes of the box: name -> (what it takes, the test on the token's text). Scripts come on top: see `scripts`."""

NO_SPACES = (
    "no token's text begins with a space (this tokenizer's texts leave it out), so that word starts and continuations "
    "cannot be told apart: both classes are left out"
)


def npmi_classes(
    store: Store,
    classes: Sequence[str] | Mapping[str, TokenClass] | None = None,
    seed: int = 0,
    alternative: Alternative = "greater",
    correction: Correction = "bh",
    resamples: int = 500,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
) -> xr.Dataset:
    """Which experts specialise in which kind of token: digits, punctuation, word starts, scripts, classes of your own.

    How to read it: `npmi` as for labels: 0 no preference, 1 always together. `null_mean` is the nPMI that comes from
    the texts alone, if the expert fired at its usual rate inside each document; what goes beyond `null_p99` does not
    come from which documents were read. Trust a cell when `q` is small. Classes overlap, so one expert may stand in
    several.

    Args:
        store: an open store with the routing tier.
        classes: names of `CLASSES`, or NAME=REGEX for your own (the whole text must match); or a mapping of names to
            regular expressions, lists of texts and ids, or functions of the text. Every class of the box, and every
            script beyond ASCII that occurs, if None.
        seed: of the resamples.
        alternative: "greater" tests for preference; "two-sided" for preference or avoidance.
        correction: "bh" Benjamini-Hochberg, "by" Benjamini-Yekutieli (any dependence, stricter).
        resamples: documents drawn again, for the intervals; 0 for none.
        layers, where, phase: filters, as in `analysis.load`.

    Returns:
        As `npmi`, with the classes as `label`; p, q against the other tokens of the same documents
        (`within_documents`), p_max by Bonferroni; `documents` that hold the class. Classes without a token are left
        out.

    Raises:
        MoescopeError: no such class, a wrong expression, or no class that occurs.
    """
    sites = sites_of(store, layers)
    vocabulary = dict(store.vocabulary())
    sets, notes = class_ids(vocabulary, classes)
    attrs = provenance(
        store, analysis="npmi_classes", by="token class", classes=list(sets), where=where, phase=phase
    ) | {"class_notes": "; ".join(notes) or "none"}
    counts = property_counts(store, sites, SignaturesOfIds.of_sets(list(sets.values())), where, phase)
    test = LabelTest(0, seed, alternative, correction, resamples)
    result = npmi_of_counts(LayerAxis.of_sites(sites), counts, list(sets), test, attrs)
    there = result["tokens"].values > 0
    if not there.any():
        raise MoescopeError("No token of these documents is of any of these classes.")
    return result.isel(label=there)


def class_ids(
    vocabulary: Mapping[int, str], classes: Sequence[str] | Mapping[str, TokenClass] | None = None
) -> tuple[dict[str, list[int]], list[str]]:
    """Token ids of each class, and what a reader must know of them.

    Args:
        vocabulary: text of every token id.
        classes: as in `npmi_classes`.

    Raises:
        MoescopeError: no such class, or a wrong expression.
    """
    notes: list[str] = []
    if classes is None:
        tests: dict[str, TokenClass] = {name: test for name, (_, test) in CLASSES.items()}
        if not any(text[:1] == " " and text.strip() for text in vocabulary.values()):
            notes.append(NO_SPACES)
            del tests["word start"], tests["word continuation"]
        found = {name: _ids(vocabulary, name, test) for name, test in tests.items()} | scripts(vocabulary)
        return {name: ids for name, ids in found.items() if ids}, notes
    if isinstance(classes, str):
        raise MoescopeError("`classes` is a list of names, or a mapping.")
    named = classes if isinstance(classes, Mapping) else dict(_named(each) for each in classes)
    of_script = scripts(vocabulary)
    return {
        name: of_script[name] if test is None else _ids(vocabulary, name, test)
        for name, test in ((name, _test(name, test, of_script)) for name, test in named.items())
    }, notes


def scripts(vocabulary: Mapping[int, str]) -> dict[str, list[int]]:
    """Token ids by script, for letters beyond ASCII: "Latin beyond ASCII", "Cyrillic", ... in Unicode's words."""
    found: dict[str, list[int]] = {}
    for token_id, text in vocabulary.items():
        for name in {_script(c) for c in text if c.isalpha() and not c.isascii()}:
            found.setdefault(name, []).append(token_id)
    return dict(sorted(found.items()))


@cache
def _script(character: str) -> str:
    word = unicodedata.name(character, "other").split()[0]
    return "Latin beyond ASCII" if word == "LATIN" else word if word == "CJK" else word.capitalize()


def _named(given: str) -> tuple[str, TokenClass | None]:
    """("digits", None) of the box, or ("name", expression) of NAME=REGEX."""
    name, equals, expression = given.partition("=")
    return (name.strip(), expression) if equals and given not in CLASSES else (given, None)


def _test(name: str, test: TokenClass | None, of_script: Mapping[str, list[int]]) -> TokenClass | None:
    if test is not None:
        return test
    if name in CLASSES:
        return CLASSES[name][1]
    if name in of_script:
        return None
    known = ", ".join([*CLASSES, *of_script])
    raise MoescopeError(f"There is no token class {name!r}; there are {known}. Your own: NAME=REGEX.")


def _ids(vocabulary: Mapping[int, str], name: str, test: TokenClass) -> list[int]:
    if isinstance(test, str):
        try:
            expression = re.compile(test, re.DOTALL)
        except re.error as error:
            raise MoescopeError(f"The class {name!r} is no regular expression: {error}.") from error
        return [token_id for token_id, text in vocabulary.items() if expression.fullmatch(text)]
    if callable(test):
        return [token_id for token_id, text in vocabulary.items() if test(text)]
    wanted = set(test)
    return [token_id for token_id, text in vocabulary.items() if token_id in wanted or text in wanted]


CLASSES_QUESTION = Analysis(
    name="npmi_classes",
    run=npmi_classes,
    figure="npmi_classes",
    help="Which experts specialise in which kind of token: digits, punctuation, word starts, scripts, your own?",
    parameters=(
        Parameter(
            "classes",
            str,
            None,
            "token classes by name, or NAME=REGEX for your own (default: all there are)",
            many=True,
        ),
        Parameter("alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")),
        Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
        RESAMPLES,
        LAYERS,
        PHASE,
        SEED,
    ),
    tier="routing",
)

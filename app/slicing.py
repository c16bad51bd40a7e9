"""Named slices: sets of documents that a person has named, carried by the URL, taken by every analysis as `where`.

code~domain:code|long~documents:3-9,12
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from moescope.app.place import Place
from moescope.errors import MoescopeError

Where = dict[str, Any]

_MOST = 5_000_000  # documents of one slice: an address of a few characters could name more than memory holds


def names(place: Place) -> list[str]:
    """The names of a place's slices; what is in them is not written out.

    Raises:
        MoescopeError: one of them cannot be read.
    """
    rules = dict(_rules(place))
    for name, rule in rules.items():
        _read(name, rule)
    return list(rules)


def where_of_slice(place: Place, name: str) -> Where:
    """One slice of a place, as analyses take it.

    Raises:
        MoescopeError: there is no slice of that name, or it cannot be read.
    """
    rules = dict(_rules(place))
    if name not in rules:
        raise MoescopeError(f"There is no slice {name!r}; there are {', '.join(rules) or 'none'}.")
    column, values = _read(name, rules[name])
    if column == "documents":
        return {"document": [number for part in values for number in part]}
    return {column: values}


def active(place: Place) -> Where | None:
    """The slice that counts now; None for all documents.

    Raises:
        MoescopeError: there is no slice of that name, or it cannot be read.
    """
    return None if place.slice is None else where_of_slice(place, place.slice)


def with_documents(place: Place, name: str, numbers: Iterable[int]) -> Place:
    """The place with one more slice, active: of these documents.

    Raises:
        MoescopeError: the name cannot be used, or no document is in it.
    """
    return _with(place, name, "documents", _ranges(sorted(set(numbers))))


def with_values(place: Place, name: str, column: str, values: Iterable[str]) -> Place:
    """The place with one more slice, active: of the documents whose label has one of these values.

    Args:
        place: where we are.
        name: of the slice; letters, digits, blanks, dots, dashes.
        column: the label.
        values: of it.

    Raises:
        MoescopeError: the name cannot be used, no value is given, or an address cannot hold the label or a value.
    """
    if column == "documents" or set(column) & set(":|~"):
        raise MoescopeError(f"The label {column!r} cannot be in a slice: rename it without colon, bar or tilde.")
    listed = list(values)
    if any(set(value) & set(",|~") for value in listed):
        raise MoescopeError("Label values with a comma, a tilde or a bar cannot be in a slice.")
    return _with(place, name, column, ",".join(listed))


def _with(place: Place, name: str, column: str, text: str) -> Place:
    if not re.fullmatch(r"[\w .-]{1,40}", name):
        raise MoescopeError("A slice's name may have letters, digits, blanks, dots and dashes, at most 40.")
    if not text:
        raise MoescopeError("A slice needs at least one document.")
    kept = [f"{known}~{rule}" for known, rule in _rules(place) if known != name]
    return place.go(slices="|".join([*kept, f"{name}~{column}:{text}"]), slice=name)


def without_slice(place: Place, name: str) -> Place:
    """The place without one slice."""
    kept = [f"{known}~{rule}" for known, rule in _rules(place) if known != name]
    return place.go(slices="|".join(kept) or None, slice=None if place.slice == name else place.slice)


def _rules(place: Place) -> list[tuple[str, str]]:
    rules = []
    for part in (place.slices or "").split("|"):
        name, tilde, rule = part.partition("~")
        if tilde:
            rules.append((name, rule))
    return rules


def _read(name: str, rule: str) -> tuple[str, list[Any]]:
    """The column, and its values; of documents the runs of their numbers."""
    column, colon, text = rule.partition(":")
    if not colon or not text:
        raise MoescopeError(f"The slice {name!r} cannot be read: write it as {name}~column:value,value.")
    if column != "documents":
        return column, text.split(",")
    runs: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part)
        run = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not 0 < len(run) <= _MOST - sum(map(len, runs)):
            raise MoescopeError(f"The slice {name!r} names {part!r} as documents; write 3-9,12.")
        runs.append(run)
    return column, runs


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

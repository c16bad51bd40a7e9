"""What a view is drawn from: where the person is, the store as it stands, and answers that do not block."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moescope import analysis
from moescope.analysis.labelled import layer_name
from moescope.app import slicing
from moescope.app.answers import PATIENCE, Answers
from moescope.app.bench import Bench
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.app.shelf import Opened, Shelf
from moescope.errors import CancelledError, MoescopeError
from moescope.store import Store
from moescope.store.manifest import SiteRecord

ECHO = 10.0
"""Seconds in which all panels that waited for a cancelled question have asked once more."""


@dataclass(frozen=True)
class Desk:
    """What all pages of one running app share.

    Attributes:
        shelf: the stores.
        jobs, answers: long work, and what it found.
        models: models that the lab may load besides those of the stores (named on the command line).
        trust_remote_code: whether the command line allowed the own code of `models`; that of others never runs.
        bench: the lab's model and what it generated.
        stopped: question -> when it was found to have been cancelled; the last ones.
    """

    shelf: Shelf
    jobs: Jobs
    answers: Answers
    models: tuple[str, ...] = ()
    trust_remote_code: bool = False
    bench: Bench = field(default_factory=Bench)
    stopped: dict[Hashable, float] = field(default_factory=dict)

    def scene(self, place: Place, dark: bool = False, patience: float = PATIENCE) -> Scene:
        """The place with its store opened.

        Raises:
            StoreError: there is no such store, or it is damaged.
        """
        if place.store is None:
            raise MoescopeError("No store is chosen.")
        return Scene(self, place, self.shelf.open(place.store), dark, patience)


@dataclass(frozen=True)
class Scene:
    """One view's circumstances. Everything drawn follows from `place` and the store's version.

    Attributes:
        desk: what the app shares.
        place: where the person is.
        opened: the store, its name and version.
        dark: the page is dark.
        patience: seconds to wait for an answer before saying that it is on its way.
    """

    desk: Desk
    place: Place
    opened: Opened
    dark: bool = False
    patience: float = PATIENCE

    @property
    def store(self) -> Store:
        """The open store."""
        return self.opened.store

    def ask(self, question: str, *others: Opened, patience: float | None = None, **parameters: Any) -> Any:
        """The result of one registered analysis on this store (and `others`), for these parameters.

        Lists become tuples in the key, so that the same question has the same answer.

        Raises:
            Pending: it is being computed.
            MoescopeError: the analysis cannot answer here, in a sentence.
        """
        asked = analysis.ANALYSES[question]
        stores = (self.store, *(other.store for other in others))
        key = (question, self.opened.version, *(other.version for other in others), _frozen(parameters))
        return self._answer(key, asked.help, lambda: asked.run(*stores, **parameters), patience)

    def compute(self, key: Hashable, title: str, work: Callable[[], Any], patience: float | None = None) -> Any:
        """The result of any other function on this store; `key` says which and with what parameters."""
        return self._answer((key, self.opened.version), title, work, patience)

    def _answer(self, key: Hashable, title: str, work: Callable[[], Any], patience: float | None) -> Any:
        """The answer. What a person has cancelled is cancelled for every panel that waited for it.

        Panels that wait ask again by themselves, without patience: the next of them would begin it anew.
        """
        stopped = self.desk.stopped
        if self.patience > 0:
            stopped.pop(key, None)  # somebody came, or pressed "Try again"
        elif time.monotonic() - stopped.get(key, -ECHO) < ECHO:
            raise CancelledError("Cancelled.")
        try:
            wait = self.patience if patience is None else patience
            return self.desk.answers.ask(key, title, work, wait, anew=self.patience > 0)
        except CancelledError:
            now = time.monotonic()
            for old in [known for known, then in list(stopped.items()) if now - then >= ECHO]:
                stopped.pop(old, None)
            stopped[key] = now
            raise

    @property
    def by(self) -> str | None:
        """The label column that counts: the chosen one, else the store's first; None if it has none."""
        if self.place.by is not None:
            if self.place.by not in self.store.labels:
                known = ", ".join(self.store.labels) or "no labels"
                raise MoescopeError(f"This store has no label {self.place.by!r}; it has {known}.")
            return self.place.by
        return self.store.labels[0] if self.store.labels else None

    @cached_property
    def where(self) -> dict[str, Any] | None:
        """The active slice as analyses take it; None for all documents."""
        return slicing.active(self.place)

    @property
    def layers(self) -> list[str]:
        """Every MoE layer's name, as figures write it and URLs carry it."""
        return [layer_name(site.layer, site.key) for site in self.store.sites]

    def site(self, layer: str | None = None) -> SiteRecord:
        """The chosen layer's site (the first if none is chosen).

        Raises:
            MoescopeError: the store has no such layer.
        """
        name = layer if layer is not None else self.place.layer
        if name is None:
            return self.store.sites[0]
        if name not in self.layers:
            raise MoescopeError(f"This store has no MoE layer {name}; it has {', '.join(self.layers)}.")
        return self.store.sites[self.layers.index(name)]

    def chosen(self) -> tuple[str, int] | None:
        """(site key, expert) of the selected expert, None if none is.

        Raises:
            MoescopeError: there is no such expert.
        """
        if self.place.layer is None or self.place.expert is None:
            return None
        site = self.site()
        if not 0 <= self.place.expert < site.n_experts:
            raise MoescopeError(
                f"Layer {self.place.layer} has experts 0 to {site.n_experts - 1}; there is no {self.place.expert}."
            )
        return site.key, self.place.expert

    def selected(self) -> tuple[str, int]:
        """`chosen`, where there must be one.

        Raises:
            MoescopeError: no expert is selected, or there is no such expert.
        """
        chosen = self.chosen()
        if chosen is None:
            raise MoescopeError("No expert is selected.")
        return chosen

    def other(self) -> Opened:
        """The second store of a comparison.

        Raises:
            MoescopeError: none is chosen, or it cannot be opened.
        """
        if self.place.other is None:
            raise MoescopeError("Choose a second store to compare with.")
        return self.desk.shelf.open(self.place.other)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(part)) for key, part in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(part) for part in value)
    return value

"""Interventions on the routing of one prompt, several of them at once on different rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moescope.effects.cases import Align, Case, Metric, Prepared, prepared
from moescope.effects.keeping import Kept
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.interventions import Act, Live, Where
from moescope.hooks.mixing import Recording, Routed, called_sites
from moescope.hooks.sites import Site

Kind = Literal["mask", "zero", "patch"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Patch:
    """Routing for some positions of one site: ids and weights [n, k] at positions [n], ascending."""

    positions: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """One intervention.

    Attributes:
        silenced: site key -> experts that are masked or zeroed.
        patched: site key -> routing from elsewhere.
        positions: (first, end) that `silenced` is restricted to.
    """

    silenced: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    patched: Mapping[str, Patch] = field(default_factory=dict)
    positions: tuple[int, int] | None = None


@dataclass(frozen=True)
class Subject:
    """A case in tokens, with the routing of its own plain run and of its source's.

    Attributes:
        tokens: the case.
        own: site key -> what the experts were handed in the plain run.
        source: the same of the source's run; empty without one.
    """

    tokens: Prepared
    own: dict[str, Routed]
    source: dict[str, Routed]

    def patch(self, key: str, pairs: np.ndarray) -> Patch:
        """The source's routing at one site for (own position, source position) pairs [n, 2]."""
        device = self.source[key].ids.device
        at, there = (torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in pairs.T)
        return Patch(at, self.source[key].ids[there], self.source[key].weights[there])

    def differing(self, key: str, expert: int) -> np.ndarray:
        """The aligned pairs [n, 2] of which one run selects an expert and the other does not."""
        pairs = self.tokens.pairs
        own, source = ((routed[key].ids == expert).any(-1).cpu().numpy() for routed in (self.own, self.source))
        return pairs[own[pairs[:, 0]] != source[pairs[:, 1]]]

    def selected(self, key: str, expert: int) -> int:
        """How many of the tokens that are run select an expert."""
        return int((self.own[key].ids == expert).any(-1).sum())


def routing_of(model: Model, ids: torch.Tensor) -> dict[str, Routed]:
    """Site key -> what its experts are handed when these ids [S] are run alone."""
    with Recording(model) as seen, torch.inference_mode():
        _forward(model, ids.unsqueeze(0))
    return seen.routed


def outcomes(
    model: Model, subject: Subject, trials: Sequence[Trial], kind: Kind, metric: Metric, rows: int
) -> np.ndarray:
    """[n] the metric under each trial, `rows` of them at a time."""
    ids = subject.tokens.ids
    found = []
    for start in range(0, len(trials), rows):
        some = trials[start : start + rows]
        with Live(model, _acts(some, kind, len(ids)), check=False), torch.inference_mode():
            logits = _forward(model, ids.expand(len(some), -1))
        found.append(subject.tokens.measure(logits, metric))
    return np.concatenate(found) if found else np.zeros(0)


def _acts(trials: Sequence[Trial], kind: Kind, length: int) -> dict[str, list[Act]]:
    """The acts of a batch whose row r is trial r; all patches of a site are one act."""
    acts: dict[str, list[Act]] = {}
    patches: dict[str, list[tuple[int, Patch]]] = {}
    for row, trial in enumerate(trials):
        for key, experts in trial.silenced.items():
            silence: Any = "zero" if kind == "patch" else kind
            where = Where(batch=(row,), positions=trial.positions)
            acts.setdefault(key, []).append(Act(silence, experts, where=where))
        for key, patch in trial.patched.items():
            if len(patch.positions):
                patches.setdefault(key, []).append((row, patch))
    for key, some in patches.items():
        marked = torch.zeros(len(trials), length, dtype=torch.bool)
        for row, patch in some:
            marked[row, patch.positions.cpu()] = True
        ids, weights = (torch.cat([getattr(patch, name) for _, patch in some]) for name in ("ids", "weights"))
        acts.setdefault(key, []).append(Act("patch", ids=ids, weights=weights, where=Where(marked=marked)))
    return acts


def _forward(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return model.forward(ids, torch.ones_like(ids))


@dataclass(frozen=True)
class Run:
    """What came of every case.

    Attributes:
        plain, source: [case] the metric without an intervention, and in the source's own run (NaN without one).
        values: for each case, the metric under each of its trials.
        subjects: the cases.
    """

    plain: np.ndarray
    source: np.ndarray
    values: list[np.ndarray]
    subjects: list[Subject]


def run(
    model: Model,
    cases: Sequence[Case],
    trials_of: Callable[[Subject, np.random.Generator], Sequence[Trial]],
    question: dict[str, Any],
    *,
    kind: Kind,
    metric: Metric,
    align: Align,
    rows: int,
    seed: int,
    out: str | Path | None,
    on_progress: OnProgress | None,
) -> Run:
    """Every trial of every case; with a folder, what it holds already is not run again.

    Raises:
        MoescopeError: a case that does not fit the metric, no source to patch from, or a folder of another question.
        RefusedError: the family's blocks cannot be edited by row.
    """
    if not cases:
        raise MoescopeError("There is no case to trace.")
    if rows < 1:
        raise MoescopeError("At least one row must stand in a batch.")
    if model.own_batch is not None:
        raise RefusedError(f"Texts of this model cannot share a batch: {model.own_batch}.")
    called_sites(model)
    if kind == "patch" and any(case.source is None for case in cases):
        raise MoescopeError("Patching needs another prompt to take the routing from: give each case a `source`.")
    # A source that nothing is taken from need not be aligned.
    told = cases if kind == "patch" else [replace(case, source=None) for case in cases]
    items = [prepared(model, case, metric, align) for case in told]
    if kind != "patch":
        refuse(model, kind)
    whole = {
        "model": model.weights_fingerprint, "edits": list(model.edits), "kind": kind, "metric": metric, "align": align,
        "seed": seed, "rows": rows, "cases": [vars(case) for case in cases], **question,
    }  # fmt: skip
    kept = Kept(out, whole)
    subjects = [_subject(model, item) for item in items]
    trials = [list(trials_of(subject, np.random.default_rng([seed, place]))) for place, subject in enumerate(subjects)]
    total, done = sum(map(len, trials)), 0
    plain, source, values = [], [], []
    for place, (subject, some) in enumerate(zip(subjects, trials, strict=True)):
        found = []
        for start in range(0, len(some), rows):
            name = f"{place}:{start}"
            here = kept.get(name)
            if here is None:
                here = kept.add(name, outcomes(model, subject, some[start : start + rows], kind, metric, rows))
            found.append(here)
            done += len(here)
            if on_progress is not None:
                on_progress(done, total)
        values.append(np.concatenate(found) if found else np.zeros(0))
        plain.append(outcomes(model, subject, [Trial()], kind, metric, 1)[0])
        source.append(_of_source(model, subject, metric))
    kept.flush()
    return Run(np.array(plain), np.array(source), values, subjects)


def refuse(model: Model, kind: Kind) -> None:
    """Raises RefusedError now where a family cannot be silenced by row, rather than in the middle of a run."""
    act: Any = Act("mask" if kind == "mask" else "zero", (0,), where=Where(batch=(0,)))
    with Live(model, {site.key: [act] for site in model.sites}):
        pass


def _subject(model: Model, item: Prepared) -> Subject:
    source = {} if item.source_ids is None else routing_of(model, item.source_ids)
    return Subject(item, routing_of(model, item.ids), source)


def _of_source(model: Model, subject: Subject, metric: Metric) -> float:
    ids = subject.tokens.source_ids
    if ids is None:
        return np.nan
    with torch.inference_mode():
        return float(subject.tokens.measure(_forward(model, ids.unsqueeze(0)), metric, of_source=True)[0])


def chosen_sites(model: Model, layers: Sequence[int] | None) -> list[Site]:
    """The sites of some model layers; all of them for None.

    Raises:
        MoescopeError: a layer that has none.
    """
    if layers is None:
        return model.sites
    missing = sorted(set(layers) - {site.layer for site in model.sites})
    if missing:
        known = ", ".join(str(site.layer) for site in model.sites)
        raise MoescopeError(f"The model has no MoE layer {missing[0]}; it has {known}.")
    return [site for site in model.sites if site.layer in set(layers)]

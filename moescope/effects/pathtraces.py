"""Causal tracing of paths: experts of consecutive MoE layers silenced, or patched round, together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

from moescope.effects.cases import Align, Case, Metric, prepared
from moescope.effects.judging import ELSEWHERE, ROWS, attrs, beside, intervals, of_cases
from moescope.effects.traces import silenced
from moescope.effects.trials import Kind, OnProgress, Subject, Trial, routing_of, run
from moescope.errors import MoescopeError
from moescope.hooks import Model
from moescope.hooks.sites import Site

Path_ = Sequence[tuple[int, int]]
Cells = tuple[tuple[Site, int], ...]


def trace_paths(
    model: Model,
    cases: Sequence[Case],
    *,
    paths: Sequence[Path_] | None = None,
    length: int = 3,
    top: int = 20,
    kind: Kind = "mask",
    metric: Metric = "loss",
    align: Align = "same",
    controls: int = 20,
    rows: int = ROWS,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """What paths through consecutive MoE layers are worth to the answers.

    How to read it: `effect` is that of all experts of the path together, `parts` the sum of what each of them does
    alone; where the two differ, the experts of the path depend on each other, or stand in for each other. It counts
    where it lies outside what random paths through the same layers do (`control_low` to `control_high`).

    Args:
        paths: each a sequence of (model layer, expert) in consecutive MoE layers; without them, the `top` most
            travelled ones of `length` layers: top-1 experts of the prompts' tokens, in their plain runs.
        length, top: of the paths that are looked for.
        kind: as in `trace_experts`, at every expert of the path.
        controls: random paths for each.
        model, cases, metric, align, rows, seed, out, on_progress: as in `trace_experts`.

    Returns:
        Dataset with dims (path): effect, low, high, parts, travelled (tokens of the prompts whose top-1 experts these
        are), control_mean, control_low, control_high, p; (case): plain, source; (case, path): by_case; coordinates:
        path ("L1E3 → L2E7"), first_layer.

    Raises:
        MoescopeError: an unknown layer or expert, layers that are not consecutive, or as in `trace_experts`.
    """
    travelled = _travelled(model, cases, metric)
    found_paths = [_cells(model, path) for path in paths] if paths else _most(model, travelled, length, top)
    alone = sorted({cell for path in found_paths for cell in path}, key=lambda cell: (cell[0].ordinal, cell[1]))
    n, m = len(found_paths), len(alone)

    def trials(subject: Subject, rng: np.random.Generator) -> list[Trial]:
        random = [_elsewhere(path, rng) for _ in range(controls) for path in found_paths]
        return [silenced(subject, path, kind) for path in [*found_paths, *((cell,) for cell in alone), *random]]

    names = [" → ".join(f"L{site.layer}E{expert}" for site, expert in path) for path in found_paths]
    question = {
        "what": "paths", "controls": controls,
        "paths": [[[site.key, expert] for site, expert in path] for path in found_paths],
    }  # fmt: skip
    found = run(
        model, cases, trials, question,
        kind=kind, metric=metric, align=align, rows=rows, seed=seed, out=out, on_progress=on_progress,
    )  # fmt: skip
    change = np.stack(found.values) - found.plain[:, None]
    effect, singles = change[:, :n].mean(0), dict(zip(alone, change[:, n : n + m].mean(0), strict=True))
    low, high = intervals(change[:, :n], seed)
    random = change[:, n + m :].mean(0).reshape(controls, n)
    columns = {
        "effect": effect, "low": low, "high": high,
        "parts": np.array([sum(singles[cell] for cell in path) for path in found_paths]),
        "travelled": np.array([_times(travelled, path) for path in found_paths]),
    } | beside(effect, random)  # fmt: skip
    return xr.Dataset(
        {name: ("path", values) for name, values in columns.items()}
        | {"by_case": (("case", "path"), change[:, :n]), "control_effect": (("control", "path"), random)}
        | of_cases(found),
        coords={
            "path": np.array(names, dtype=object),
            "first_layer": ("path", [path[0][0].layer for path in found_paths]),
            "case": np.arange(len(cases)),
            "control": np.arange(controls),
        },
        attrs=attrs(model, cases, "trace_paths", kind, metric, align, seed)
        | {
            "control": ELSEWHERE if controls else "none",
            "controls": controls,
            "table": "path",
            "table_order": "effect",
        },
    )


def parsed(text: str) -> list[tuple[int, int]]:
    """A path as people write it, ``1:3,2:7`` for layer 1, expert 3 and layer 2, expert 7.

    Raises:
        MoescopeError: it is not written so.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return [(int(layer), int(expert)) for layer, expert in pairs]
    except ValueError as error:
        raise MoescopeError(f"{text!r} is not a path; write layer:expert,layer:expert as in 1:3,2:7.") from error


def _cells(model: Model, path: Path_) -> Cells:
    sites: list[Site] = []
    for layer, expert in path:
        here = [site for site in model.sites if site.layer == layer]
        if len(here) != 1 or not 0 <= expert < here[0].n_experts:
            raise MoescopeError(f"The model has no single expert {expert} in a MoE layer {layer}.")
        sites.append(here[0])
    places = [model.sites.index(site) for site in sites]
    if not places or places != list(range(places[0], places[0] + len(places))):
        raise MoescopeError("A path goes through consecutive MoE layers, in their order.")
    return tuple((site, expert) for site, (_, expert) in zip(sites, path, strict=True))


def _travelled(model: Model, cases: Sequence[Case], metric: Metric) -> np.ndarray:
    """[site, token] top-1 expert of every prompt token, by weight."""
    columns = []
    for case in cases:
        tokens = prepared(model, replace(case, source=None), metric, "same")
        routed = routing_of(model, tokens.ids)
        columns.append(np.stack([
            r.ids.gather(-1, r.weights.float().argmax(-1, keepdim=True))[: tokens.n_prompt, 0].cpu().numpy()
            for r in (routed[site.key] for site in model.sites)
        ]))  # fmt: skip
    return np.concatenate(columns, axis=1)


def _most(model: Model, travelled: np.ndarray, length: int, top: int) -> list[Cells]:
    n = len(model.sites)
    if not 1 <= length <= n or top < 1:
        raise MoescopeError(f"Paths have 1 to {n} layers in this model, and there must be one at least.")
    counts: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for first in range(n - length + 1):
        for column in travelled[first : first + length].T:
            counts[first, tuple(map(int, column))] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]
    return [tuple(zip(model.sites[first : first + length], path, strict=True)) for (first, path), _ in ordered]


def _times(travelled: np.ndarray, path: Cells) -> int:
    first = path[0][0].ordinal
    here = np.array([expert for _, expert in path])[:, None]
    return int((travelled[first : first + len(path)] == here).all(0).sum())


def _elsewhere(path: Cells, rng: np.random.Generator) -> Cells:
    """Random experts of the same layers, none of them the path's own."""
    return tuple(
        (site, int(rng.choice([other for other in range(site.n_experts) if other != expert]))) for site, expert in path
    )

"""Causal tracing of routing: what an expert, a layer, a token's routing or a path is worth to an answer.

Each is silenced, or given the routing of another prompt, and the loss of the answer (or a difference of two logits) is
measured again. `effect` is always the metric under the intervention minus the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from moescope.effects.cases import Align, Case, Metric
from moescope.effects.judging import (
    ROWS,
    SHUFFLED,
    WITHIN,
    attrs,
    axis_of,
    beside,
    intervals,
    of_cases,
    p_within,
    recovered,
)  # fmt: skip
from moescope.effects.trials import Kind, OnProgress, Subject, Trial, chosen_sites, run
from moescope.errors import MoescopeError
from moescope.hooks import Model
from moescope.hooks.sites import Site


def trace_experts(
    model: Model,
    cases: Sequence[Case],
    *,
    kind: Kind = "mask",
    metric: Metric = "loss",
    layers: Sequence[int] | None = None,
    align: Align = "same",
    rows: int = ROWS,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """What each expert alone is worth to the answers.

    How to read it: with the loss as metric, a positive `effect` says that the answer becomes less likely; with a
    difference of logits, a negative one does. Trust an expert where the interval does not hold 0 and `p` is small among
    the experts of its layer. Where `tokens` is 0 nothing was changed, but by masks in families whose weights are shares
    of a softmax over all experts, never divided by their sum: without the masked expert all other shares grow.

    Args:
        model: a model with a tokenizer.
        cases: prompts with answers; with kind="patch" each with a source.
        kind: "mask" (others take its place), "zero" (nothing does), or "patch": the tokens that select the expert in
            one of the two runs alone get the source's routing.
        metric: "loss" (nats per token of the answer) or "difference" (logit of the answer's first token minus that of
            `wrong`).
        layers: model layer indices; all MoE layers if None.
        align: how source positions are aligned; see `effects.cases.aligned`.
        rows: interventions in one forward pass.
        seed: of the intervals.
        out: a folder that keeps what is done, so that a killed run goes on where it was.
        on_progress: called with the interventions done, and how many there are.

    Returns:
        Dataset with dims (layer, expert): effect (mean over cases), low, high (95 %, cases drawn anew; from five cases
        on), p, tokens (of prompt and answer that select it or, patched, of the prompt that are changed; mean over
        cases), exists; (layer): of_layer (median effect); (case): plain, source; (case, layer, expert): by_case.

    Raises:
        MoescopeError: an unknown layer, a case that does not fit, or a folder of another question.
        RefusedError: the family's blocks cannot be edited by row.
    """
    sites = chosen_sites(model, layers)
    cells = [(site, expert) for site in sites for expert in range(site.n_experts)]
    question = {"what": "experts", "sites": [site.key for site in sites]}
    found = run(
        model, cases, lambda subject, rng: [silenced(subject, [cell], kind) for cell in cells], question,
        kind=kind, metric=metric, align=align, rows=rows, seed=seed, out=out, on_progress=on_progress,
    )  # fmt: skip
    axis = axis_of(model, sites)
    change = np.stack(found.values) - found.plain[:, None]
    low, high = intervals(change, seed)
    tokens = np.mean([[_touched(s, site.key, e, kind) for site, e in cells] for s in found.subjects], axis=0)
    edges = np.cumsum([site.n_experts for site in sites])[:-1]
    by_layer = {
        name: np.split(values, edges)
        for name, values in (("effect", change.mean(0)), ("low", low), ("high", high), ("tokens", tokens))
    }
    by_layer["p"] = [p_within(effects) for effects in by_layer["effect"]]
    padded = {name: axis.pad(parts) for name, parts in by_layer.items()}
    by_case = np.stack([axis.pad(np.split(row, edges)) for row in change])
    return xr.Dataset(
        {name: (("layer", "expert"), values) for name, values in padded.items()}
        | {
            "of_layer": ("layer", np.nanmedian(padded["effect"], axis=1)),
            "by_case": (("case", "layer", "expert"), by_case),
            "exists": (("layer", "expert"), axis.exists),
        }
        | of_cases(found),
        coords=axis.coordinates() | {"case": np.arange(len(cases))},
        attrs=attrs(model, cases, "trace_experts", kind, metric, align, seed)
        | {"control": WITHIN, "table": "layer, expert", "table_order": "effect"},
    )


def trace_layers(
    model: Model,
    cases: Sequence[Case],
    *,
    kind: Kind = "patch",
    metric: Metric = "loss",
    layers: Sequence[int] | None = None,
    window: int = 1,
    align: Align = "same",
    controls: int = 20,
    rows: int = ROWS,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """What the routing of each layer (or of `window` MoE layers from it on) is worth to the answers.

    How to read it: patched, all aligned prompt tokens of the layer get the source's routing; `recovered` is the share
    of the way from the plain metric to the source's own that this alone goes. Zeroed, the layer's routed experts give
    nothing. `effect` counts where it lies outside `control_low` to `control_high`.

    Args:
        kind: "patch" or "zero"; all experts of a layer cannot be masked.
        window: MoE layers that are changed together, from each on; the last windows are shorter.
        controls: random shuffles of the source's routing over its tokens, for kind="patch".
        model, cases, metric, layers, align, rows, seed, out, on_progress: as in `trace_experts`.

    Returns:
        Dataset with dims (layer): effect, low, high, recovered, control_mean, control_low, control_high, p;
        (case): plain, source; (case, layer): by_case; (control, layer): control_effect (means over cases).
    """
    sites, windows = _windows(model, layers, window, kind)
    n_controls = controls if kind == "patch" else 0

    def trials(subject: Subject, rng: np.random.Generator) -> list[Trial]:
        first = [_whole(subject, sites_of, subject.tokens.pairs, kind) for sites_of in windows]
        shuffled = [_shuffled(subject.tokens.pairs, rng) for _ in range(n_controls)]
        return first + [_whole(subject, some, pairs, kind) for pairs in shuffled for some in windows]

    question = {"what": "layers", "sites": [s.key for s in sites], "window": window, "controls": n_controls}
    found = run(
        model, cases, trials, question,
        kind=kind, metric=metric, align=align, rows=rows, seed=seed, out=out, on_progress=on_progress,
    )  # fmt: skip
    change = (np.stack(found.values) - found.plain[:, None]).reshape(len(cases), 1 + n_controls, len(sites))
    low, high = intervals(change[:, 0], seed)
    effect = change[:, 0].mean(0)
    controlled = beside(effect, change[:, 1:].mean(0))
    axis = axis_of(model, sites)
    coordinates = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    return xr.Dataset(
        {"effect": ("layer", effect), "low": ("layer", low), "high": ("layer", high),
         "recovered": ("layer", recovered(effect, found))}
        | {name: ("layer", values) for name, values in controlled.items()}
        | {"by_case": (("case", "layer"), change[:, 0]),
           "control_effect": (("control", "layer"), change[:, 1:].mean(0))}
        | of_cases(found),
        coords=coordinates | {"case": np.arange(len(cases)), "control": np.arange(n_controls)},
        attrs=attrs(model, cases, "trace_layers", kind, metric, align, seed)
        | {"control": SHUFFLED if n_controls else "none", "controls": n_controls, "window": window,
           "table": "layer"},
    )  # fmt: skip


def trace_positions(
    model: Model,
    case: Case,
    *,
    kind: Kind = "patch",
    metric: Metric = "loss",
    layers: Sequence[int] | None = None,
    window: int = 1,
    span: int = 1,
    align: Align = "same",
    controls: int = 0,
    rows: int = ROWS,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """What the routing of each token of one prompt in each layer is worth to its answer.

    How to read it: each cell is one token (or `span` of them from there on) in one layer (or `window` from it on) whose
    routing is the source's, or whose routed experts give nothing (kind="zero"). `recovered` is the share of the way to
    the source's own metric. Tokens that are aligned with nothing stay empty.

    Args:
        case: one prompt.
        window, span: MoE layers and tokens that are changed together, from each on.
        controls: how many random other tokens' routing each cell is given instead, for kind="patch".
        model, kind, metric, layers, align, rows, seed, out, on_progress: as in `trace_layers`.

    Returns:
        Dataset with dims (layer, position): effect, recovered, control_mean, control_low, control_high, p; (): plain,
        source; coordinate `word` along position.
    """
    sites, windows = _windows(model, layers, window, kind)
    n_controls = controls if kind == "patch" else 0
    starts: list[int] = []

    def trials(subject: Subject, rng: np.random.Generator) -> list[Trial]:
        pairs, n = subject.tokens.pairs, subject.tokens.n_prompt
        starts[:] = pairs[:, 0].tolist() if kind == "patch" else range(n)
        others = [pairs] + [_shuffled(pairs, rng) for _ in range(n_controls)]
        found = []
        for of in others:
            for some in windows:
                for start in starts:
                    end = min(start + span, n)
                    here = of[(of[:, 0] >= start) & (of[:, 0] < end)]
                    found.append(_whole(subject, some, here, kind, (start, end)))
        return found

    question = {
        "what": "positions", "sites": [s.key for s in sites], "window": window, "span": span, "controls": n_controls,
    }  # fmt: skip
    found = run(
        model, [case], trials, question,
        kind=kind, metric=metric, align=align, rows=rows, seed=seed, out=out, on_progress=on_progress,
    )  # fmt: skip
    tokens = found.subjects[0].tokens
    change = (found.values[0] - found.plain[0]).reshape(1 + n_controls, len(sites), len(starts))
    tables = {"effect": change[0], "recovered": recovered(change[0], found)} | beside(change[0], change[1:])
    whole = {name: np.full((len(sites), tokens.n_prompt), np.nan) for name in tables}
    for name, values in tables.items():
        whole[name][:, starts] = values
    coordinates = {name: value for name, value in axis_of(model, sites).coordinates().items() if name != "expert"}
    return xr.Dataset(
        {name: (("layer", "position"), values) for name, values in whole.items()}
        | {"plain": ((), found.plain[0]), "source": ((), found.source[0])},
        coords=coordinates
        | {"position": np.arange(tokens.n_prompt), "word": ("position", np.array(tokens.words, dtype=object))},
        attrs=attrs(model, [case], "trace_positions", kind, metric, align, seed)
        | {"control": SHUFFLED if n_controls else "none", "controls": n_controls, "window": window,
           "span": span,
           "table": "layer, position", "table_order": "effect"},
    )  # fmt: skip


def _windows(
    model: Model, layers: Sequence[int] | None, window: int, kind: Kind
) -> tuple[list[Site], list[list[Site]]]:
    if kind == "mask":
        raise MoescopeError("All experts of a layer cannot be masked; zero them, or patch their routing.")
    if window < 1:
        raise MoescopeError("At least one layer must be changed at a time.")
    sites = chosen_sites(model, layers)
    places = [model.sites.index(site) for site in sites]
    return sites, [model.sites[place : place + window] for place in places]


def silenced(subject: Subject, cells: Sequence[tuple[Site, int]], kind: Kind) -> Trial:
    """One trial that silences, or patches round, experts of different layers."""
    if kind == "patch":
        return Trial(
            patched={site.key: subject.patch(site.key, subject.differing(site.key, expert)) for site, expert in cells}
        )
    return Trial(silenced={site.key: (expert,) for site, expert in cells})


def _whole(
    subject: Subject, sites: Sequence[Site], pairs: np.ndarray, kind: Kind, positions: tuple[int, int] | None = None
) -> Trial:
    """One trial on all experts of some layers: the source's routing for these pairs, or nothing at all."""
    if kind == "patch":
        return Trial(patched={site.key: subject.patch(site.key, pairs) for site in sites})
    return Trial(silenced={site.key: tuple(range(site.n_experts)) for site in sites}, positions=positions)


def _touched(subject: Subject, key: str, expert: int, kind: Kind) -> int:
    return len(subject.differing(key, expert)) if kind == "patch" else subject.selected(key, expert)


def _shuffled(pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([pairs[:, 0], rng.permutation(pairs[:, 1])], axis=-1)

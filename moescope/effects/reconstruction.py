"""NAEE: which experts a layer can lose while its block's output stays what it was (METHODS 6).

Source: "Not All Experts are Equal" (arXiv 2402.14800): of all sets of r experts, drop the one without which the
block's output moves least. The block itself is run on what it was given, with the set removed as if pruned, so that
selection and renormalisation are the family's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from moescope.analysis.labelled import PADDING
from moescope.analysis.resampling import mean_present
from moescope.capturing.batches import batches
from moescope.capturing.corpus import Corpus
from moescope.effects.atoms import axis_of, chosen_sites
from moescope.effects.losses import BATCH_TOKENS, MAX_LENGTH
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.interventions import Act, Live
from moescope.hooks.sites import Site

Search = Literal["auto", "exact", "greedy", "sampled"]

MOST = 256
"""Sets of one layer that are all tried by default; beyond it the search is greedy. C(8, 2) is 28, C(16, 2) is 120."""
TOKENS = 4096
"""Calibration tokens: each is run once for every set."""
DRAWS = 500
SAME = 1e-3  # a block run again on what it was given must give what it gave, up to this (relative)


def naee(
    model: Model,
    corpus: Corpus,
    drop: int = 1,
    *,
    search: Search = "auto",
    most: int = MOST,
    layers: Sequence[int] | None = None,
    tokens: int = TOKENS,
    controls: int = 40,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """The reconstruction loss of each layer's block over sets of dropped experts, and the set to drop.

    How to read it: `loss` is how far the block's output moves without the set in `dropped`, as a share of its own size;
    hold it against `random_loss`, sets dropped at random. The set is the best of those tried on these tokens: being
    better than random ones is no test of it. `naee` is an expert's own score, high where the block misses it.

    Args:
        model: a model with a tokenizer.
        corpus: calibration texts.
        drop: experts of each layer to drop, r.
        search: "exact" tries every set of r; "greedy" drops one expert after the other, each time the one that is
            missed least; "sampled" tries `most` random sets; "auto" is exact up to `most` sets, greedy beyond.
        most: sets of a layer, see `search`.
        layers: model layer indices; all MoE layers if None.
        tokens: calibration tokens; texts beyond are left out.
        controls: random sets of each layer.
        max_length: tokens of context.
        seed: of random sets and intervals.
        on_progress: called with the layers done.

    Returns:
        Dataset with dims (layer, expert): naee (exact and sampled: the mean loss of the tried sets that drop the
            expert; greedy: the loss without it alone), naee_low, naee_high (95 %, documents drawn anew), dropped
            (bool), order (greedy: 1 went first; NaN otherwise); (layer): loss, sets (tried); (layer, control):
            random_loss. Losses are |y' - y| / |y| (Frobenius) of the block's output y, shared experts included, over
            all tokens.

    Raises:
        MoescopeError: too many experts to drop, no tokenizer, an unknown layer.
        RefusedError: a block that cannot be run by itself, or whose experts cannot be removed.
    """
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    if search not in ("auto", "exact", "greedy", "sampled"):
        raise MoescopeError('`search` is "auto", "exact", "greedy" or "sampled".')
    sites = chosen_sites(model, layers)
    for site in sites:
        k = model.semantics[site.key].top_k
        if not 1 <= drop <= site.n_experts - k:
            raise MoescopeError(
                f"{site.key} selects {k} of {site.n_experts} experts: 1 to {site.n_experts - k} can go."
            )
    calls = _calls(model, corpus, sites, tokens, max_length)
    rng = np.random.default_rng(seed)
    found = []
    for place, site in enumerate(sites):
        block = _Block(model, site, calls[site.key])
        block.require_itself()
        found.append(_of_layer(block, site.n_experts, drop, search, most, controls, rng))
        if on_progress is not None:
            on_progress(place + 1)
    axis = axis_of(model, sites)
    cell = ("layer", "expert")
    variables: dict[str, Any] = {
        name: (cell, axis.pad([part[name] for part in found])) for name in ("naee", "naee_low", "naee_high", "order")
    }
    gone = axis.pad([part["dropped"].astype(float) for part in found])
    return xr.Dataset(
        variables
        | {name: ("layer", [part[name] for part in found]) for name in ("loss", "sets")}
        | {
            "dropped": (cell, gone == 1),
            "random_loss": (("layer", "control"), np.stack([part["random_loss"] for part in found])),
            "exists": (cell, axis.exists),
        },
        coords=axis.coordinates() | {"control": np.arange(controls)},
        attrs={
            "analysis": "naee", "model": model.name, "config_hash": model.config_hash,
            "corpus": corpus.name.rpartition("/")[2], "drop": drop, "seed": seed,
            "search": ", ".join(dict.fromkeys(str(part["search"]) for part in found)), "most": most,
            "tokens": sum(len(call.rows) for call in calls[sites[0].key]), "padding": PADDING,
            "control": "sets of as many experts drawn at random, removed in the same way",
            "table": "layer, expert", "table_order": "naee",
        },
    )  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """One call of a block: what it was given and gave back, its real rows, and the document of each."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    rows: torch.Tensor
    document: torch.Tensor


def _calls(model: Model, corpus: Corpus, sites: list[Site], tokens: int, max_length: int) -> dict[str, list[_Call]]:
    """What each block was given over the first `tokens` tokens."""
    corpus.census()
    seen: dict[str, list[_Call]] = {site.key: [] for site in sites}
    now: dict[str, tuple[Any, Any, Any]] = {}

    def watch(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            copied = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in args)
            named = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
            now[key] = copied, named, first.clone()

        return hook

    size = 1 if model.own_batch is not None else min(BATCH_TOKENS, tokens)
    undo = [model.hf.get_submodule(s.block).register_forward_hook(watch(s.key), with_kwargs=True).remove for s in sites]
    held = 0
    place: dict[int, int] = {}  # of each document: a long one has several contexts, and they are one unit
    try:
        for batch in batches(corpus, model.tokenizer, max_length=max_length, batch_tokens=size):
            ids, mask = (torch.from_numpy(array).to(model.device) for array in batch.padded(model.pad_id))
            with torch.no_grad():
                model.forward(ids, mask, head=False)
            rows = mask.flatten().nonzero().squeeze(-1)
            own = [place.setdefault(context.document.number, len(place)) for context in batch.sequences]
            number = torch.tensor(own, device=ids.device).unsqueeze(-1).expand_as(ids).flatten()[rows]
            for site in sites:
                if site.key not in now:
                    raise RefusedError(f"{site.block} did not run in this forward pass.")
                args, kwargs, output = now.pop(site.key)
                flat = output.reshape(-1, output.shape[-1])
                if len(flat) != ids.numel():
                    raise RefusedError(f"{site.block} gives {len(flat)} rows for {ids.numel()} positions.")
                seen[site.key].append(_Call(args, kwargs, flat[rows], rows, number))
            held += len(rows)
            if held >= tokens:
                break
    finally:
        for remove in undo:
            remove()
    if not held:
        raise MoescopeError("No token to calibrate on: the corpus is empty.")
    return seen


class _Block:
    """One layer's block on its recorded calls, with sets of experts removed."""

    def __init__(self, model: Model, site: Site, calls: list[_Call]) -> None:
        self._model, self._site, self._calls = model, site, calls
        self._module = model.hf.get_submodule(site.block)
        self.documents = 1 + max(int(call.document.max()) for call in calls)
        self.size = self._by_document(call.output for call in calls)

    def require_itself(self) -> None:
        """Run again with nothing removed, the block must give what it gave."""
        error = math.sqrt(self._moved(()).sum() / self.size.sum())
        if not error <= SAME:
            raise RefusedError(f"{self._site.block} run by itself is {error:.2g} (relative) from what it gave inside.")

    def without(self, experts: tuple[int, ...]) -> np.ndarray:
        """[document] squared movement of the output without these experts."""
        with Live(self._model, {self._site.key: [Act("remove", experts)]}, check=False):
            return self._moved(experts)

    def _moved(self, experts: tuple[int, ...]) -> np.ndarray:
        apart = []
        for call in self._calls:
            with torch.no_grad():
                output = self._module(*call.args, **call.kwargs)
            first = output[0] if isinstance(output, tuple) else output
            apart.append(first.reshape(-1, first.shape[-1])[call.rows] - call.output)
        return self._by_document(apart)

    def _by_document(self, parts: Any) -> np.ndarray:
        total = np.zeros(self.documents)
        for call, part in zip(self._calls, parts, strict=True):
            squares = part.double().square().sum(-1).cpu().numpy()
            total += np.bincount(call.document.cpu().numpy(), weights=squares, minlength=self.documents)
        return total


def _of_layer(
    block: _Block, n: int, drop: int, search: Search, most: int, controls: int, rng: np.random.Generator
) -> dict[str, Any]:
    tried: dict[tuple[int, ...], np.ndarray] = {}

    def moved(experts: Sequence[int]) -> np.ndarray:
        key = tuple(sorted(experts))
        if key not in tried:
            tried[key] = block.without(key)
        return tried[key]

    exact = search == "exact" or (search == "auto" and math.comb(n, drop) <= most)
    order = np.full(n, np.nan)
    if exact or search == "sampled":
        wanted = itertools.combinations(range(n), drop) if exact else _some(n, drop, most, rng)
        sets = [tuple(experts) for experts in wanted]
        best = min(sets, key=lambda experts: float(moved(experts).sum()))
        scored = {e: [experts for experts in sets if e in experts] for e in range(n)}
    else:
        best = ()
        for step in range(drop):
            rest = [e for e in range(n) if e not in best]
            gone = min(rest, key=lambda e: float(moved((*best, e)).sum()))
            order[gone], best = step + 1, (*best, gone)
        scored = {e: [(e,)] for e in range(n)}
    n_tried = len(tried)
    times = rng.multinomial(block.documents, np.full(block.documents, 1 / block.documents), DRAWS).astype(float)
    naee, low, high = (np.full(n, np.nan) for _ in range(3))
    for expert, sets in scored.items():
        if not sets:
            continue
        squares = np.stack([moved(experts) for experts in sets], axis=-1)
        naee[expert] = np.sqrt(squares.sum(0) / block.size.sum()).mean()
        if block.documents > 1:
            drawn = mean_present(np.sqrt((times @ squares) / (times @ block.size)[:, None]))
            low[expert], high[expert] = np.quantile(drawn, [0.025, 0.975])
    loss = math.sqrt(moved(best).sum() / block.size.sum())
    random = [moved(rng.choice(n, drop, replace=False).tolist()) for _ in range(controls)]
    random_loss = np.array([math.sqrt(part.sum() / block.size.sum()) for part in random])
    return {
        "naee": naee, "naee_low": low, "naee_high": high, "order": order, "loss": loss, "sets": n_tried,
        "dropped": np.isin(np.arange(n), best), "random_loss": random_loss,
        "search": "exact" if exact else "sampled" if search == "sampled" else "greedy",
    }  # fmt: skip


def _some(n: int, drop: int, most: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    drawn = {tuple(sorted(rng.choice(n, drop, replace=False).tolist())) for _ in range(most)}
    return sorted(drawn)

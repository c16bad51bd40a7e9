"""Which experts to train: those that a forget set is attributed to, those named, or random ones as a control."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from moescope.analysis import attribution
from moescope.capturing import Corpus, capture
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.sites import Site
from moescope.store.selection import SCORES
from moescope.unlearning.examples import Example, tokens_of

if TYPE_CHECKING:
    from moescope.hooks import Model

FORGET, RETAIN = "forget", "retain"
TOKENS = 100_000  # METHODS 10: the attribution is read on at least as many, or on all there are
Named = tuple[int | str, int]


def attribute(
    model: Model,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    *,
    max_length: int = 512,
    resamples: int = 1000,
    permutations: int = 1000,
    tokens: int = TOKENS,
    seed: int = 0,
) -> xr.Dataset:
    """`analysis.attribution` of a forget set over live routing, with the retain set as the other texts.

    Both sets are captured into a store that is thrown away: ids and weights, and logits where they give the scores.
    Of a set that has more than `tokens` tokens, texts are drawn until they have as many; the result says how many.
    """
    limit = min(max_length, model.max_positions or max_length)
    sets = ((FORGET, forget, 11), (RETAIN, retain, 12))
    rows = [
        {"text": example.text, "set": name}
        for name, some, stream in sets
        for example in _enough(model, some, limit, tokens, np.random.default_rng([seed, stream]))
    ]
    scored = all(found.score_function in SCORES for found in model.semantics.values())
    with tempfile.TemporaryDirectory() as folder:
        tiers = ["routing", "logits"] if scored else ["routing"]
        store = capture(model, Corpus(rows, ["set"]), Path(folder) / "store", tiers, max_length=limit)
        return attribution(store, by="set", label=FORGET, resamples=resamples, permutations=permutations, seed=seed)


def _enough(
    model: Model, examples: Sequence[Example], limit: int, tokens: int, rng: np.random.Generator
) -> list[Example]:
    """All texts, or where they have more tokens than that, as many drawn ones as have so many; in their own order."""
    sizes = np.array([len(tokens_of(model, example, limit).ids) for example in examples])
    if sizes.sum() <= tokens:
        return list(examples)
    order = rng.permutation(len(examples))
    n = int(np.searchsorted(np.cumsum(sizes[order]), tokens)) + 1
    return [examples[place] for place in np.sort(order[:n])]


def best_targets(result: xr.Dataset, model: Model, top: int = 1) -> list[tuple[Site, int]]:
    """The `top` experts of the whole model by attribution, the largest first.

    Raises:
        MoescopeError: it asks for more experts than there are, or the result is of another model.
    """
    rank = result["rank"].values
    n = int(np.isfinite(rank).sum())
    if not 1 <= top <= n:
        raise MoescopeError(f"top is between 1 and the {n} experts of the model, not {top}.")
    found = []
    for place in range(1, top + 1):
        row, expert = np.argwhere(rank == place)[0]
        found.append((str(result["site"].values[row]), int(expert)))
    return named_targets(model, found)


def named_targets(model: Model, targets: Sequence[Named]) -> list[tuple[Site, int]]:
    """Targets by layer (or site key) and expert.

    Raises:
        MoescopeError: none given, a target that is not in the model, or the same twice.
    """
    if not targets:
        raise MoescopeError("Name a target as (layer, expert), or leave it to the attribution.")
    found = []
    for layer, expert in targets:
        sites = [site for site in model.sites if layer in (site.layer, site.key)]
        if len(sites) != 1:
            known = ", ".join(site.key for site in sites or model.sites)
            why = "has several routers; name one" if sites else "is no MoE layer of this model; there are"
            raise MoescopeError(f"The target's layer {layer} {why}: {known}.")
        if not 0 <= expert < sites[0].n_experts:
            raise MoescopeError(
                f"The target's expert {expert} is not in layer {layer}; its experts are 0 to {sites[0].n_experts - 1}."
            )
        if (sites[0], expert) in found:
            raise MoescopeError(f"Layer {layer}, expert {expert} is named twice.")
        found.append((sites[0], expert))
    hashed = [site.key for site, _ in found if model.semantics[site.key].hashed]
    if hashed:
        raise RefusedError(f"{hashed[0]} chooses its experts by a table of token ids: it has no router to anchor.")
    return found


def random_targets(
    model: Model, targets: Sequence[tuple[Site, int]], seed: int, *, anywhere: bool = False
) -> list[tuple[Site, int]]:
    """As many random experts that are none of the targets: of the same layers, or of any."""
    rng = np.random.default_rng([seed, 10])
    own = {(site.key, expert) for site, expert in targets}
    found: list[tuple[Site, int]] = []
    for site, _ in targets:
        sites = model.sites if anywhere else [site]
        rest = [
            (other, expert)
            for other in sites
            for expert in range(other.n_experts - other.zero_experts)
            if (other.key, expert) not in own and (other, expert) not in found
        ]
        if not rest:
            raise MoescopeError(f"Layer {site.layer} has no other expert to stand for a random one.")
        found.append(rest[int(rng.integers(len(rest)))])
    return found

"""A store from activations that TransformerLens has already cached: what was run once need not be run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moescope.capturing.assemble import Arrays, TokenTexts, assemble
from moescope.capturing.batches import Sequence as Context
from moescope.capturing.batches import TextBatch
from moescope.capturing.corpus import Corpus, Document
from moescope.capturing.run import manifest_of, require_new, want
from moescope.errors import MoescopeError
from moescope.hooks.facts import Facts
from moescope.hooks.readings import HostCopy, Reading
from moescope.hooks.taps import Tap
from moescope.store import Store
from moescope.store.writer import SHARD_TOKENS, StoreWriter

if TYPE_CHECKING:
    from moescope.hooks.transformer_lens import BridgedModel, Points

TIERS = ("routing", "logits")


@dataclass(frozen=True)
class CachedRun:
    """One call of ``bridge.run_with_cache``.

    Attributes:
        tokens: what was run, [B, S] or [S] int64.
        cache: what it cached, hook point name -> tensor; at least `moescope.hooks.transformer_lens.names(model)`.
        mask: [B, S], 0 where a token is padding; None where none is.
        labels: label -> value of each of the B rows; none by default.
    """

    tokens: torch.Tensor
    cache: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None
    labels: Sequence[Mapping[str, str]] = field(default_factory=tuple)

    @property
    def real(self) -> torch.Tensor:
        """[B, S] bool: the tokens that are no padding."""
        tokens = torch.atleast_2d(self.tokens)
        return torch.ones_like(tokens, dtype=torch.bool) if self.mask is None else torch.atleast_2d(self.mask) != 0


def capture_cache(
    model: BridgedModel,
    runs: Iterable[CachedRun],
    out: str | Path,
    tiers: Sequence[str] = TIERS,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Store:
    """Turn cached runs of a TransformerBridge into a store, without running the model again on their tokens.

    Each row of each run is one document, whose text is what its tokens decode to. The routing is the one that a capture
    of the same batches would store.

    ```python
    model = tl.wrap(bridge)
    _, cache = bridge.run_with_cache(tokens, names_filter=tl.names(model))
    store = ms.capture_cache(model, [ms.CachedRun(tokens, cache)], "runs/cached")
    ```

    Args:
        model: from `moescope.hooks.transformer_lens.wrap`.
        runs: the runs, each with its cache.
        out: folder of the new store.
        tiers: "routing" and, to keep all router logits, "logits"; a cache holds no more.
        shard_tokens: tokens after which a shard is closed.

    Raises:
        RefusedError: a layer's hook points do not say what was computed, so that no cache can.
        MoescopeError: a cache lacks a hook point or does not fit its tokens; nothing is written then.
    """
    from moescope.hooks.transformer_lens import proven_points

    runs, points = list(runs), proven_points(model)
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown or "routing" not in tiers:
        raise MoescopeError(f"A cache gives the tiers {', '.join(TIERS)}, the first of them always; not {tiers!r}.")
    if model.tokenizer is None:
        raise MoescopeError("This bridge has no tokenizer, so its tokens have no text; pass one to wrap.")
    if not runs:
        raise MoescopeError("There are no cached runs to make a store of.")
    for number, run in enumerate(runs):
        _require_fitting(model, points, number, run)
    corpus = _corpus(model, runs)
    documents = list(corpus)
    if len(documents) != sum(len(run.real) for run in runs):
        raise MoescopeError("A row of these runs decodes to no text, so it cannot be a document; leave it out.")
    require_new(Path(out), resume=False)
    manifest = manifest_of(
        model,
        corpus,
        corpus.census(),
        tiers=list(tiers),
        loss=False,
        max_length=max(run.real.shape[1] for run in runs),
        settings={"shard_tokens": shard_tokens, "source": "transformer_lens cache"},
        chosen=None,
    )
    texts, remaining = TokenTexts(model.tokenizer), iter(documents)
    with StoreWriter.create(out, manifest) as writer:
        for run in runs:
            batch = _batch(run, remaining)
            writer.append(assemble(model, batch, _arrays(model, points, run, tiers), texts))
    return Store.open(out)


def _require_fitting(model: BridgedModel, points: dict[str, Points], number: int, run: CachedRun) -> None:
    """Every cached tensor is there and has one row for each token, with ids that exist."""
    positions = run.tokens.numel()
    if run.real.numel() != positions or not run.real.any(1).all():
        raise MoescopeError(f"Run {number}: the mask must have the tokens' shape and leave a token in every row.")
    if run.labels and len(run.labels) != len(run.real):
        raise MoescopeError(f"Run {number} has {len(run.real)} rows but labels for {len(run.labels)}.")
    for site in model.sites:
        widths = {"logits": site.n_experts, "ids": model.semantics[site.key].top_k, "weights": site.n_experts}
        for kind, name in vars(points[site.key]).items():
            if name not in run.cache:
                raise MoescopeError(
                    f"Run {number}: the cache has no {name}; cache with names_filter=transformer_lens.names(model)."
                )
            if run.cache[name].numel() != positions * widths[kind]:
                raise MoescopeError(
                    f"Run {number}: {name} has the shape {tuple(run.cache[name].shape)}, which is not {widths[kind]} "
                    f"values for each of {positions} tokens."
                )
        ids = run.cache[str(points[site.key].ids)]
        if bool(((ids < 0) | (ids >= site.n_experts)).any()):
            raise MoescopeError(f"Run {number}: {points[site.key].ids} names experts beyond 0..{site.n_experts - 1}.")


def _corpus(model: BridgedModel, runs: list[CachedRun]) -> Corpus:
    labels = sorted({name for run in runs for row in run.labels for name in row})
    rows = []
    for run in runs:
        for place, (tokens, real) in enumerate(zip(torch.atleast_2d(run.tokens), run.real, strict=True)):
            given = run.labels[place] if run.labels else {}
            text = model.tokenizer.decode(tokens[real].tolist())
            rows.append({"text": text} | {name: given.get(name) for name in labels})
    return Corpus(rows, labels)


def _batch(run: CachedRun, documents: Iterator[Document]) -> TextBatch:
    contexts = []
    for tokens, real in zip(torch.atleast_2d(run.tokens), run.real, strict=True):
        document, ids = next(documents), tokens[real].cpu().numpy().astype(np.int64)
        nowhere = np.full(len(ids), -1, np.int32)
        contexts.append(Context(document.number, document, True, len(ids), ids, nowhere, nowhere))
    return TextBatch(contexts)


def _arrays(model: BridgedModel, points: dict[str, Points], run: CachedRun, tiers: Sequence[str]) -> Arrays:
    """What the taps would have read in that run."""
    tap = Tap(model.hf, model.sites, model.semantics, want(tiers))
    tap.begin(run.real.numel(), run.real.flatten().nonzero().flatten())
    sites = {}
    for site in model.sites:
        logits, ids, spread = (run.cache[str(name)].cpu() for name in vars(points[site.key]).values())
        ids = ids.reshape(run.real.numel(), -1)
        weights = spread.reshape(len(ids), -1).gather(-1, ids)
        facts = Facts(hidden=weights, ids=ids, weights=weights, output=logits.reshape(len(ids), -1))
        sites[site.key] = tap.read(site, facts)
    return HostCopy(Reading(sites, {})).arrays()

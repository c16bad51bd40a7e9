"""The causal effect of every expert on the loss: each masked (or zeroed) alone, several to a batch, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import xarray as xr

from moescope.analysis.labelled import LayerAxis
from moescope.capturing.batches import Sequence as Context
from moescope.capturing.batches import sequences
from moescope.capturing.corpus import Corpus
from moescope.capturing.run import token_losses
from moescope.effects.keeping import opened, write_part
from moescope.effects.losses import MAX_LENGTH
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.interventions import Act, Live, Where
from moescope.hooks.sites import Site

ROWS = 16  # experts in one batch
DRAWS = 1000
KEPT_TOGETHER = 16  # documents in one part on disk
Kind = Literal["mask", "zero"]


@dataclass(frozen=True)
class _Trial:
    site: Site
    expert: int


def expert_effects(
    model: Model,
    corpus: Corpus,
    *,
    by: str | None = None,
    kind: Kind = "mask",
    layers: Sequence[int] | None = None,
    max_length: int = MAX_LENGTH,
    rows: int = ROWS,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """What each expert is worth: how much the loss rises when it alone is silenced.

    How to read it: `effect` is the rise of the loss in nats per token of a label when the expert is masked (others take
    its place) or zeroed (nothing does). Trust it where the interval (`low`, `high`) does not hold 0; `of_layer` is the
    median over the experts of its layer, to hold it against: most experts have a small effect because tokens are routed
    round them. One model run per expert and text: for large models, choose layers.

    Args:
        model: a model with a tokenizer.
        corpus: texts, with labels if `by` is given.
        by: a label; without one, all documents together.
        kind: "mask" or "zero".
        layers: model layer indices; all MoE layers if None.
        max_length: tokens of a text that are used; the rest is left out.
        rows: experts in one forward pass.
        seed: of the intervals.
        out: a folder that keeps what is done, so that a killed run goes on where it was; must be of the same question.
        on_progress: called with the number of documents done.

    Returns:
        Dataset with dims (layer, expert, label): effect, low, high (95 %, documents drawn anew); (layer, label):
        of_layer; (label): plain (loss, nats per token), tokens, documents.

    Raises:
        MoescopeError: no tokenizer, an unknown layer or label, or a folder of another question.
        RefusedError: the family's blocks cannot be edited by row.
    """
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    if model.own_batch is not None:
        raise RefusedError(f"Texts of this model cannot share a batch: {model.own_batch}.")
    sites = _sites(model, layers)
    trials = [_Trial(site, expert) for site in sites for expert in range(site.n_experts)]
    with Live(model, {site.key: [_act(kind, 0, 0)] for site in sites}):
        pass  # refused here, before anything is run
    census = corpus.census()
    question = {
        "model": model.weights_fingerprint, "edits": list(model.edits), "corpus": census.hash, "kind": kind,
        "max_length": max_length, "sites": [site.key for site in sites], "rows": rows,
    }  # fmt: skip
    kept = _Kept(None if out is None else Path(out), question, len(trials))
    for context in sequences(corpus, model.tokenizer, max_length):
        if not context.first or len(context) < 2 or context.document.number in kept.done:
            continue
        kept.add(context, _of_text(model, context, trials, kind, rows))
        if on_progress is not None:
            on_progress(len(kept.done))
    kept.flush()
    labels = {document.number: document.labels.get(by) for document in corpus} if by else {}
    return _dataset(model, corpus, sites, kept, labels, by, kind, seed)


def _sites(model: Model, layers: Sequence[int] | None) -> list[Site]:
    if layers is None:
        return model.sites
    missing = sorted(set(layers) - {site.layer for site in model.sites})
    if missing:
        known = ", ".join(str(site.layer) for site in model.sites)
        raise MoescopeError(f"The model has no MoE layer {missing[0]}; it has {known}.")
    return [site for site in model.sites if site.layer in set(layers)]


def _act(kind: Kind, expert: int, row: int) -> Act:
    return Act(kind, (expert,), where=Where(batch=(row,)))


def _of_text(model: Model, context: Context, trials: list[_Trial], kind: Kind, rows: int) -> np.ndarray:
    """[1 + trial] summed loss of one text: as it is, then with each trial's expert silenced."""
    ids = torch.from_numpy(context.ids).to(model.device).unsqueeze(0)
    sums = [_loss(model, ids)]
    for start in range(0, len(trials), rows):
        some = trials[start : start + rows]
        acts: dict[str, list[Act]] = {}
        for row, trial in enumerate(some):
            acts.setdefault(trial.site.key, []).append(_act(kind, trial.expert, row))
        with Live(model, acts, check=False):
            sums.append(_loss(model, ids.expand(len(some), -1)))
    return np.concatenate(sums)


def _loss(model: Model, ids: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        losses = token_losses(model.forward(ids, torch.ones_like(ids)), ids)
    return losses[:, 1:].double().sum(-1).cpu().numpy()


class _Kept:
    """Losses by document, in memory and, if there is a folder, in Parquet parts that survive a kill."""

    def __init__(self, folder: Path | None, question: dict[str, Any], trials: int) -> None:
        self.done: dict[int, tuple[int, np.ndarray]] = {}
        self._folder, self._fresh = folder, []
        if folder is None:
            return
        opened(folder, question)
        for part in sorted(folder.glob("part-*.parquet")):
            table = pq.read_table(part)
            for number, tokens, nats in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                if len(nats) == 1 + trials:
                    self.done[number] = tokens, np.array(nats)

    def add(self, context: Context, nats: np.ndarray) -> None:
        number = context.document.number
        self.done[number] = len(context) - 1, nats
        self._fresh.append(number)
        if len(self._fresh) >= KEPT_TOGETHER:
            self.flush()

    def flush(self) -> None:
        if self._folder is None or not self._fresh:
            return
        write_part(
            self._folder / f"part-{self._fresh[0]:08d}.parquet",
            {
                "document": self._fresh,
                "tokens": [self.done[number][0] for number in self._fresh],
                "nats": [self.done[number][1].tolist() for number in self._fresh],
            },
        )
        self._fresh = []

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.done))


def _dataset(
    model: Model,
    corpus: Corpus,
    sites: list[Site],
    kept: _Kept,
    labels: dict[int, str | None],
    by: str | None,
    kind: Kind,
    seed: int,
) -> xr.Dataset:
    numbers = [number for number in kept if not by or labels.get(number) is not None]
    if not numbers:
        raise MoescopeError(f"No document of two tokens or more carries the label {by!r}." if by else "No text to run.")
    names = sorted({str(labels[number]) for number in numbers}) if by else ["all"]
    code = np.array([names.index(str(labels[number])) if by else 0 for number in numbers])
    tokens = np.array([kept.done[number][0] for number in numbers])
    nats = np.stack([kept.done[number][1] for number in numbers])
    rise = nats[:, 1:] - nats[:, :1]
    rng = np.random.default_rng(seed)
    shape = (rise.shape[1], len(names))
    effect, low, high = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for label in range(len(names)):
        here = np.flatnonzero(code == label)
        effect[:, label] = rise[here].sum(0) / tokens[here].sum()
        if len(here) > 1:
            times = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), DRAWS)
            drawn = (times @ rise[here]) / (times @ tokens[here])[:, None]
            low[:, label], high[:, label] = np.quantile(drawn, [0.025, 0.975], axis=0)
    axis = LayerAxis(
        layers=np.array([site.layer for site in sites]),
        sites=tuple(site.key for site in sites),
        n_experts=np.array([site.n_experts for site in sites]),
        top_k=np.array([float(model.semantics[site.key].top_k) for site in sites]),
    )
    edges = np.cumsum([site.n_experts for site in sites])[:-1]
    cell = ("layer", "expert", "label")
    padded = {name: axis.pad(np.split(values, edges)) for name, values in (
        ("effect", effect), ("low", low), ("high", high))}  # fmt: skip
    return xr.Dataset(
        {name: (cell, values) for name, values in padded.items()}
        | {
            "of_layer": (("layer", "label"), np.nanmedian(padded["effect"], axis=1)),
            "plain": ("label", [nats[code == n, 0].sum() / tokens[code == n].sum() for n in range(len(names))]),
            "tokens": ("label", [int(tokens[code == n].sum()) for n in range(len(names))]),
            "documents": ("label", np.bincount(code, minlength=len(names))),
            "exists": (("layer", "expert"), axis.exists),
        },
        coords=axis.coordinates() | {"label": names},
        attrs={
            "analysis": "expert_effects", "model": model.name, "config_hash": model.config_hash, "kind": kind,
            "corpus": corpus.name.rpartition("/")[2], "by": by or "none", "seed": seed,
            "interval": "95 %, documents drawn anew", "table": "layer, expert, label", "table_order": "effect",
        },
    )  # fmt: skip

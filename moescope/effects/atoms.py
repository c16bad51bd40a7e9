"""HEAPr: how much the loss bends when a neuron of an expert is taken out, from one backward pass (METHODS 6).

Source: HEAPr (arXiv 2509.22299). An expert's output is a sum over its neurons, `f_e(x) = sum_k x_k w_k`, with `x_k`
what enters the down projection and `w_k` its k-th column. With `g = dL/df_e`, taking neuron k out costs to second order
(the Hessian replaced by the Fisher matrix `M_e = mean g g^T`) half of `S_k = mean x_k^2 * (w_k^T M_e w_k)`. Since
`w_k^T M_e w_k` is the mean of `(g . w_k)^2`, no matrix of D x D is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from moescope.analysis.labelled import PADDING, LayerAxis
from moescope.analysis.rank_agreement import across_halves
from moescope.capturing.batches import TextBatch, batches
from moescope.capturing.corpus import Corpus
from moescope.effects.losses import MAX_LENGTH
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.sites import Site
from moescope.hooks.taps import Tap, Want
from moescope.hooks.weights import expert_weights

BATCH_TOKENS = 1024  # the graph of a whole forward pass, and every neuron of every slot, are held
GROUPS = 16  # of documents, the unit of the intervals: document i belongs to group i mod 16
FEWEST = 6  # groups below which there is no interval
DRAWS = 1000
DOWN_BYTES = 4e9  # of down projections held at once, in float32; more takes another pass over the corpus


def heapr(
    model: Model,
    corpus: Corpus,
    *,
    layers: Sequence[int] | None = None,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """HEAPr's importance of every neuron and, as their sum, of every expert.

    How to read it: a neuron with a small `of_neuron` score can go without bending the loss; an expert's `heapr` is the
    sum over its neurons. It is a mean over the tokens that selected the expert: an expert that few tokens select is not
    less important for that; `heapr_total` counts them, as the loss does. `split_half` says how far two halves of the
    texts order the experts of a layer alike.

    Args:
        model: a model with a tokenizer, whose experts are called with ids and weights (67 of 72 families).
        corpus: calibration texts; the paper takes 128 of 2048 tokens.
        layers: model layer indices; all MoE layers if None.
        max_length: tokens of context.
        batch_tokens: padded tokens of one backward pass.
        seed: of the intervals.
        on_progress: called with the tokens done.

    Returns:
        Dataset with dims (layer, expert): heapr, heapr_low, heapr_high (95 %, 16 groups of documents drawn anew; NaN
        with fewer than 6 groups that selected it), tokens (that selected it); (layer, expert, neuron): of_neuron = S_k;
        (layer): split_half (Spearman of heapr on even and odd groups). Scores are in squared nats, the loss being each
        text's summed over its tokens. NaN where no token selected the expert.

    Raises:
        MoescopeError: no tokenizer, an unknown layer, a bad corpus.
        RefusedError: experts whose down projections cannot be read with proof, or that a norm follows; gradients that
            do not reach the experts.
    """
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    sites = chosen_sites(model, layers)
    for site in sites:
        if site.reader != "call":
            raise RefusedError(
                f"{site.experts} is not called once with ids and weights, so that the gradient of one expert's output "
                "cannot be told from its block's; HEAPr is not computed there."
            )
    corpus.census()
    if model.own_batch is not None:
        batch_tokens = 1
    sums: dict[str, _Sums] = {}
    done = 0
    for part in _fitting(model, sites):
        downs = {site.key: _down(model, site) for site in part}
        sums |= {site.key: _Sums(down) for site, down in zip(part, downs.values(), strict=True)}
        for batch in batches(corpus, model.tokenizer, max_length=max_length, batch_tokens=batch_tokens):
            if max(map(len, batch.sequences)) < 2:
                continue
            _of_batch(model, part, batch, sums)
            done += batch.n_tokens
            if on_progress is not None:
                on_progress(done)
        for site in part:
            sums[site.key].down = None
    return _dataset(model, corpus, sites, [sums[site.key] for site in sites], seed)


def chosen_sites(model: Model, layers: Sequence[int] | None) -> list[Site]:
    """The sites of these layers; all of them for None.

    Raises:
        MoescopeError: no such layer.
    """
    if layers is None:
        return model.sites
    missing = sorted(set(layers) - {site.layer for site in model.sites})
    if missing:
        known = ", ".join(str(site.layer) for site in model.sites)
        raise MoescopeError(f"The model has no MoE layer {missing[0]}; it has {known}.")
    return [site for site in model.sites if site.layer in set(layers)]


def axis_of(model: Model, sites: Sequence[Site]) -> LayerAxis:
    """The layer axis of a result about these sites."""
    return LayerAxis(
        layers=np.array([site.layer for site in sites]),
        sites=tuple(site.key for site in sites),
        n_experts=np.array([site.n_experts for site in sites]),
        top_k=np.array([float(model.semantics[site.key].top_k) for site in sites]),
    )


class _Sums:
    """Of one layer by group of documents: tokens n [G, E], sums of x_k^2 and of (g . w_k)^2 [G, E, I]."""

    def __init__(self, down: torch.Tensor) -> None:
        self.down: torch.Tensor | None = down
        experts, _, neurons = down.shape
        self.n = torch.zeros(GROUPS, experts, dtype=torch.float64)
        self.read = 0  # tokens, whichever expert they went to
        self.x, self.gw = (torch.zeros(GROUPS, experts, neurons, dtype=torch.float64) for _ in range(2))

    def add(self, group: torch.Tensor, ids: torch.Tensor, neurons: torch.Tensor, gradient: torch.Tensor) -> None:
        """Slots [n] by group and expert, their neurons [n, I] and gradients [n, D]."""
        assert self.down is not None
        for expert in ids.unique().tolist():
            mine = ids == expert
            of, x = group[mine].cpu(), neurons[mine]
            along = gradient[mine].to(self.down.dtype) @ self.down[expert]
            self.n[:, expert].index_add_(0, of, torch.ones(len(of), dtype=torch.float64))
            self.x[:, expert].index_add_(0, of, x.double().square().cpu())
            self.gw[:, expert].index_add_(0, of, along.double().square().cpu())

    def scores(self, times: torch.Tensor) -> torch.Tensor:
        """S_k [draw, E, I] with each group counted `times` [draw, G] times; NaN where no token is."""
        n = (times @ self.n).unsqueeze(-1)
        n = torch.where(n > 0, n, torch.nan)
        x, gw = (torch.einsum("dg,gei->dei", times, part) for part in (self.x, self.gw))
        return x / n * (gw / n)


def _fitting(model: Model, sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose down projections fit into memory together."""
    part: list[Site] = []
    held = 0.0
    for site in sites:
        size = 4 * sum(p.numel() for p in model.hf.get_submodule(site.experts).parameters()) / 3
        if part and held + size > DOWN_BYTES:
            yield part
            part, held = [], 0.0
        part.append(site)
        held += size
    yield part


def _down(model: Model, site: Site) -> torch.Tensor:
    weights = expert_weights(model, site.key)
    if weights.notes and any("norm" in note for note in weights.notes):
        raise RefusedError(f"At {site.experts} {'; '.join(weights.notes)}: its output is not a sum over neurons.")
    dtype = torch.float64 if model.hf.dtype is torch.float64 else torch.float32
    return torch.from_numpy(np.nan_to_num(weights.down)).to(model.device, dtype)


def output_gradients(
    model: Model, sites: Sequence[Site], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """dL/d(routed sum) at each site, [B * S, D] by site key: L is the loss summed over all predicted real tokens.

    Raises:
        RefusedError: a site's gradient is not there, or not one row for each position.
    """
    leaves: dict[str, torch.Tensor] = {}

    def lifted(key: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            # A zero that the loss depends on as it does on the output: its gradient is the output's.
            leaves[key] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[key]

        return hook

    undo = [model.hf.get_submodule(s.experts).register_forward_hook(lifted(s.key)).remove for s in sites]
    try:
        with torch.enable_grad():
            logits = model.forward(ids, mask)
            if logits.dtype is not torch.float64:
                logits = logits.float()
            target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"
            )
            silent = [site.experts for site in sites if site.key not in leaves]
            if silent:
                raise RefusedError(f"{silent[0]} did not run in this forward pass.")
            found = torch.autograd.grad(loss, [leaves[site.key] for site in sites], allow_unused=True)
    finally:
        for remove in undo:
            remove()
    gradients = {}
    for site, gradient in zip(sites, found, strict=True):
        if gradient is None or gradient.numel() // gradient.shape[-1] != ids.numel():
            raise RefusedError(f"The gradient of the loss does not reach {site.experts} as one row for each token.")
        gradients[site.key] = gradient.reshape(-1, gradient.shape[-1])
    return gradients


def _of_batch(model: Model, sites: list[Site], batch: TextBatch, sums: dict[str, _Sums]) -> None:
    ids, mask = (torch.from_numpy(array).to(model.device) for array in batch.padded(model.pad_id))
    rows = mask.flatten().nonzero().squeeze(-1)
    numbers = torch.tensor([sequence.document.number % GROUPS for sequence in batch.sequences], device=ids.device)
    group = numbers.unsqueeze(-1).expand_as(ids).flatten()[rows]
    want = Want(neurons=frozenset(site.key for site in sites))
    with torch.no_grad(), Tap(model.hf, sites, model.semantics, want) as tap:
        tap.begin(ids.numel(), None if len(rows) == ids.numel() else rows)
        model.forward(ids, mask)
        readings = tap.take().sites
    gradients = output_gradients(model, sites, ids, mask)
    for site in sites:
        reading = readings[site.key]
        assert reading.neurons is not None
        there = torch.ones_like(reading.expert, dtype=torch.bool) if reading.valid is None else reading.valid
        there = there & ~reading.neurons.isnan().all(-1)  # identities have no neurons
        token, slot = there.nonzero(as_tuple=True)
        weight = reading.weight[token, slot].unsqueeze(-1)
        gradient = gradients[site.key][rows][token]
        sums[site.key].read += len(rows)
        sums[site.key].add(
            group[token],
            reading.expert[token, slot],
            reading.neurons[token, slot],
            weight.to(gradient.dtype) * gradient,
        )


def _dataset(model: Model, corpus: Corpus, sites: list[Site], sums: list[_Sums], seed: int) -> xr.Dataset:
    axis = axis_of(model, sites)
    rng = np.random.default_rng(seed)
    groups = int(max((part.n.sum(1) > 0).sum() for part in sums))
    if not groups:
        raise MoescopeError("No text of two tokens or more to take gradients of.")
    times = torch.from_numpy(rng.multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), DRAWS).astype(np.float64))
    once = torch.ones(1, GROUPS, dtype=torch.float64)
    even = (torch.arange(GROUPS) % 2 == 0).double()
    widest = max(part.x.shape[-1] for part in sums)
    neuron, score, total, low, high, tokens, halves = [], [], [], [], [], [], []
    for part in sums:
        own = part.scores(once)[0].numpy()
        neuron.append(np.pad(own, ((0, 0), (0, widest - own.shape[1])), constant_values=np.nan))
        score.append(own.sum(-1))
        drawn = np.concatenate([part.scores(some).sum(-1).numpy() for some in times.split(50)])
        enough = ((part.n > 0).sum(0) >= FEWEST).numpy()
        bounds = np.full((2, len(own)), np.nan)
        if enough.any():
            bounds[:, enough] = np.nanquantile(drawn[:, enough], [0.025, 0.975], axis=0)
        low.append(bounds[0])
        high.append(bounds[1])
        tokens.append(part.n.sum(0).numpy())
        total.append(np.nan_to_num(score[-1]) * tokens[-1] / max(part.read, 1))
        one, other = (part.scores(half.unsqueeze(0)).sum(-1).numpy() for half in (even, 1 - even))
        halves.append(across_halves(one[None, :, None], other[None, :, None])[0, 0, 0])
    cell = ("layer", "expert")
    return xr.Dataset(
        {
            "heapr": (cell, axis.pad(score)),
            "heapr_low": (cell, axis.pad(low)),
            "heapr_high": (cell, axis.pad(high)),
            "heapr_total": (cell, axis.pad(total)),
            "tokens": (cell, axis.pad(tokens)),
            "of_neuron": ((*cell, "neuron"), axis.pad(neuron)),
            "split_half": ("layer", halves),
            "exists": (cell, axis.exists),
        },
        coords=axis.coordinates() | {"neuron": np.arange(widest)},
        attrs={
            "analysis": "heapr", "model": model.name, "config_hash": model.config_hash,
            "corpus": corpus.name.rpartition("/")[2], "seed": seed, "groups": groups, "padding": PADDING,
            "loss": "summed over the tokens of a text, nats; the paper's factor of one half is left out",
            "interval": f"95 %, {GROUPS} interleaved groups of documents drawn anew",
            "undefined": "NaN where no token selected the expert", "table": "layer, expert", "table_order": "heapr",
        },
    )  # fmt: skip

"""Which vectors the activations tier keeps, what they will take, and how they come from a reading to the store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moescope.capturing.batches import TextBatch
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.model import Model
from moescope.hooks.sites import Site
from moescope.hooks.taps import Tap, Want
from moescope.store.activations import KINDS, Kind, Vectors
from moescope.store.manifest import ActivationsRecord

Arrays = Mapping[tuple[str, ...], np.ndarray]
FIELDS = {"outputs": "vectors", "neurons": "neurons", "router_inputs": "router_input"}  # of a site's reading


@dataclass(frozen=True)
class Activations:
    """Vectors to keep.

    Attributes:
        kinds: any of "outputs" (of selected experts, before their weight), "neurons" (what enters their down
            projections) and "router_inputs".
        layers: model layers or site keys; None means all.
        experts: numbers of experts whose vectors are kept; None means all that were selected. A mapping gives each
            layer (or site key) its own, and is itself the choice of layers where ``layers`` is None.
        sample: share of the tokens, drawn by document and position: the same tokens however they are batched.
        seed: of that draw.
        max_bytes: a capture that would keep more is not begun, and one that does is stopped.
    """

    kinds: Collection[str] = ("outputs",)
    layers: Collection[int | str] | None = None
    experts: Collection[int] | Mapping[int | str, Collection[int]] | None = None
    sample: float = 0.01
    seed: int = 0
    max_bytes: int = 1_000_000_000


@dataclass(frozen=True)
class Plan:
    """Checked `Activations` for one model: which sites, and what one chosen token takes."""

    chosen: Activations
    record: ActivationsRecord
    bytes_per_token: float

    def wanting(self, want: Want) -> Want:
        """What the taps must read, these vectors included."""
        sites = frozenset(self.record.sites)
        names = {"outputs": "vectors", "neurons": "neurons", "router_inputs": "router_inputs"}
        return replace(want, **{names[kind]: sites for kind in self.record.kinds})

    def rows(self, batch: TextBatch) -> np.ndarray:
        """Which rows of a batch's real tokens keep their vectors."""
        sequence = np.repeat(np.arange(len(batch.sequences)), [len(s) for s in batch.sequences])
        return self.drawn(batch, sequence, np.concatenate([np.arange(len(s)) for s in batch.sequences]))

    def drawn(self, batch: TextBatch, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which of some tokens [N] keep their vectors, by their sequence in the batch and position in that."""
        document = np.array([s.document.number for s in batch.sequences], np.int64)[sequence]
        number = np.array([s.number for s in batch.sequences], np.int64)[sequence] * (1 << 32) + position
        return np.flatnonzero(_uniform(document, number, self.chosen.seed) < self.chosen.sample)

    def experts(self, site: str) -> list[int] | None:
        """Experts of one site whose vectors are kept; None means all."""
        return self.record.experts[site] if isinstance(self.record.experts, dict) else self.record.experts

    def vectors(self, arrays: Arrays, rows: np.ndarray) -> dict[tuple[str, str], Vectors]:
        """The chosen vectors of one batch, by kind and site."""
        return {
            (kind, site): self._of_site(kind, site, arrays, rows)
            for kind in self.record.kinds
            for site in self.record.sites
        }

    def _of_site(self, kind: str, site: str, arrays: Arrays, rows: np.ndarray) -> Vectors:
        values = arrays[("site", site, FIELDS[kind])]
        dtype: Any = "bfloat16" if values.dtype == np.uint16 else str(values.dtype)
        if kind == "router_inputs":
            nobody = np.full(len(rows), -1)
            return Vectors(rows, nobody, nobody, values, dtype)
        expert = arrays[("site", site, "expert")][rows]
        keep = np.ones(expert.shape, bool)
        if ("site", site, "valid") in arrays:
            keep &= arrays[("site", site, "valid")][rows]
        if (wanted := self.experts(site)) is not None:
            keep &= np.isin(expert, wanted)
        token, slot = np.nonzero(keep)
        return Vectors(rows[token], slot, expert[keep], values[keep], dtype)


def plan(model: Model, chosen: Activations) -> Plan:
    """Check a choice against a model, by one small forward pass under the same taps.

    Raises:
        MoescopeError: an unknown kind, layer or expert, or a share that is none.
        RefusedError: vectors of this kind cannot be seen in this model.
    """
    kinds: list[Kind] = [kind for kind in KINDS if kind in chosen.kinds]
    unknown = [kind for kind in chosen.kinds if kind not in KINDS]
    if unknown or not kinds:
        raise MoescopeError(f"Unknown kind of activations {unknown[:1] or 'none'}; kinds are {', '.join(KINDS)}.")
    if not 0 < chosen.sample <= 1:
        raise MoescopeError(f"The share of tokens must lie in (0, 1], not {chosen.sample}.")
    by_layer = chosen.experts if isinstance(chosen.experts, Mapping) else None
    layers = by_layer if chosen.layers is None else chosen.layers
    sites = [site for site in model.sites if layers is None or site.key in layers or site.layer in layers]
    known = {name for site in model.sites for name in (site.key, site.layer)}
    strange = [layer for layer in (*(layers or ()), *(by_layer or ())) if layer not in known]
    if strange:
        raise MoescopeError(f"No MoE layer {strange[0]!r}; there are {', '.join(site.key for site in model.sites)}.")
    experts = {site.key: _experts(site, chosen.experts) for site in sites}
    for site in sites:
        beyond = [expert for expert in experts[site.key] or () if not 0 <= expert < site.n_experts]
        if beyond:
            raise MoescopeError(f"No expert {beyond[0]} at {site.key}; it has {site.n_experts}.")
    record = ActivationsRecord(
        kinds=kinds,
        sites=[site.key for site in sites],
        experts={key: own or [] for key, own in experts.items()} if by_layer is not None else experts[sites[0].key],
        sample=chosen.sample,
        seed=chosen.seed,
        max_bytes=chosen.max_bytes,
    )
    unpriced = Plan(chosen, record, 0.0)
    return replace(unpriced, bytes_per_token=_price(model, unpriced))


def _experts(site: Site, chosen: Collection[int] | Mapping[int | str, Collection[int]] | None) -> list[int] | None:
    """One site's experts, ascending; None means all."""
    if isinstance(chosen, Mapping):
        return sorted({expert for layer, own in chosen.items() if layer in (site.key, site.layer) for expert in own})
    return None if chosen is None else sorted(chosen)


def _price(model: Model, unpriced: Plan) -> float:
    """Bytes of one chosen token, from the shapes that one small pass shows."""
    batch = model.check_batch()[:1]
    one = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, unpriced.wanting(Want())) as tap:
        tap.begin(batch.numel(), chosen=one)
        model.forward(batch, torch.ones_like(batch), head=False)
        reading = tap.take()
    price = 0.0
    for kind in unpriced.record.kinds:
        for key in unpriced.record.sites:
            vectors = getattr(reading.sites[key], FIELDS[kind])
            if vectors is None:
                raise RefusedError(f"The {kind} of {key} cannot be seen in this model; choose other kinds or layers.")
            share = 1.0
            if kind != "router_inputs" and (wanted := unpriced.experts(key)) is not None:
                share = len(wanted) / next(site.n_experts for site in model.sites if site.key == key)
            price += vectors.numel() * vectors.element_size() * share
    return price


def _uniform(document: np.ndarray, number: np.ndarray, seed: int) -> np.ndarray:
    """One number in [0, 1) for each token, from its document and place alone (splitmix64)."""
    with np.errstate(over="ignore"):
        x = document.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ number.astype(np.uint64)
        x += np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53

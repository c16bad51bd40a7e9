"""What each expert did for each document, in sums: one pass over routing and output norms, from which importance
follows.

All criteria that a store alone gives are ratios of these sums, so that labels, halves of the documents and bootstrap
draws are sums again, never another scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from moescope.analysis.counts import Phase
from moescope.analysis.kernels import kernel
from moescope.analysis.spreading import over_shards
from moescope.errors import StoreError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

SUMS = ("count", "weight", "measured", "weighted_norm", "norm", "squared_norm")
"""Over the filled slots of an expert: how many; w; how many have an output norm; and over those w |f|, |f|, |f|^2."""
ROWS = 65_536
"""Tokens whose documents are summed densely at once."""


@dataclass(frozen=True)
class SlotSums:
    """The sums of one MoE layer by document.

    Attributes:
        document: [n] document numbers, ascending; those with a filled slot.
        table: one sparse [document, expert] matrix (scipy's csr_array) for each of `SUMS`.
    """

    document: Int[np.ndarray, " document"]
    table: dict[str, Any]  # scipy's stubs do not know what its arrays can do

    def of(self, documents: Int[np.ndarray, " chosen"], draws: Float[np.ndarray, "draw chosen"]) -> dict[str, Any]:
        """Sums over documents counted `draws` times each: name -> [draw, expert]."""
        place = np.searchsorted(self.document, documents)
        place = np.minimum(place, max(self.document.size - 1, 0))
        there = np.zeros(documents.size, bool) if not self.document.size else self.document[place] == documents
        spread = np.zeros((draws.shape[0], self.document.size))
        spread[:, place[there]] = draws[:, there]
        return {name: (matrix.T @ spread.T).T for name, matrix in self.table.items()}


def slot_sums(store: Store, site: Any, norms: bool, phase: Phase | None = None) -> SlotSums:
    """Sums of one layer by document and expert, shard by shard in bounded memory; kept in the store's aggregates.

    Args:
        store: an open store.
        site: a site record.
        norms: read the experts tier too; without it the last four of `SUMS` are 0.
        phase: only tokens of this phase; None for all.

    Raises:
        StoreError: a slot names an expert beyond the layer's.
    """

    def compute() -> pa.Table:
        parts = [part for found in over_shards(store, _of_shard, site, norms, phase) for part in found]
        cell = np.concatenate([names for names, _ in parts]) if parts else np.empty(0, np.int64)
        values = np.concatenate([sums for _, sums in parts]) if parts else np.empty((0, len(SUMS)))
        whole, place = np.unique(cell, return_inverse=True)
        columns = [np.bincount(place, weights=column, minlength=whole.size) for column in values.T]
        names = {"document": whole // site.n_experts, "expert": whole % site.n_experts}
        return pa.table(names | dict(zip(SUMS, columns, strict=True)))

    asked = {"site": site.key, "norms": norms, "phase": phase or "all"}
    kept = store.cached(f"slot-sums-{site.key}", compute, asked)
    document, row = np.unique(kept["document"].to_numpy(), return_inverse=True)
    where, shape = (row, kept["expert"].to_numpy()), (document.size, site.n_experts)
    return SlotSums(document, {name: csr_array((kept[name].to_numpy(), where), shape=shape) for name in SUMS})


def _of_shard(shard: Any, site: Any, norms: bool, phase: Phase | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(document x expert cell [n], sums [n, 6]) of each run of rows."""
    tokens = shard.tokens(["document"] if phase is None else ["document", "phase"])
    document = tokens["document"].to_numpy().astype(np.int64)
    if phase is not None:
        same = np.asarray(tokens["phase"].cast(pa.string()).to_numpy(zero_copy_only=False)) == phase
        document = np.where(same, document, -1)
    fields = ["expert", "weight", *(["valid"] if site.slots_can_miss else [])]
    routing = shard.routing(site.key, fields)
    norm = shard.experts(site.key).norm if norms else None
    parts = []
    for start in range(0, shard.n_tokens, ROWS):
        rows = slice(start, start + ROWS)
        names, index = np.unique(document[rows], return_inverse=True)
        if names.size and names[0] < 0:
            names, index = names[1:], index - 1
        total = np.zeros((names.size, site.n_experts, len(SUMS)))
        valid = None if routing.valid is None else routing.valid[rows]
        beyond = sum_slots(
            index, routing.expert[rows], valid, routing.weight[rows], None if norm is None else norm[rows], total
        )
        if beyond:
            raise StoreError(
                f"{beyond} slots of layer {site.layer} name an expert beyond the {site.n_experts} it has: "
                "the store is damaged; run `moescope check` on it."
            )
        row, expert = np.nonzero(total[:, :, 0])
        parts.append((names[row] * site.n_experts + expert, total[row, expert]))
    return parts


@kernel
def sum_slots(group, expert, valid, weight, norm, total):
    """Adds every filled slot to `total[group, expert]`, in the order of `SUMS`.

    Args:
        group: [row] int; the row's group, negative to leave the row out.
        expert: [row, rank] unsigned; selected ids.
        valid: [row, rank] bool, or None when no slot can be missing.
        weight: [row, rank] float32.
        norm: [row, rank] float32 output norms, NaN where nothing was computed; None without them.
        total: [group, expert, 6] float64, added to in place.

    Returns:
        How many filled slots named an expert that does not exist (they are not counted).
    """
    rows, ranks = expert.shape
    experts = total.shape[1]
    beyond = 0
    for row in range(rows):
        g = group[row]
        if g < 0:
            continue
        for rank in range(ranks):
            if valid is not None and not valid[row, rank]:
                continue
            e = int(expert[row, rank])
            if e >= experts:
                beyond += 1
                continue
            w = float(weight[row, rank])
            total[g, e, 0] += 1
            total[g, e, 1] += w
            if norm is not None:
                f = float(norm[row, rank])
                if f == f:
                    total[g, e, 2] += 1
                    total[g, e, 3] += w * f
                    total[g, e, 4] += f
                    total[g, e, 5] += f * f
    return beyond

"""Maxima per (site, expert) and per layer that merge in any grouping: batches into shards, shards into a store.

These are the inputs of the super-expert and massive-activation analyses (Super Experts, ICLR 2026): the largest output
of each expert before its routing weight, where it occurred, and the largest value of each block's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from moescope.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float, Int

# What is recorded about the place of the largest output.
_PLACE = {"document": np.int64, "position": np.int32, "token_id": np.int32}
_EXPERT_TYPES = {
    "absmax_out": np.float32,
    **_PLACE,
    "absmax_in": np.float32,
    "first_row_max": np.float32,
    "tokens": np.int64,
}


@dataclass(frozen=True)
class ExpertMaxima:
    """Maxima of one site, arrays [E]; where `tokens` is 0 the other values mean nothing (stored as null).

    Attributes:
        absmax_out: largest |f_e(x)|, before the routing weight.
        document, position, token_id: the token where `absmax_out` occurred.
        absmax_in: largest |x| that entered the expert.
        first_row_max: largest |f_e(x)| over the first routed row of each batch only (METHODS 4, *code*).
        tokens: number of rows routed to the expert.
    """

    absmax_out: Float[np.ndarray, " expert"]
    document: Int[np.ndarray, " expert"]
    position: Int[np.ndarray, " expert"]
    token_id: Int[np.ndarray, " expert"]
    absmax_in: Float[np.ndarray, " expert"]
    first_row_max: Float[np.ndarray, " expert"]
    tokens: Int[np.ndarray, " expert"]


@dataclass(frozen=True)
class HiddenMaximum:
    """The largest |hidden| of one layer's output residual, and its token and channel."""

    absmax: float
    document: int
    position: int
    token_id: int
    channel: int


@dataclass(frozen=True)
class OutlierBatch:
    """Maxima of one batch: per site key, and per model layer (any layers, MoE or not)."""

    experts: Mapping[str, ExpertMaxima]
    hidden: Mapping[int, HiddenMaximum] = field(default_factory=dict)

    def check(self, n_experts: Mapping[str, int]) -> None:
        """Raise StoreError unless exactly these sites are here, with arrays of their numbers of experts."""
        if set(self.experts) != set(n_experts):
            odd = min(set(self.experts) ^ set(n_experts))
            raise StoreError(f"outliers: site {odd} is {'missing' if odd in n_experts else 'not in the manifest'}.")
        for key, maxima in self.experts.items():
            for name in _EXPERT_TYPES:
                shape = getattr(maxima, name).shape
                if shape != (n_experts[key],):
                    raise StoreError(f"outliers: {key}.{name} has shape {shape}, expected ({n_experts[key]},).")


class OutlierMaxima:
    """Running maxima. Ties keep the place that came first, so the result does not depend on the grouping."""

    def __init__(self) -> None:
        self._experts: dict[str, dict[str, np.ndarray]] = {}
        self._hidden: dict[int, HiddenMaximum] = {}

    def add(self, batch: OutlierBatch) -> None:
        """Merge one batch (or one shard read back)."""
        for key, new in batch.experts.items():
            if key not in self._experts:
                self._experts[key] = _nothing(len(new.tokens))
            _merge(self._experts[key], new)
        for layer, new in batch.hidden.items():
            old = self._hidden.get(layer)
            if old is None or new.absmax > old.absmax or np.isnan(old.absmax):
                self._hidden[layer] = new

    def tables(self, layers: Mapping[str, int]) -> tuple[pa.Table, pa.Table]:
        """(outliers, hidden_outliers) as they are stored; `layers` gives each site's model layer."""
        import pyarrow as pa

        parts = []
        for key, layer in layers.items():
            site = self._experts.get(key)
            if site is None:
                continue
            n = len(site["tokens"])
            never = site["tokens"] == 0
            columns = {
                "site": pa.array([key] * n, pa.string()),
                "layer": pa.array(np.full(n, layer, np.int32)),
                "expert": pa.array(np.arange(n, dtype=np.int32)),
            }
            for name in _EXPERT_TYPES:
                columns[name] = pa.array(site[name], mask=None if name == "tokens" else never)
            parts.append(pa.table(columns))
        experts = pa.concat_tables(parts) if parts else outlier_schema().empty_table()
        rows = [{"layer": layer, **vars(self._hidden[layer])} for layer in sorted(self._hidden)]
        return experts, pa.Table.from_pylist(rows, schema=hidden_schema())


def merged_tables(pairs: Iterable[tuple[pa.Table, pa.Table]], layers: Mapping[str, int]) -> tuple[pa.Table, pa.Table]:
    """Merge the (outliers, hidden_outliers) tables of several shards, in order."""
    total = OutlierMaxima()
    for experts, hidden in pairs:
        total.add(_from_tables(experts, hidden))
    return total.tables(layers)


def outlier_schema() -> pa.Schema:
    """Schema of outliers.parquet: one row per (site, expert)."""
    import pyarrow as pa

    values = [(name, pa.from_numpy_dtype(kind)) for name, kind in _EXPERT_TYPES.items()]
    return pa.schema([("site", pa.string()), ("layer", pa.int32()), ("expert", pa.int32()), *values])


def hidden_schema() -> pa.Schema:
    """Schema of hidden_outliers.parquet: one row per model layer."""
    import pyarrow as pa

    places = [(name, pa.from_numpy_dtype(kind)) for name, kind in _PLACE.items()]
    return pa.schema([("layer", pa.int32()), ("absmax", pa.float32()), *places, ("channel", pa.int32())])


def _nothing(n_experts: int) -> dict[str, np.ndarray]:
    empty = {name: np.zeros(n_experts, kind) for name, kind in _EXPERT_TYPES.items()}
    for name in ("absmax_out", "absmax_in", "first_row_max"):
        empty[name].fill(np.nan)
    return empty


def _merge(old: dict[str, np.ndarray], new: ExpertMaxima) -> None:
    seen = new.tokens > 0
    with np.errstate(invalid="ignore"):
        better = seen & ((new.absmax_out > old["absmax_out"]) | np.isnan(old["absmax_out"]))
    for name in ("absmax_out", *_PLACE):
        old[name][better] = getattr(new, name)[better]
    for name in ("absmax_in", "first_row_max"):
        old[name][seen] = np.fmax(old[name][seen], getattr(new, name)[seen])
    old["tokens"] += new.tokens


def _from_tables(experts: pa.Table, hidden: pa.Table) -> OutlierBatch:
    sites = {}
    keys = np.asarray(experts["site"].to_pylist(), dtype=object)
    for key in dict.fromkeys(keys):
        part = experts.filter(keys == key)
        arrays = {name: part[name].fill_null(0).to_numpy().astype(kind) for name, kind in _EXPERT_TYPES.items()}
        sites[key] = ExpertMaxima(**arrays)
    names = [f.name for f in fields(HiddenMaximum)]
    maxima = {row["layer"]: HiddenMaximum(**{name: row[name] for name in names}) for row in hidden.to_pylist()}
    return OutlierBatch(sites, maxima)

"""One site's columns for a reader: each field is read when first asked for, and only that field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moescope.store.columns import storage_dtype, unpack_floats, unpack_mask, unpack_rows, widen

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Bool, Float, UInt

    from moescope.store.manifest import SiteRecord

# Reads the named columns (without the site key) of one tier, for one shard or for all of them.
ReadColumns = Callable[[Sequence[str]], "Mapping[str, pa.ChunkedArray]"]

FIELDS = ("expert", "weight", "valid", "logsumexp", "entropy", "margin")


class Routing:
    """What one site's router decided, for T tokens. Arrays are read on first access and are read-only.

    Attributes:
        expert: ids [T, k] in rank order, uint8 or uint16; where `valid` is False the largest id of the type.
        weight: [T, k] float32, exactly the weights the block multiplied in; NaN where a slot is missing.
        valid: [T, k], or None where the site's slots can not be missing.
        logsumexp: [T] float32, nats.
        entropy: [T] float32, nats, of the score distribution.
        margin: [T] float32, k-th selection score minus the (k+1)-th.
    """

    def __init__(self, site: SiteRecord, read: ReadColumns, fields: Iterable[str] | None = None) -> None:
        self.site = site
        self._read = read
        wanted = [name for name in fields or () if name != "valid" or site.slots_can_miss]
        self._columns = dict(read(wanted)) if wanted else {}

    def _column(self, name: str) -> pa.ChunkedArray:
        if name in self._columns:
            return self._columns.pop(name)  # the decoded array is what stays
        return self._read([name])[name]

    @cached_property
    def expert(self) -> UInt[np.ndarray, "token slot"]:
        """Ids in rank order."""
        return unpack_rows(self._column("expert"), storage_dtype(self.site.ids), self.site.top_k)

    @cached_property
    def weight(self) -> Float[np.ndarray, "token slot"]:
        """Routing weights, widened exactly."""
        return widen(self.weight_bits, self.site.weight_dtype)

    @cached_property
    def weight_bits(self) -> np.ndarray:
        """Routing weights as stored (bfloat16 as uint16 bits)."""
        return unpack_rows(self._column("weight"), storage_dtype(self.site.weight_dtype), self.site.top_k)

    @cached_property
    def valid(self) -> Bool[np.ndarray, "token slot"] | None:
        """Which slots are present; None means that all are."""
        if not self.site.slots_can_miss:
            return None
        packed = unpack_rows(self._column("valid"), np.dtype("u1"), -(-self.site.top_k // 8))
        return unpack_mask(packed, self.site.top_k)

    @cached_property
    def logsumexp(self) -> Float[np.ndarray, " token"]:
        """Log of the summed exponentials of the router's logits, nats."""
        return unpack_floats(self._column("logsumexp"))

    @cached_property
    def entropy(self) -> Float[np.ndarray, " token"]:
        """Entropy of the score distribution, nats."""
        return unpack_floats(self._column("entropy"))

    @cached_property
    def margin(self) -> Float[np.ndarray, " token"]:
        """k-th selection score minus the (k+1)-th."""
        return unpack_floats(self._column("margin"))

    def __len__(self) -> int:
        return len(self.expert)

    def __repr__(self) -> str:
        return f"Routing({self.site.key}, top {self.site.top_k} of {self.site.n_experts})"


class ExpertOutputs:
    """What the selected experts of one site gave out, before the routing weight; slots as in `Routing`.

    Attributes:
        norm: L2 norm [T, k] float32; NaN where a slot is missing.
        absmax: largest magnitude [T, k] float32; NaN where a slot is missing.
    """

    def __init__(self, site: SiteRecord, read: ReadColumns) -> None:
        self.site = site
        self._read = read

    @cached_property
    def norm(self) -> Float[np.ndarray, "token slot"]:
        """L2 norm of each selected expert's output."""
        return unpack_rows(self._read(["norm"])["norm"], np.dtype("<f4"), self.site.top_k)

    @cached_property
    def absmax(self) -> Float[np.ndarray, "token slot"]:
        """Largest magnitude in each selected expert's output."""
        return unpack_rows(self._read(["absmax"])["absmax"], np.dtype("<f4"), self.site.top_k)

    def __len__(self) -> int:
        return len(self.norm)

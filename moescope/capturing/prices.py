"""What a tier takes on disk for each token of one MoE layer: arithmetic on sizes alone, before there is any model.

Measured on really trained routers with zstd-1: ids shrink to 0.7, half-precision weights to 0.8, single to 0.92.
"""

from __future__ import annotations

from collections.abc import Mapping

ID_SHRINK, HALF_SHRINK, SINGLE_SHRINK, SUMMARIES = 0.7, 0.8, 0.92, 11
MAGNITUDE = 4  # norm and largest magnitude are float32


def row_bytes(n_experts: int, top_k: int, *, weight_bytes: int, logit_bytes: int) -> Mapping[str, float]:
    """Expected bytes of one (token, layer), by tier; the outliers tier does not grow with the tokens.

    Args:
        n_experts, top_k: E and k of the layer.
        weight_bytes, logit_bytes: bytes of one routing weight and one router logit.
    """
    shrink = SINGLE_SHRINK if weight_bytes == 4 else HALF_SHRINK
    return {
        "routing": top_k * (ID_SHRINK * (1 if n_experts <= 256 else 2) + shrink * weight_bytes) + SUMMARIES,
        "logits": n_experts * logit_bytes,
        "experts": 2 * top_k * MAGNITUDE * SINGLE_SHRINK,
        "outliers": 0,
    }

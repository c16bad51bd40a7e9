"""A zoo of tiny random MoE models, one per family of transformers, and a slow independent reference for each."""

from .building import build, inputs, shared
from .families import CAPTURED, FAMILIES, OLD_STYLE, REFUSED, VARIANTS, ZOO
from .reference import LayerReference, reference

__all__ = [
    "CAPTURED",
    "FAMILIES",
    "OLD_STYLE",
    "REFUSED",
    "VARIANTS",
    "ZOO",
    "LayerReference",
    "build",
    "inputs",
    "reference",
    "shared",
]

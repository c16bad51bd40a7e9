"""A zoo of tiny random MoE models, one per family of transformers, and a slow independent reference for each."""

from .building import build, inputs, shared
from .families import FAMILIES, VARIANTS, ZOO
from .reference import LayerReference, reference

__all__ = ["FAMILIES", "VARIANTS", "ZOO", "LayerReference", "build", "inputs", "reference", "shared"]

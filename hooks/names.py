"""Names of a model's tensors in its checkpoint, which may hold one tensor for each expert where the model holds one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from moescope.errors import RefusedError


def checkpoint_names(hf: nn.Module, name: str, known: Collection[str]) -> list[str]:
    """Names under which a checkpoint holds one of a model's tensors: one, or one for each expert in order.

    transformers' own conversion is run backwards on a tensor without data, so that this needs no weights.

    Args:
        hf: the model or its skeleton on the meta device.
        name: of a parameter or buffer of the model.
        known: names that the checkpoint has.

    Raises:
        RefusedError: the checkpoint has no such tensors.
    """
    found: Any = dict(hf.named_parameters(remove_duplicate=False)) | dict(hf.named_buffers())
    empty = torch.empty_like(found[name], device="meta")
    return [in_checkpoint(known, stored, name) for stored in reverted(hf, name, empty)]


def reverted(hf: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of the model as its checkpoint holds it, by the checkpoint's names.

    Raises:
        RefusedError: transformers cannot convert it back.
    """
    try:
        said: Any = revert_weight_conversion(hf, {name: tensor})  # pyright: ignore[reportArgumentType]
    except (RuntimeError, NotImplementedError, KeyError, ValueError) as error:
        raise RefusedError(f"transformers cannot say how {name} is stored in a checkpoint: {error}") from error
    return dict(said)


def in_checkpoint(known: Collection[str], stored: str, name: str) -> str:
    """The name as the checkpoint has it: a leading part may be there or not (`model.`, `language_model.`)."""
    if stored in known:
        return stored
    close = [key for key in known if key.endswith("." + stored) or stored.endswith("." + key)]
    if len(close) != 1:
        raise RefusedError(f"The checkpoint has no tensor {stored} (the model's {name}), so it cannot be edited there.")
    return close[0]

"""Builds a zoo model and its inputs, deterministically and without a network."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from . import old_style
from .families import ZOO
from .family import Family

FIRST_TOKEN = 3  # 0, 1 and 2 are padding, start and end in every zoo configuration
LAST_TOKEN = 90  # ids above are left to the placeholder tokens of multimodal models


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Builds the tiny model of a family, in eval mode, with every weight random and every selection bias non-zero.

    The low-precision model is the float32 model rounded, except where transformers itself insists on float32
    (`_keep_in_fp32_modules_strict`, buffers declared float32).

    Args:
        name: a key of `ZOO`: a model type, or "model_type+variant".
        dtype: of the parameters.
        seed: of all weights.

    Raises:
        KeyError: no such family.
    """
    family = ZOO[name]
    model = _construct(family, torch.float32, seed)
    _fill(model, family, seed)
    if dtype is torch.float32:
        return model
    target = _construct(family, dtype, seed)
    strict = getattr(target, "_keep_in_fp32_modules_strict", None) or ()
    for tensor_name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        if any(part in tensor_name for part in strict):
            tensor.data = tensor.data.float()
    source = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor_name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            tensor.copy_(source[tensor_name])
    return target


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model for all tests that only look: leave no hook on it and change none of its weights."""
    return build(name, dtype)


def inputs(
    name: str, batch: int = 2, length: int = 9, seed: int = 0, padding: str | None = None
) -> dict[str, torch.Tensor]:
    """Random token ids for a family, text only.

    Args:
        name: a key of `ZOO`.
        batch: sequences.
        length: tokens of the longest sequence; with padding, sequence i is about 2 i tokens shorter.
        seed: of the token ids.
        padding: the padded side, "left" or "right"; None for sequences of equal length.

    Returns:
        input_ids and attention_mask `[batch, length]`, and what else the family's forward wants.
    """
    family = ZOO[name]
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(FIRST_TOKEN, LAST_TOKEN, (batch, length), generator=generator)

    ids, mask = tokens(length), torch.ones(batch, length, dtype=torch.long)
    if padding is not None:
        for row in range(batch):
            missing = min(2 * row, length - 1)
            if missing:
                mask[row, slice(0, missing) if padding == "left" else slice(length - missing, length)] = 0
        ids = ids * mask  # the padding id is 0 in every zoo configuration
    values: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": mask}
    if family.encoder_decoder:
        values["decoder_input_ids"] = tokens(family.canvas or length)
    for key, kind in family.token_types.items():
        random = torch.randint(0, 2, (batch, length), generator=generator)
        values[key] = random if kind == "random01" else torch.zeros_like(ids)
    return values


def _construct(family: Family, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Constructs the model with memory that transformers leaves uninitialised set to NaN, so that `_fill` sees it."""
    model_class: Any = getattr(old_style, family.model, None) or getattr(transformers, family.model)
    config = model_class.config_class(**family.config)
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            model = model_class._from_config(config, dtype=dtype)
        finally:
            torch.use_deterministic_algorithms(before[0])
            memory.fill_uninitialized_memory = before[1]
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill(model: PreTrainedModel, family: Family, seed: int) -> None:
    """Gives seeded values to what transformers leaves at zero, at one, or uninitialised.

    Biases and correction buffers start at zero and scales at one, where a wrong reading of them would not show.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf not in SELECTION and not isinstance(tensor, torch.nn.Parameter):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 7919 * seed)
        if leaf == "tid2eid":
            _fill_hash_table(tensor, model, generator)
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if leaf in SELECTION:
            # A softmax over eight experts spreads less than eight sigmoids do.
            tensor.copy_((0.05 if family.routing.score == "softmax" else 0.15) * noise)
        elif not torch.isfinite(tensor).all():
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
        elif not tensor.any():
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 0.1 * noise)
        elif (tensor == 1).all():
            tensor.copy_(1 + 0.2 * noise)
        for suffix, gain in family.gains.items():
            if name.endswith(suffix):
                tensor.mul_(gain)


# Names of what takes part in selection besides the router's linear; most are buffers.
SELECTION = {"e_score_correction_bias", "expert_bias", "balancing_biases", "tid2eid"}


def _fill_hash_table(table: torch.Tensor, model: PreTrainedModel, generator: torch.Generator) -> None:
    """Gives every token id k distinct experts."""
    experts = model.config.get_text_config().n_routed_experts
    for row in table:
        row.copy_(torch.randperm(experts, generator=generator)[: table.shape[1]])

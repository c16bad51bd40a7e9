"""Tensors that a recipe puts in place of a model's own: their file beside the recipe, and their bytes in a checkpoint.

A checkpoint may hold a parameter split by expert, transposed or renamed. Where each number goes is found by sending the
parameter backwards through transformers' own conversion twice: once with the new numbers, once with a mark at each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moescope.edits.edit import Replace
from moescope.edits.files import Stored
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.names import in_checkpoint, reverted
from moescope.hooks.parts import Part

if TYPE_CHECKING:
    from torch import nn

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Content:
    """New numbers of a stored tensor, as bytes.

    Attributes:
        values: [n, item size] uint8, in the tensor's own order.
        places: bool [numbers], which they replace; None for all of them.
        rounded: whether the stored dtype could not hold them exactly.
    """

    values: np.ndarray
    places: np.ndarray | None
    rounded: bool


def replacement(
    layer: int | str, experts: tuple[int, ...], tensors: Mapping[str, torch.Tensor], file: str
) -> tuple[Replace, dict[str, torch.Tensor]]:
    """A `Replace` edit and the tensors it means, on the host.

    Args:
        layer: model layer index or site key.
        experts: whose tensors they are.
        tensors: by part, see `hooks.parts.Part`.
        file: name of the file that will hold them.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Replace(layer=layer, expert=experts, file=file, digest=_digest(save_tensors(held))), held


def save(folder: Path, edit: Replace, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an edit's tensors into a folder; the same file that is there already is left alone."""
    target = folder / edit.file
    data = save_tensors(dict(tensors))
    try:
        if not (target.is_file() and _digest(target.read_bytes()) == edit.digest):
            target.write_bytes(data)
    except OSError as error:
        raise MoescopeError(f"Cannot write {target}: {error.strerror or error}.") from error


def read(folder: Path | None, edit: Replace) -> dict[str, torch.Tensor]:
    """An edit's tensors from the file beside its recipe.

    Raises:
        MoescopeError: no such file, not the one meant, or no safetensors.
    """
    if folder is None:
        raise MoescopeError(f"This recipe was made without the tensors of {edit.file}; load it from its file.")
    path = folder / edit.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MoescopeError(
            f"The recipe's tensors {path} cannot be read ({error.strerror or error}); keep them beside the recipe. The "
            "recipe inside a written checkpoint has none: they are in the checkpoint."
        ) from error
    if _digest(data) != edit.digest:
        raise MoescopeError(f"{path} is not the file that the recipe was made with; its digest differs.")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise MoescopeError(f"{path} is no safetensors file: {error}.") from error


def contents(
    hf: nn.Module, known: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor]
) -> list[tuple[Stored, Content]]:
    """Which stored tensors of a checkpoint hold these parts of a model's parameters, and with which new bytes.

    Holds one layer's tensors of a kind at a time.

    Args:
        hf: the model's skeleton on the meta device.
        known: the checkpoint's tensors.
        tensors: by part.

    Raises:
        MoescopeError: the model has no such parameter, or of another shape.
        RefusedError: the checkpoint stores it quantised, or converted by more than a rearrangement.
    """
    shapes: dict[str, Any] = dict(hf.named_parameters(remove_duplicate=False))
    by_path: dict[str, dict[Part, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part = Part.parse(name)
        if part.path not in shapes or part.of(shapes[part.path]).shape != tensor.shape:
            raise MoescopeError(f"The checkpoint's model has no {name} of shape {tuple(tensor.shape)}.")
        by_path.setdefault(part.path, {})[part] = tensor
    found = []
    for path, parts in by_path.items():
        values, marks = (torch.zeros(shapes[path].shape) for _ in range(2))
        for part, tensor in parts.items():
            part.of(values).copy_(tensor)
            part.of(marks).fill_(1)
        moved, marked = reverted(hf, path, values), reverted(hf, path, marks)
        if int(sum(float(mark.sum(dtype=torch.float64)) for mark in marked.values())) != int(marks.sum()):
            raise RefusedError(f"{path} is not stored as a rearrangement of itself; it cannot be replaced there.")
        found += [
            (known[stored], _content(known[stored], moved[name], mark.bool()))
            for name, mark in marked.items()
            if bool(mark.any()) and (stored := in_checkpoint(known, name, path))
        ]
    return found


def _content(stored: Stored, values: torch.Tensor, mark: torch.Tensor) -> Content:
    if stored.dtype not in STORED:
        raise RefusedError(f"{stored.name} is stored as {stored.dtype}; quantised tensors cannot be replaced.")
    if [n for n in stored.shape if n != 1] != [n for n in values.shape if n != 1]:
        raise RefusedError(f"{stored.name} is stored as {stored.shape}, not as {tuple(values.shape)}.")
    new = values[mark]
    narrow = new.to(STORED[stored.dtype])
    raw = narrow.contiguous().view(torch.uint8).numpy().reshape(len(new), -1)
    whole = bool(mark.all())
    return Content(raw, None if whole else mark.flatten().numpy(), not torch.equal(narrow.to(new.dtype), new))


def overwrite(file: Path, stored: Stored, content: Content) -> None:
    """Put new bytes into a stored tensor in its file."""
    data = content.values
    if content.places is not None:
        with file.open("rb") as handle:
            old = np.fromfile(handle, np.uint8, stored.end - stored.start, offset=stored.start)
        whole = old.reshape(len(content.places), -1)
        whole[content.places] = data
        data = whole
    with file.open("r+b") as handle:
        handle.seek(stored.start)
        handle.write(data.tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

"""A checkpoint's files: where each tensor's bytes lie, and how to change some of them in a copy, without loading it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moescope.errors import MoescopeError, RefusedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file.

    Attributes:
        name, file: its name, and the file that holds it.
        dtype: as the file says: "F32", "BF16", ….
        shape: its shape.
        start, end: its bytes in the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, by name; reads headers only.

    Raises:
        MoescopeError: no safetensors there, or a file that is cut off or no safetensors file.
    """
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise MoescopeError(f"{folder / INDEX} is not a checkpoint index.") from error
        if any(Path(file).name != file for file in files):
            raise MoescopeError(f"{folder / INDEX} names files outside its folder.")
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise MoescopeError(f"{folder} holds no safetensors checkpoint ({SINGLE} or {INDEX}).")
    return {stored.name: stored for file in files for stored in _header(folder / file)}


def _header(file: Path) -> list[Stored]:
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise MoescopeError(f"{file} is cut off or no safetensors file.")
            header: dict[str, Any] = json.loads(handle.read(length))
    except OSError as error:
        raise MoescopeError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise MoescopeError(f"{file} is no safetensors file.") from error
    header.pop("__metadata__", None)
    found = []
    for name, record in header.items():
        start, end = (8 + length + offset for offset in record["data_offsets"])
        if end > size:
            raise MoescopeError(f"{file} is cut off: {name} ends beyond it.")
        found.append(Stored(name, file.name, record["dtype"], tuple(record["shape"]), start, end))
    return found


def is_float(stored: Stored) -> bool:
    """Whether its numbers can be multiplied as they are stored (quantised ones cannot)."""
    return stored.dtype in DTYPES


def part_bytes(stored: Stored, index: int | None) -> tuple[int, int]:
    """Bytes of a tensor, or of one entry of its first dimension."""
    if index is None:
        return stored.start, stored.end
    step = (stored.end - stored.start) // stored.shape[0]
    return stored.start + index * step, stored.start + (index + 1) * step


def multiply(file: Path, stored: Stored, index: int | None, factor: float) -> None:
    """Multiply a tensor, or one entry of its first dimension, in its file; rounds to the stored dtype.

    Raises:
        RefusedError: the tensor is quantised, or a number overflows.
    """
    start, end = part_bytes(stored, index)
    if factor == 0:
        _write(file, start, np.zeros(end - start, np.uint8))
        return
    if not is_float(stored):
        raise RefusedError(f"{stored.name} is stored as {stored.dtype}; quantised tensors cannot be scaled.")
    with file.open("rb") as handle:
        values = np.fromfile(handle, DTYPES[stored.dtype], (end - start) // DTYPES[stored.dtype].itemsize, offset=start)
    wide = _widened(values, stored.dtype) * np.float64(factor)
    narrow = _narrowed(wide, stored.dtype)
    if not np.isfinite(_widened(narrow, stored.dtype)).all():
        raise RefusedError(f"{stored.name} times {factor:g} overflows {stored.dtype}.")
    _write(file, start, narrow)


def fill(file: Path, stored: Stored, index: int, value: float) -> None:
    """Set one entry of a vector in its file."""
    start, _ = part_bytes(stored, index)
    if not is_float(stored):
        raise RefusedError(f"{stored.name} is stored as {stored.dtype}; it cannot be set.")
    _write(file, start, _narrowed(np.array([value]), stored.dtype))


def numbers(file: Path, stored: Stored) -> np.ndarray:
    """A tensor's numbers, flat, in double precision.

    Raises:
        RefusedError: the tensor is quantised.
    """
    if not is_float(stored):
        raise RefusedError(f"{stored.name} is stored as {stored.dtype}; its numbers are not read here.")
    dtype = DTYPES[stored.dtype]
    with file.open("rb") as handle:
        values = np.fromfile(handle, dtype, (stored.end - stored.start) // dtype.itemsize, offset=stored.start)
    return _widened(values, stored.dtype)


def _widened(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """To the stored dtype, to the nearest, ties to even."""
    with np.errstate(over="ignore"):  # what overflows is told by the caller
        if dtype != "BF16":
            return values.astype(DTYPES[dtype])
        bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isinf(values), bits >> 16, rounded >> 16).astype(np.uint16)


def _write(file: Path, start: int, values: np.ndarray) -> None:
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write(values.tobytes())


def copy_checkpoint(source: Path, out: Path, touched: Iterable[str], *, skip: bool = False) -> None:
    """Copy a checkpoint folder: files that will be changed are copied, other shards are hard-linked where that works.

    Pickles are left behind, and with `skip` the files that will be written anew. Raises OSError where the disk is full.
    """
    changed = set(touched)
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.suffix in PICKLES or file.name.startswith("."):
            continue
        if skip and file.name in changed:
            continue
        real, target = file.resolve(), out / file.name
        if file.suffix == ".safetensors" and file.name not in changed and _linked(real, target):
            continue
        shutil.copyfile(real, target)
        os.chmod(target, 0o644)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        return False
    return True

"""Tensors on the storages of a .pt file: contiguous ones as they lie, others gathered by their strides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neoxconv.core.tensor import LazyTensor, Read, stored
from neoxconv.dtypes import Array
from neoxconv.formats.pt.unpickle import MAX_AXES, StorageRef
from neoxconv.storage import Storage

_MAX_REPEATED = 1 << 24  # numbers of a tensor that repeats its storage's
_NEAR = 64 << 10  # bytes that are read at once, wanted or not


@dataclass(frozen=True)
class Record:
    """Where a storage, or another member of the zip, has its bytes; a CRC-32 of 0 where the writer computed none."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class PtFile:
    """A .pt file's value with tensors unread, a SHA-256 of what describes it, and its storages by key."""

    value: Any
    checksum: str
    records: dict[str, Record]


@dataclass(frozen=True)
class View:
    """What a tensor is of a storage: `offset` and `stride` count numbers."""

    ref: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def tensor_in(file: Storage, record: Record, view: View) -> LazyTensor:
    """The tensor that is a view of a storage; raises ValueError where it would reach beyond it."""
    dtype, shape, stride = view.ref.dtype, view.shape, view.stride
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    first = view.ref.start + view.offset
    last = first + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    empty, beyond = 0 in shape, last >= view.ref.numel or (last + 1) * dtype.nbytes > record.size
    if beyond and not empty:
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its storage {view.ref.key}")
    if math.prod(shape) > max(view.ref.numel, _MAX_REPEATED) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of shape {list(shape)} is far larger than its storage {view.ref.key}")
    base = record.offset + first * dtype.nbytes
    tensor = stored(file, base, shape, dtype)
    if empty or _is_contiguous(shape, stride):
        return tensor
    return replace(tensor, read=_strided(file, base, view))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether rows follow each other without gaps."""
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(extent == 1 or step == want for extent, step, want in zip(shape, stride, wanted, strict=True))


def _strided(file: Storage, base: int, view: View) -> Read:
    """Rows of a tensor whose first number is byte `base`, whatever its strides: transposed, cut, repeated."""
    dtype = view.ref.dtype
    steps = tuple(step * dtype.nbytes for step in view.stride)

    def read(start: int, stop: int) -> Array:
        rows = np.empty((stop - start, *view.shape[1:]), dtype.numpy)
        if rows.size:
            _fill(rows, file, base + start * steps[0], steps)
        return rows

    return read


def _fill(out: Array, file: Storage, offset: int, steps: tuple[int, ...]) -> None:
    """Copy the numbers from byte `offset` on, `steps` bytes apart along each axis, into `out`.

    Where most bytes between them are not wanted, the longest axis is halved until the rest is near.
    """
    reach = [(extent - 1) * step for extent, step in zip(out.shape, steps, strict=True)]
    span = sum(reach) + out.itemsize
    if span <= max(_NEAR, 2 * out.nbytes):
        out[...] = np.ndarray(out.shape, out.dtype, file.read(offset, span), 0, steps)
        return
    axis = reach.index(max(reach))
    middle = out.shape[axis] // 2
    first, second = np.split(out, [middle], axis)
    _fill(first, file, offset, steps)
    _fill(second, file, offset + middle * steps[axis], steps)

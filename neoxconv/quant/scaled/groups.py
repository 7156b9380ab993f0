"""Which weights share a scale: blocks of a tensor's numbers in their order, its rows, or all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neoxconv.dtypes import Floats


def largest(groups: Floats) -> Floats:
    """The largest magnitude of every row of [n, k]; a NaN is larger than anything."""
    from neoxconv.quant.scaled import kernels

    found = np.empty(len(groups), np.float32)
    kernels.largest(np.ascontiguousarray(groups, np.float32).view(np.uint32), found.view(np.uint32))
    return found


def ends(groups: Floats) -> Floats:
    """The least and the largest number [n, 2] of every row of [n, k]."""
    from neoxconv.quant.scaled import kernels

    found = np.empty((len(groups), 2), np.float32)
    kernels.ends(np.ascontiguousarray(groups, np.float32).view(np.int32), found)
    return found


def whole_blocks(values: Floats, block: int) -> Floats:
    """Numbers as blocks [n, block], the last filled up with zeros."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if missing := -flat.size % block:
        flat = np.concatenate([flat, np.zeros(missing, np.float32)])
    return flat.reshape(-1, block)


@dataclass(frozen=True)
class BlockGroups:
    """Every `block` numbers of the tensor in their order, whatever its rows; the last may have less."""

    block: int
    whole: bool = False

    def rows_per_whole_group(self, columns: int) -> int:
        return self.block // math.gcd(self.block, columns)

    def apart(self, rows: Floats) -> Floats:
        return whole_blocks(rows, self.block)

    def groups_of(self, start: int, stop: int, columns: int) -> slice:
        return slice(start * columns // self.block, -(-stop * columns // self.block))

    def per_weight(self, values: Floats, shape: tuple[int, ...]) -> Floats:
        return np.repeat(values, self.block)[: math.prod(shape)].reshape(shape)

    def width(self, shape: tuple[int, ...]) -> int:
        return self.block


@dataclass(frozen=True)
class RowGroups:
    """Each row."""

    whole: bool = False

    def rows_per_whole_group(self, columns: int) -> int:
        return 1

    def apart(self, rows: Floats) -> Floats:
        return rows

    def groups_of(self, start: int, stop: int, columns: int) -> slice:
        return slice(start, stop)

    def per_weight(self, values: Floats, shape: tuple[int, ...]) -> Floats:
        return np.broadcast_to(values[:, None], shape)

    def width(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:])


@dataclass(frozen=True)
class TensorGroup:
    """All rows."""

    whole: bool = True

    def rows_per_whole_group(self, columns: int) -> int:
        return 1

    def apart(self, rows: Floats) -> Floats:
        return rows.reshape(1, -1)

    def groups_of(self, start: int, stop: int, columns: int) -> slice:
        return slice(0, 1)

    def per_weight(self, values: Floats, shape: tuple[int, ...]) -> Floats:
        return np.broadcast_to(values[:, None], shape)

    def width(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

"""A tensor that is not read yet: its shape, how its rows are stored, and a function that reads a band of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from neoxconv.dtypes import F32, Array, Bools, DType, Floats, widen
from neoxconv.storage import Storage

Read = Callable[[int, int], Array]
# Which of rows [n, columns] cannot have become the values that are read from row `start` on: rows, values, start.
Misfits = Callable[[Floats, Floats, int], Bools]


@dataclass(frozen=True)
class LazyTensor:
    """Rows `start` to `stop` on request.

    `read` returns [stop - start, *shape[1:]] of `dtype.numpy`; for a block type [stop - start, row bytes] of uint8.
    `native` is the number type in which the source holds the values: what a writer keeps unless told otherwise.
    It differs from `dtype` where reading computes (a mean in F32 of F16 ranks). A 1-D tensor has rows of one number.
    `misfits` judges by the scales that lie beside codes, where others than ours may have been chosen.
    """

    shape: tuple[int, ...]
    dtype: DType
    read: Read
    native: DType
    misfits: Misfits | None = None

    @property
    def rows(self) -> int:
        """Length of the first axis; a single number is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as `dtype` stores them."""
        return self.dtype.size(self.rows * self.columns)

    def floats(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` [stop - start, *shape[1:]] as float32; only for plain types."""
        return widen(self.read(start, stop), self.dtype)


def stored(file: Storage, offset: int, shape: Sequence[int], dtype: DType) -> LazyTensor:
    """The tensor whose rows lie one after the other from byte `offset` of `file` on.

    Reading it raises CheckpointError where the file is cut short.
    """
    tail = tuple(shape[1:])
    rows, row = shape[0] if shape else 1, dtype.size(math.prod(tail))

    def read(start: int, stop: int) -> Array:
        data = file.read(offset + start * row, (stop - start) * row, (rows - stop) * row)
        if dtype.block > 1:
            return data.reshape(stop - start, row)
        return data.view(dtype.numpy).reshape(stop - start, *tail)

    return LazyTensor(tuple(shape), dtype, read, dtype)


def computed(like: LazyTensor, read: Callable[[int, int], Floats], shape: tuple[int, ...] | None = None) -> LazyTensor:
    """A tensor of float32 results, not yet rounded, in the shape of `like` by default; writers default to its type."""
    return LazyTensor(shape or like.shape, F32, read, like.native)


def in_memory(values: Floats) -> LazyTensor:
    """A small tensor whose `values` [rows, ...] are held in memory."""
    return LazyTensor(values.shape, F32, lambda start, stop: values[start:stop], F32)


def alike(tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Tensors of plain types as they are where all are stored alike, else as numbers, so that they can be stacked."""
    if len({tensor.dtype.name for tensor in tensors}) == 1:
        return list(tensors)
    return [computed(tensor, tensor.floats) for tensor in tensors]


def zeros(count: int, like: LazyTensor) -> LazyTensor:
    """A vector of zeros in the type of `like`, a tensor of a plain type."""
    return LazyTensor((count,), F32, lambda start, stop: np.zeros(stop - start, np.float32), like.native)


def band(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows `start` to `stop` as a tensor."""
    return replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        read=lambda a, b: tensor.read(start + a, start + b),
        misfits=None,
    )


def reordered(tensor: LazyTensor, order: Array) -> LazyTensor:
    """The tensor whose row i is row `order[i]` (int64 [n]) of `tensor`; runs of neighbours are read together."""
    cuts = np.flatnonzero(np.diff(order) != 1) + 1

    def read(start: int, stop: int) -> Array:
        inside = cuts[np.searchsorted(cuts, start, "right") : np.searchsorted(cuts, stop, "left")]
        borders = [start, *inside.tolist(), stop]
        runs = [tensor.read(int(order[a]), int(order[a]) + b - a) for a, b in itertools.pairwise(borders)]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    return replace(tensor, shape=(len(order), *tensor.shape[1:]), read=read, misfits=None)


@dataclass(frozen=True)
class _Across:
    """Reads rows of a matrix's transpose."""

    matrix: LazyTensor

    def __call__(self, start: int, stop: int) -> Array:
        """Columns `start` to `stop`, read in bands of rows that hold no more numbers than are asked for."""
        rows, columns = self.matrix.shape
        step = max(1, (stop - start) * rows // columns)
        bands = (self.matrix.read(a, min(a + step, rows)) for a in range(0, rows, step))
        return np.ascontiguousarray(np.concatenate([rows[:, start:stop].copy() for rows in bands]).T)


def transposed(matrix: LazyTensor) -> LazyTensor:
    """The tensor [columns, rows] of a matrix of a plain type; of a transpose it is the matrix itself."""
    if isinstance(matrix.read, _Across):
        return replace(matrix.read.matrix, native=matrix.native)
    return replace(matrix, shape=matrix.shape[::-1], read=_Across(matrix))


def slabs(tensor: LazyTensor, slab: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Borders of bands of rows that take `slab` bytes at most as float32: multiples of `unit` rows, one at least."""
    step = max(1, slab // (4 * max(1, tensor.columns) * unit)) * unit
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)

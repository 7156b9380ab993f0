"""Numbers that lie one after the other in several pieces, and the tensors that are ranges of them."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, Floats
from neoxconv.storage import Place

_NEAR = 1024  # numbers on either side of a border that are looked at


@dataclass(frozen=True)
class _Flat:
    """Rows of float32 one after the other, none empty."""

    pieces: tuple[LazyTensor, ...]  # [numbers] each
    starts: tuple[int, ...]  # the position of each piece's first number
    files: tuple[Place, ...]  # that hold the pieces

    def piece_at(self, position: int) -> int:
        """The number of the piece that holds a position."""
        return bisect_right(self.starts, position) - 1

    def read(self, start: int, stop: int) -> Floats:
        """The numbers from `start` to `stop` [stop - start]; no others are read.

        Raises CheckpointError where a file has become shorter.
        """
        first = self.piece_at(start)
        if first == self.piece_at(max(start, stop - 1)):
            return self.pieces[first].floats(start - self.starts[first], stop - self.starts[first])
        numbers = np.empty(stop - start, np.float32)
        for piece, begin in zip(self.pieces[first:], self.starts[first:], strict=True):
            a, b = max(start, begin), min(stop, begin + piece.rows)
            if a >= b:
                break
            numbers[a - start : b - start] = piece.floats(a - begin, b - begin)
        return numbers


def joined(pieces: Sequence[tuple[Place, LazyTensor]]) -> _Flat:
    """The pieces, empty ones left out, one after the other."""
    held = [(path, piece) for path, piece in pieces if piece.rows]
    starts = itertools.accumulate((piece.rows for _, piece in held), initial=0)
    return _Flat(tuple(piece for _, piece in held), tuple(starts)[:-1], tuple(path for path, _ in held))


@dataclass(frozen=True)
class Master:
    """A tensor that is the numbers of `flat` from `start` on."""

    flat: _Flat
    start: int
    shape: tuple[int, ...]

    @property
    def tensor(self) -> LazyTensor:
        """The master as a tensor of which bands of rows can be read."""
        columns, tail = math.prod(self.shape[1:]), self.shape[1:]

        def read(start: int, stop: int) -> Floats:
            begin = self.start + start * columns
            return self.flat.read(begin, begin + (stop - start) * columns).reshape(stop - start, *tail)

        return LazyTensor(self.shape, F32, read, F32)

    @property
    def borders(self) -> Iterator[tuple[int, int]]:
        """Bands of rows: the first ones, the last ones, and those around each seam, where another piece begins."""
        rows, columns = self.tensor.rows, max(1, self.tensor.columns)
        few = max(1, _NEAR // columns)
        inside = self.flat.starts[self.flat.piece_at(self.start) + 1 : self.flat.piece_at(self.end - 1) + 1]
        seams = [(start - self.start) // columns for start in inside]
        for row in (0, *seams, rows):
            yield max(0, row - few), min(rows, row + few)

    @property
    def end(self) -> int:
        """The position behind its last number."""
        return self.start + math.prod(self.shape)

    def file_of(self, number: int) -> Place:
        """The file that holds one of its numbers."""
        return self.flat.files[self.flat.piece_at(self.start + number)]


class Padding(Enum):
    """What a writer does with the numbers that fill up a group's last partitions and belong to no parameter."""

    CUT = "cut off, so that the last partitions are short or empty"
    KEPT = "kept, so that all partitions have one size"
    UNKNOWN = "either"


@dataclass(frozen=True)
class _Misfit:
    """What is wrong with the sizes of pieces, and with which of them."""

    piece: int
    what: str


def misfit(sizes: Sequence[int], total: int, padding: Padding, admitted: Container[int]) -> _Misfit | None:
    """What is wrong with pieces of these sizes that should hold `total` numbers; None where they do.

    Each must be as large as the first, but for padding at the end, `admitted` counts of which are fine.
    """
    full = sizes[0]
    kept = [full] * len(sizes)
    cut = [min(full, max(0, total - i * full)) for i in range(len(sizes))]
    expected = {Padding.CUT: [cut], Padding.KEPT: [kept], Padding.UNKNOWN: [kept, cut]}[padding]
    left_over = full * len(sizes) - total
    if list(sizes) in expected and (left_over == 0 or left_over in admitted):
        return None
    asked = f"the parameters have {total} numbers"
    for i, size in enumerate(sizes):
        if all(size != one[i] for one in expected):
            known = " or ".join(map(str, dict.fromkeys(one[i] for one in expected)))
            return _Misfit(i, f"partition {i} of {len(sizes)} holds {size} numbers, expected {known}; {asked}")
    return _Misfit(0, f"{len(sizes)} partitions of {full} numbers hold {sum(sizes)}, but {asked}")

"""Kernels that read codebooks' blocks, and tell which of their weights cannot have been stored as they are.

An entry is impossible where another one is nearer to every weight in which they differ, however little some of these
matter. Of two numbers a and b that an entry has for a weight w, a is nearer than b to w / scale where

    |w - scale * a| + rounding * (|a| + |b|) + apart * scale < |w - scale * b|

and so it was for the scale before it was rounded to an odd number of steps, `rounding` away at most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.ggml import lanes as at
from neoxconv.quant.ggml.codebook_search import Book, Words
from neoxconv.quant.kernels import INFINITY, ONE, ZERO, f32, i32, kernel, part, u32

_SMALLEST = f32(2.0**-20)  # what rounding a subnormal step comes to in 32 of them


class Groups(NamedTuple):
    """Super-blocks taken apart: entries [n, groups]; signs [n, eights], none where entries have their own; shifts of
    entries [n, any number]; scales [n, blocks] and steps [n]."""

    entries: Words
    signs: Words
    shifts: Floats
    scale: Floats
    step: Floats


class Bound(NamedTuple):
    """What an encoder may do: scales from `least` to `most` of a block's largest weight, `moved` by so much of
    themselves when steps are rounded; entries so far `apart` from those that are read, in scales; entries that were the
    nearest for the scale times one of `factors`; an even count of negative ones of eight weights."""

    least: np.float32
    most: np.float32
    moved: np.float32
    apart: np.float32
    factors: Floats
    even: bool


class Known(NamedTuple):
    """Of a group: its scale, how far rounding may have moved it, `apart` of a bound, and the shift of its entry."""

    scale: np.float32
    rounding: np.float32
    apart: np.float32
    shift: np.float32


@kernel
def read(groups: Groups, points: Floats, values: Floats) -> None:
    """Fill `values` [n, weights] with what is read, points [entries, size] in scales."""
    size, columns = points.shape[1], values.shape[1]
    block = columns // groups.scale.shape[1]
    for b in range(values.shape[0]):
        for first in range(0, columns, size):
            point, scale = points[groups.entries[b, first // size]], groups.scale[b, first // block]
            shift = _shift(groups, b, first, columns)
            for j in range(size):
                values[b, first + j] = scale * (_sign(groups, b, first + j) * (point[j] + shift))


@part
def _shift(groups: Groups, b: int, place: int, columns: int) -> np.float32:
    """What is added to an entry at a place of a super-block."""
    count = groups.shifts.shape[1]
    return groups.shifts[b, place * count // columns] if count else ZERO


@part
def _sign(groups: Groups, b: int, place: int) -> np.float32:
    """The sign of a weight that is stored apart, 1 where none is."""
    if groups.signs.shape[1] == 0:
        return ONE
    return -ONE if (groups.signs[b, place >> 3] >> u32(place & 7)) & u32(1) else ONE


@part
def _nearer(weight: np.float32, a: np.float32, b: np.float32, known: Known) -> bool:
    """Whether a is nearer to a weight than b, however the scale was rounded."""
    room = f32(known.rounding * f32(abs(a) + abs(b))) + known.apart * known.scale
    return bool(f32(abs(weight - known.scale * a)) + room < f32(abs(weight - known.scale * b)))


@part
def _find_better(x: Floats, entry: int, known: Known, points: Floats, book: Book) -> int:
    """An entry that is nearer to all weights of a group in which it differs, -1 where none is."""
    place = 0
    for j in range(book.size):
        level = at.nearest(f32(f32(x[j] / known.scale - known.shift - book.low) / book.gap), ZERO, f32(book.levels - 1))
        place = place * book.levels + int(i32(level))
    for t in range(book.near.shape[1]):
        other = int(i32(book.near[place, t] >> u32(16)))
        better = other != entry
        for j in range(book.size):
            if better and points[other, j] != points[entry, j]:
                a, b = f32(points[other, j] + known.shift), f32(points[entry, j] + known.shift)
                better = _nearer(x[j], a, b, known)
        if better:
            return other
    return -1


@part
def _check_signs(x: Floats, known: Known, entries: Floats, even: bool, wrong: Bools) -> None:
    """Mark weights of eight that have another sign than is stored; one may have where their count is made even."""
    count = 0
    for j in range(x.size):
        count += 1 if -x[j] > known.rounding * entries[j] and known.scale > known.rounding else 0
    for j in range(x.size):
        wrong[j] |= count > (1 if even else 0) and -x[j] > known.rounding * entries[j]


@part
def _mark(x: Floats, entries: Words, shifts: Floats, known: Known, books: tuple[Floats, Book], marks: Bools) -> int:
    """Mark weights of a block where another entry is nearer; returns of how many groups there are such."""
    points, book = books
    count = 0
    for g in range(entries.size):
        here = Known(known.scale, known.rounding, known.apart, shifts[g])
        other = _find_better(x[g * book.size : (g + 1) * book.size], entries[g], here, points, book)
        count += 1 if other >= 0 else 0
        for j in range(book.size):
            marks[g * book.size + j] = other >= 0 and points[other, j] != points[entries[g], j]
    return count


@part
def _fits(x: Floats, known: Known, bound: Bound) -> bool:
    """Whether a block's scale is about one that its largest weight needs."""
    largest, finite = ZERO, known.scale < INFINITY
    for j in range(x.size):
        largest = max(largest, abs(x[j]))
        finite &= abs(x[j]) < INFINITY
    most, least = largest * bound.most + known.rounding, largest * bound.least - known.rounding
    return bool(finite & (known.scale <= most) & (known.scale >= least))


@part
def _known(groups: Groups, b: int, k: int, bound: Bound) -> Known:
    """What is known of block k of a super-block, but for the shifts of its groups."""
    scale = groups.scale[b, k]
    rounding = f32(f32(groups.step[b] + bound.moved * scale) + _SMALLEST)
    return Known(scale, rounding, bound.apart, ZERO)


@part
def _mark_blocks(x: Floats, groups: Groups, b: int, books: tuple[Floats, Book], bound: Bound, marks: Bools) -> None:
    """Mark weights [blocks, block] of super-block b where another entry is nearer, or the scale is none for them.

    Encoders that keep entries while they move a scale do so in a few blocks: those are judged by other scales too.
    """
    blocks, block = marks.shape
    per_block = groups.entries.shape[1] // blocks
    shifts = np.empty(per_block, np.float32)
    counts, trial, suspect = np.zeros(blocks, np.int64), np.empty(block, np.bool_), 0
    for turn in range(1 + bound.factors.size):
        for k in range(blocks):
            known, weights = _known(groups, b, k, bound), x[k * block : (k + 1) * block]
            fits = _fits(weights, known, bound)
            for j in range(block if turn == 0 else 0):
                marks[k, j] = not fits
            if fits and known.scale > ZERO and (turn == 0 or (counts[k] > 0 and 2 * suspect <= blocks)):
                scale = known.scale * (bound.factors[turn - 1] if turn else ONE)
                tried = Known(scale, known.rounding, known.apart, known.shift)
                first = k * per_block
                for g in range(per_block):
                    shifts[g] = _shift(groups, b, first + g, groups.entries.shape[1])
                count = _mark(weights, groups.entries[b, first : first + per_block], shifts, tried, books, trial)
                if turn == 0:
                    suspect += 1 if count else 0
                if turn == 0 or count < counts[k]:
                    counts[k] = count
                    for j in range(block):  # a whole row at once takes 2 s to compile, for numba's message
                        marks[k, j] = trial[j]


@kernel
def compare(
    weights: Floats, groups: Groups, books: tuple[Floats, Book], bound: Bound, wrong: Bools, values: Floats
) -> None:
    """Fill `values` as `read` does, and `wrong` where weights [n, weights] cannot have been stored so."""
    (points, book), columns, blocks = books, weights.shape[1], groups.scale.shape[1]
    read(groups, points, values)
    x, entries, marks = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.bool_)
    for b in range(weights.shape[0]):
        for j in range(columns):
            x[j] = weights[b, j] * _sign(groups, b, j)
            entries[j] = points[groups.entries[b, j // book.size], j % book.size]
        _mark_blocks(x, groups, b, books, bound, marks.reshape(blocks, columns // blocks))
        for j in range(columns):
            wrong[b, j] = marks[j] | (not abs(x[j]) < INFINITY)
        for g in range(0, columns if groups.signs.shape[1] else 0, 8):
            known = _known(groups, b, g * blocks // columns, bound)
            _check_signs(x[g : g + 8], known, entries[g : g + 8], bound.even, wrong[b, g : g + 8])

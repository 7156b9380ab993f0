"""The search for scales and codebook entries: IQ3, IQ2 and IQ1, 64 blocks side by side as in lanes.py.

Candidate scales put a block's largest weight at several places. For each, the weights of a group are rounded, each to
its nearest level, and a table has the entries nearest to these levels. With the best scale the search goes on: of
several near entries the one with the least weighted error, and the scale that suits these entries best. Steps are then
chosen for all blocks of a super-block together, and entries once more for the scales as they will be read.

Of the rows of s, A is 1 / scale, and Q and QQ are the weighted sums of x * c and c * c, c what an entry stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml import lanes as at
from neoxconv.quant.kernels import HALF, ONE, ZERO, f32, i32, kernel, part, u8, u32

Words = npt.NDArray[np.uint32]
Levels = npt.NDArray[np.int32]

_COMBINATION = at.LOW  # a row of s: which shifts are the best


class Book(NamedTuple):
    """A codebook: groups have `size` weights, of which level l stands for low + l * gap, the last for `extra` more.

    `near` [levels ** size, kept]: for any levels the entries nearest to them, the nearest first. Bits 16 and up of one
    are its number; below are its levels, `bits` each.
    """

    size: int
    levels: int
    bits: int
    low: np.float32
    gap: np.float32
    extra: np.float32
    near: Words


class Form(NamedTuple):
    """How many blocks a super-block has, and how many scales there are: 1, 3, 5, ... steps.

    `signs`: they are stored apart; `even`: of each eight an even count is negative. `shifts` [combinations, groups] is
    what may be added to the entries of a block.
    """

    subs: int
    scales: int
    signs: bool
    even: bool
    shifts: Floats


class Tries(NamedTuple):
    """Where the largest weight is put, how much the largest scale may fall short of the last, the turns of entries and
    scale, and how many entries are tried in these, and at last."""

    grid: Floats
    trims: Floats
    turns: int
    tried: int
    at_last: int


class Found(NamedTuple):
    """Entries and their shifts [blocks, groups], signs [blocks, eights], scales and steps [blocks]."""

    entries: Words
    shifts: Floats
    signs: Words
    scales: Bytes
    steps: Floats


class _Work(NamedTuple):
    """Scratch, `LANES` wide: weights, what they are worth, numbers as in lanes.py; entries, shifts and signs; of one
    group its weights in scales, the row of `near`, the least error, that of an entry, and the entry."""

    x: Floats
    w: Floats
    s: Floats
    entries: Words
    shifts: Floats
    signs: Words
    y: Floats
    place: Floats
    least: Floats
    error: Floats
    entry: Words


@part
def _value(entry: np.uint32, j: int, book: Book) -> np.float32:
    """What an entry stands for at place j of a group, in scales."""
    level = f32(i32((entry >> u32(j * book.bits)) & u32((1 << book.bits) - 1)))
    return f32(book.low + level * book.gap + (book.extra if level == f32(book.levels - 1) else ZERO))


@part
def _take_signs(work: _Work, n: int, even: bool) -> None:
    """Leave magnitudes. Where an odd count of eight is negative, the one that matters least takes the other sign."""
    x, w, odd, least, place = work.x, work.w, work.entry, work.least, work.place
    for b in range(n // 8):
        signs = work.signs[b]
        for i in range(at.LANES):
            signs[i], odd[i], least[i], place[i] = u32(0), u32(0), at.INFINITY, ZERO
        for j in range(8):
            for i in range(at.LANES):
                value = x[8 * b + j, i]
                negative = u32(1) if value < ZERO else u32(0)
                signs[i] |= negative << u32(j)
                odd[i] ^= negative
                x[8 * b + j, i] = abs(value)
                cost = w[8 * b + j, i] * abs(value)
                less = cost < least[i]
                least[i] = cost if less else least[i]
                place[i] = f32(j) if less else place[i]
        for j in range(8 if even else 0):
            for i in range(at.LANES):
                turned = (odd[i] == u32(1)) & (place[i] == f32(j))
                x[8 * b + j, i] = -x[8 * b + j, i] if turned else x[8 * b + j, i]
                signs[i] ^= u32(1 << j) if turned else u32(0)


@part
def _round(work: _Work, k: int, book: Book) -> None:
    """Group k in scales, and the row of `near` for its nearest levels."""
    x, s, y, place, shift = work.x, work.s, work.y, work.place, work.shifts[k]
    per_gap, top, levels = ONE / book.gap, f32(book.levels - 1), f32(book.levels)
    for i in range(at.LANES):
        place[i] = ZERO
    for j in range(book.size):
        for i in range(at.LANES):
            value = x[k * book.size + j, i] * s[at.A, i] - shift[i]
            y[j, i] = value
            place[i] = place[i] * levels + at.nearest((value - book.low) * per_gap, ZERO, top)


@part
def _choose(work: _Work, k: int, book: Book, tried: int) -> None:
    """For group k the entry with the least weighted error of the `tried` nearest to its levels."""
    w, y, place, least, error, entry = work.w, work.y, work.place, work.least, work.error, work.entry
    best = work.entries[k]
    for i in range(at.LANES):
        least[i] = at.INFINITY
        best[i] = book.near[u32(place[i]), 0]
    for t in range(tried if tried > 1 else 0):
        for i in range(at.LANES):
            error[i] = ZERO
            entry[i] = book.near[u32(place[i]), t]
        for j in range(book.size):
            for i in range(at.LANES):
                e = y[j, i] - _value(entry[i], j, book)
                error[i] += w[k * book.size + j, i] * e * e
        for i in range(at.LANES):
            less = error[i] < least[i]
            least[i] = error[i] if less else least[i]
            best[i] = entry[i] if less else best[i]


@part
def _assign(work: _Work, n: int, book: Book, tried: int) -> None:
    """Entries for the scales 1 / A, and their sums."""
    x, w, s = work.x, work.w, work.s
    for i in range(at.LANES):
        s[at.Q, i], s[at.QQ, i] = ZERO, ZERO
    for k in range(n // book.size):
        _round(work, k, book)
        _choose(work, k, book, tried)
        entry, shift = work.entries[k], work.shifts[k]
        for j in range(book.size):
            for i in range(at.LANES):
                c = _value(entry[i], j, book) + shift[i]
                a = w[k * book.size + j, i] * c
                s[at.Q, i] += a * x[k * book.size + j, i]
                s[at.QQ, i] += a * c


@part
def _begin(work: _Work, n: int, middle: np.float32) -> None:
    """The largest magnitudes; no candidate is the best yet."""
    x, s = work.x, work.s
    for i in range(at.LANES):
        s[at.SPAN, i] = ZERO
    for j in range(n):
        for i in range(at.LANES):
            s[at.SPAN, i] = max(s[at.SPAN, i], abs(x[j, i]))
    for i in range(at.LANES):
        s[at.ERROR, i], s[at.SCALE, i], s[_COMBINATION, i] = ZERO, s[at.SPAN, i] / middle, ZERO


@part
def _fit(s: Floats, combination: int) -> None:
    """The scales that suit the entries best; of candidates, which have a combination of shifts, if they err less."""
    for i in range(at.LANES):
        scale = s[at.Q, i] / s[at.QQ, i] if (s[at.QQ, i] > ZERO) & (s[at.Q, i] > ZERO) else ZERO
        gain = scale * s[at.Q, i]  # what the scale takes away of the weighted sum of squares
        better = (gain > s[at.ERROR, i]) if combination >= 0 else scale > ZERO
        s[at.ERROR, i] = gain if better else s[at.ERROR, i]
        s[at.SCALE, i] = scale if better else s[at.SCALE, i]
        s[_COMBINATION, i] = f32(combination) if better & (combination >= 0) else s[_COMBINATION, i]


@part
def _set_out(work: _Work, form: Form, grid: Floats, turn: int) -> None:
    """The shifts of a turn and its scales, 1 / A: a candidate's, or the best ones."""
    s, shifts = work.s, form.shifts
    candidate = turn < grid.size * shifts.shape[0]
    for k in range(shifts.shape[1]):
        for i in range(at.LANES):
            work.shifts[k, i] = shifts[turn % shifts.shape[0] if candidate else i32(s[_COMBINATION, i]), k]
    part = grid[turn // shifts.shape[0]] if candidate else ONE
    for i in range(at.LANES):
        whole = s[at.SPAN, i] if candidate else s[at.SCALE, i]
        s[at.A, i] = part / whole if whole > at.TINY else ZERO


@part
def _round_scales(s: Floats, form: Form, trims: Floats) -> None:
    """Scales as odd multiples of a step, from steps that put the largest one a little below the last multiple.

    Each step is then made the one that suits its multiples best; a super-block's least error wins.
    """
    last = f32(form.scales - 1)
    for i in range(at.LANES):
        s[at.BEST_TOTAL, i] = at.INFINITY
    for t in range(trims.size):
        for group in range(0, at.LANES, form.subs):
            largest, q, qq = ZERO, ZERO, ZERO
            for i in range(group, group + form.subs):
                largest = max(largest, s[at.SCALE, i])
            step = f32(largest / (at.TWO * last + ONE - trims[t]))
            per_step = ONE / step if step > at.TINY else ZERO
            for i in range(group, group + form.subs):
                times = at.TWO * at.nearest((s[at.SCALE, i] * per_step - ONE) * HALF, ZERO, last) + ONE
                s[at.TRY_SCALE, i], s[at.TRY_LEAST, i] = times, ZERO
                q += times * s[at.Q, i]
                qq += times * times * s[at.QQ, i]
            step = at.rounded_to_half(f32(q / qq) if (q > ZERO) & (qq > ZERO) else step)
            for i in range(group, group + form.subs):
                scale = s[at.TRY_SCALE, i] * step
                s[at.TRY_STEP, i] = step
                s[at.TRY_ERROR, i] = scale * scale * s[at.QQ, i] - at.TWO * scale * s[at.Q, i]
        at.keep_total(s, form.subs, t == 0)
    for i in range(at.LANES):
        s[at.SCALE, i] = s[at.PICK_SCALE, i] * s[at.PICK_STEP, i]


@part
def _write_out(work: _Work, first: int, found: Found) -> None:
    """The lanes' entries, shifts, signs, scales and steps."""
    s = work.s
    for i in range(min(at.LANES, found.scales.size - first)):
        for k in range(found.entries.shape[1]):
            found.entries[first + i, k] = work.entries[k, i] >> u32(16)
            found.shifts[first + i, k] = work.shifts[k, i]
        for b in range(found.signs.shape[1]):
            found.signs[first + i, b] = work.signs[b, i]
        found.scales[first + i] = u8(i32((s[at.PICK_SCALE, i] - ONE) * HALF))
        found.steps[first + i] = s[at.PICK_STEP, i]


@kernel
def search(weights: Floats, worth: at.Worth, forms: tuple[Form, Book], tries: Tries, found: Found) -> None:
    """Find what is to be stored of blocks [m, n].

    Candidates first, then entries and scales in turns, at last entries for scales that are rounded to steps: one loop
    for all, so that what it calls is compiled once.
    """
    (form, book), n, work = forms, weights.shape[1], _scratch()
    candidates = tries.grid.size * form.shifts.shape[0]
    last = candidates + tries.turns
    for first in range(0, weights.shape[0], at.LANES):
        at.load(weights, first, work.x)
        at.weigh(work.x, work.w, work.s, n, first, worth)
        if form.signs:
            _take_signs(work, n, form.even)
        _begin(work, n, tries.grid[tries.grid.size // 2])
        for turn in range(last + 1):
            if turn == last:
                _round_scales(work.s, form, tries.trims)
            _set_out(work, form, tries.grid, turn)
            _assign(work, n, book, 1 if turn < candidates else tries.tried if turn < last else tries.at_last)
            _fit(work.s, turn % form.shifts.shape[0] if turn < candidates else -1)
        _write_out(work, first, found)


@part
def _scratch() -> _Work:
    """Memory for one group of lanes."""
    x, w = np.empty((at.MOST, at.LANES), np.float32), np.empty((at.MOST, at.LANES), np.float32)
    s, shifts = np.zeros((at.ROWS, at.LANES), np.float32), np.zeros((8, at.LANES), np.float32)
    entries, signs = np.zeros((8, at.LANES), np.uint32), np.zeros((4, at.LANES), np.uint32)
    y, entry = np.empty((8, at.LANES), np.float32), np.empty(at.LANES, np.uint32)
    place, least, error = np.empty(at.LANES, np.float32), np.empty(at.LANES, np.float32), np.empty(at.LANES, np.float32)
    return _Work(x, w, s, entries, shifts, signs, y, place, least, error, entry)


@kernel
def find_near(values: Levels, points: Levels, words: Words, near: Words) -> None:
    """Fill `near` [levels ** size, kept] with words of the points [entries, size] nearest to each, nearest first.

    Row p is for the levels that are the digits of p, of these `values` [levels]; of equally near ones the first.
    """
    kept, size = near.shape[1], points.shape[1]
    distances, place = np.empty(kept, np.int32), np.empty(size, np.int32)
    for p in range(near.shape[0]):
        distances[:] = i32(1 << 30)
        digits = p
        for j in range(size - 1, -1, -1):
            place[j] = values[digits % values.size]
            digits //= values.size
        for e in range(points.shape[0]):
            distance = i32(0)
            for j in range(size):
                distance += (place[j] - points[e, j]) * (place[j] - points[e, j])
            t = kept
            while t > 0 and distances[t - 1] > distance:
                t -= 1
                if t < kept - 1:
                    distances[t + 1], near[p, t + 1] = distances[t], near[p, t]
            if t < kept:
                distances[t], near[p, t] = distance, words[e]

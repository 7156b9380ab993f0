"""Kernels of 4-bit floating point: the scales that err least, 64 blocks side by side as in lanes.py, and the verdict.

Of sizes over a scale, the values are 0, 1, 2, 3, 4, then 6, 8, then 12. Where two are as near, the smaller one is
taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.ggml import lanes as at
from neoxconv.quant.ggml.check_kernels import Meaning, judge
from neoxconv.quant.kernels import HALF, INFINITY, ONE, ZERO, as_bits, f32, i32, kernel, part, u8, u32

_TINY = f32(1e-6)  # of float32 arithmetic, a part of a weight
_LARGEST, _HUGE = f32(12), f32(3.4e38)
_TWO, _FOUR, _EIGHT, _QUARTER = f32(2), f32(4), f32(8), f32(0.25)
_Words = npt.NDArray[np.uint32]


class Scales(NamedTuple):
    """What a scale's bytes stand for, up to `highest`, and the largest weight that each can hold, both [258].

    `first` [2048]: by the upper bits of a weight the least byte that may hold it; one or two more are needed at most.
    `tried`: bytes beyond the least that holds a block's largest weight.
    """

    values: Floats
    most: Floats
    first: Bytes
    tried: npt.NDArray[np.int64]
    highest: int


class _Work(NamedTuple):
    """Scratch, `LANES` wide: weights; bytes of scales: the least, a tried one, the best; numbers of each block."""

    x: Floats
    least: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]
    best: npt.NDArray[np.int32]
    scale: Floats
    inverse: Floats
    error: Floats
    least_error: Floats
    four: _Words


@part
def _find_least(work: _Work, n: int, scales: Scales) -> None:
    """The bytes of the least scales with which no weight is cut, or the highest."""
    top, least = work.error, work.least
    for i in range(at.LANES):
        top[i] = ZERO
    for j in range(n):
        for i in range(at.LANES):
            top[i] = max(top[i], abs(work.x[j, i]))
    for i in range(at.LANES):
        place = i32(scales.first[as_bits(top[i]) >> u32(20)])
        place += i32(1) if scales.most[place] < top[i] else i32(0)
        place += i32(1) if scales.most[place] < top[i] else i32(0)
        least[i] = min(place, i32(scales.highest))


@part
def _try(work: _Work, beyond: int, scales: Scales) -> None:
    """The scales so many bytes beyond the least ones."""
    for i in range(at.LANES):
        work.place[i] = min(max(work.least[i] + i32(beyond), i32(0)), i32(scales.highest))
        work.scale[i] = scales.values[work.place[i]]


@part
def _measure(work: _Work, n: int, worth: Floats) -> None:
    """The sums of errors squared, each times its worth [n, LANES], all alike without one.

    A product in place of a quotient: it is off only where two values are as near, and then both err alike.
    """
    x, scale, inverse, error = work.x, work.scale, work.inverse, work.error
    for i in range(at.LANES):
        inverse[i] = min(ONE / scale[i], _HUGE) if scale[i] > ZERO else ZERO
        error[i] = ZERO
    for j in range(n):
        for i in range(at.LANES):
            size = abs(x[j, i])
            y = min(f32(size * inverse[i]), _LARGEST)
            gap = at.pick(y > _EIGHT, _FOUR, at.pick(y > _FOUR, _TWO, ONE))
            part_of = at.pick(y > _EIGHT, _QUARTER, at.pick(y > _FOUR, HALF, ONE))
            e = size - np.ceil(f32(y * part_of) - HALF) * gap * scale[i]
            error[i] += (worth[j, i] * e * e) if worth.size else e * e


@part
def _keep(work: _Work, first: bool) -> None:
    """Take the tried scales where they err less; all of them the first time."""
    for i in range(at.LANES):
        better = first | (work.error[i] < work.least_error[i])
        work.least_error[i] = at.pick(better, work.error[i], work.least_error[i])
        work.best[i] = work.place[i] if better else work.best[i]


@part
def _code(weight: np.float32, scale: np.float32) -> np.uint32:
    """The code nearest to a weight; no zero is negative."""
    y = min(f32(abs(weight) / scale), _LARGEST) if scale > ZERO else ZERO
    part_of = at.pick(y > _EIGHT, _QUARTER, at.pick(y > _FOUR, HALF, ONE))
    skipped = at.pick(y > _EIGHT, _FOUR, at.pick(y > _FOUR, _TWO, ZERO))
    code = u32(i32(np.ceil(f32(y * part_of) - HALF) + skipped))
    return u32(code | (u32(as_bits(weight) >> u32(28)) & u32(8) if code > u32(0) else u32(0)))


@part
def _byte(low: Floats, high: Floats, scale: Floats, i: int) -> np.uint32:
    """A byte of lane i: the codes of a weight of the lower and of one of the upper half."""
    return u32(_code(low[i], scale[i]) | u32(_code(high[i], scale[i]) << u32(4)))


@part
def _write_out(work: _Work, n: int, first: int, scales: Scales, found: Bytes, codes: _Words) -> None:
    """The lanes' bytes of scales, and their codes, four bytes at a time (of a little-endian machine)."""
    lanes, x, four, half = min(at.LANES, found.size - first), work.x, work.four, n // 2
    for i in range(at.LANES):
        work.scale[i] = scales.values[work.best[i]]
    for k in range(half // 4):
        low, high, scale = x[4 * k : 4 * k + 4], x[half + 4 * k : half + 4 * k + 4], work.scale
        for i in range(at.LANES):
            lower = u32(_byte(low[0], high[0], scale, i) | u32(_byte(low[1], high[1], scale, i) << u32(8)))
            upper = u32(_byte(low[2], high[2], scale, i) | u32(_byte(low[3], high[3], scale, i) << u32(8)))
            four[i] = u32(lower | u32(upper << u32(16)))
        for i in range(lanes):
            codes[first + i, k] = four[i]
    for i in range(lanes):
        found[first + i] = u8(work.best[i])


@kernel
def search(weights: Floats, worth: Floats, scales: Scales, found: Bytes, codes: _Words) -> None:
    """Fill `found` [blocks] with the bytes of the best scales tried, and `codes` [blocks, n / 8] for weights [blocks,
    n]; `worth` [m, n, LANES] of errors repeats itself, or is empty."""
    n, floats, numbers = weights.shape[1], np.empty((4, at.LANES), np.float32), np.zeros((3, at.LANES), np.int32)
    work = _Work(
        np.empty((at.MOST, at.LANES), np.float32), numbers[0], numbers[1], numbers[2],
        floats[0], floats[1], floats[2], floats[3], np.empty(at.LANES, np.uint32),
    )  # fmt: skip
    for first in range(0, weights.shape[0], at.LANES):
        at.load(weights, first, work.x)
        _find_least(work, n, scales)
        for t in range(scales.tried.size):
            _try(work, scales.tried[t], scales)
            if worth.size:
                _measure(work, n, worth[first // at.LANES % worth.shape[0]])
            else:
                _measure(work, n, np.empty((0, at.LANES), np.float32))
            _keep(work, t == 0)
        _write_out(work, n, first, scales, found, codes)


@kernel
def compare(weights: Floats, codes: Bytes, numbers: tuple[Floats, Floats], meaning: Meaning, wrong: Bools) -> None:
    """Fill `wrong` where a weight is not explained (check_kernels.py): it, weights and codes [n, block]; `numbers` are
    scales, and what explains an error besides [n], NaN where nothing does."""
    for b in range(weights.shape[0]):
        scale, fixed = numbers[0][b], numbers[1][b]
        judge(weights[b], codes[b], (scale, ZERO, scale, _TINY, ZERO, fixed, INFINITY), meaning, wrong[b])

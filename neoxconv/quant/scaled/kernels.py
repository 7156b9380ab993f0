"""Inner loops of encodings whose scales lie in tensors of their own; written as in kernels.py, for the same reasons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import HALF, INFINITY, ONE, ZERO, extremes, f32, i32, kernel, part, u8, u32

SIZE = u32(0x7FFFFFFF)  # the bits of a float32 without its sign
ROUNDER = f32(1.5 * 2**23)  # added and taken away, it leaves the nearest integer, ties to even
_TINY = f32(1e-38)  # what bitsandbytes takes for the largest weight of a block of zeros
_LANES = 8  # float32 in a register: how torch adds up on every x86 CPU


@kernel
def largest(groups: npt.NDArray[np.uint32], sizes: npt.NDArray[np.uint32]) -> None:
    """The largest magnitude of every row of float32 bits [n, k], as bits: magnitudes are ordered as their bits are."""
    for g in range(groups.shape[0]):
        top = u32(0)
        row = groups[g]
        for i in range(row.size):
            top = max(top, row[i] & SIZE)
        sizes[g] = top


@kernel
def ends(groups: npt.NDArray[np.int32], found: Floats) -> None:
    """The least and the largest number [n, 2] of every row of float32 bits [n, k]."""
    for g in range(groups.shape[0]):
        found[g, 0], found[g, 1] = extremes(groups[g])


@kernel
def nearest_codes(blocks: Floats, sizes: Floats, middles: Floats, order: Bytes, packed: Bytes) -> None:
    """Codes of 4 bits, two in a byte, the first in its upper half: blocks [n, k], sizes [n], packed [n, k / 2].

    A weight over its block's size lies above so many of the 15 `middles` (not on one); `order` gives the code for that.
    """
    count, width = blocks.shape
    ranks = np.empty(width, np.int32)
    for b in range(count):
        inverse = ONE / max(sizes[b], _TINY)
        row, out = blocks[b], packed[b]
        for i in range(row.size):
            scaled = row[i] * inverse
            rank = i32(0)
            for k in range(15):
                rank += i32(not scaled <= middles[k])
            ranks[i] = rank
        for j in range(out.size):
            out[j] = u8(order[ranks[2 * j]] << 4) | order[ranks[2 * j + 1]]


@kernel
def fit_sizes(blocks: Floats, matters: Floats, table: Floats, tried: Floats, sizes: Floats) -> None:
    """Multiply sizes [n], the largest weights of blocks [n, k], each by one of the numbers `tried`.

    It is the one with which nearest codes, which stand for the ascending `table` times the size, err least: squares
    times what `matters` [n, k]. Of two that are as good the first wins; what is not finite stays as it is.
    """
    count, width = blocks.shape
    middles = (table[:-1] + table[1:]) * HALF
    places = np.empty(width, np.int32)
    shares = np.empty(width, np.float32)
    for b in range(count):
        inverse = ONE / max(sizes[b], _TINY)
        row, best, chosen = blocks[b], INFINITY, ONE
        for i in range(row.size):
            shares[i] = row[i] * inverse
        for t in range(tried.size):
            for i in range(shares.size):
                place = i32(0)
                for k in range(middles.size):
                    place += i32(shares[i] > middles[k] * tried[t])
                places[i] = place
            wrong = ZERO
            for i in range(shares.size):
                error = shares[i] - table[places[i]] * tried[t]
                wrong += error * error * matters[b, i]
            if wrong < best:
                best, chosen = wrong, tried[t]
        sizes[b] *= chosen


@kernel
def whole_steps(rows: Floats, factors: Floats, codes: npt.NDArray[np.int8]) -> None:
    """Rows [n, k] times the factor [n] of each, rounded to nearest, ties to even."""
    for r in range(rows.shape[0]):
        row, out, factor = rows[r], codes[r], factors[r]
        for i in range(row.size):
            out[i] = np.int8(i32(f32(f32(row[i] * factor) + ROUNDER) - ROUNDER))


@part
def _lane_sums(values: Floats) -> Floats:
    """The sums of every column of [n, k], in the order in which torch's `multi_row_sum` (SumKernel.cpp) adds rows.

    Rows are added to one accumulator; when it has `step` of them it is added to the next of four, and so on.
    """
    count, width = values.shape
    bits = 0
    while (1 << bits) < count:
        bits += 1
    power = max(4, bits // 4)
    step = 1 << power
    levels = np.zeros((4, width), np.float32)
    i = 0
    while i + step <= count:
        for _ in range(step):
            for k in range(width):
                levels[0, k] += values[i, k]
            i += 1
        for level in range(1, 4):
            for k in range(width):
                levels[level, k] += levels[level - 1, k]
                levels[level - 1, k] = ZERO
            if i % (step ** (level + 1)):
                break  # this accumulator does not have `step` of the one before it yet
    while i < count:
        for k in range(width):
            levels[0, k] += values[i, k]
        i += 1
    for level in range(1, 4):
        for k in range(width):
            levels[0, k] += levels[level, k]
    totals: Floats = levels[0]
    return totals


@kernel
def mean(values: Floats) -> np.float32:
    """The mean of float32 numbers as torch gives it on one thread of an x86 CPU, bit for bit.

    As `vectorized_inner_sum` and, below a register, `scalar_inner_sum` do (aten/src/ATen/native/cpu/SumKernel.cpp).
    Four registers of eight lanes are summed side by side, then the registers, the rest of them, the rest, the lanes;
    of less than one register four numbers side by side, then the rest.
    """
    if values.size < _LANES:
        total = values[0]
        for i in range(4, values.size):
            total += values[i]
        for i in range(1, min(4, values.size)):
            total += values[i]
        return f32(total / f32(values.size))
    registers = values.size // _LANES
    quads = registers // 4
    sums = _lane_sums(values[: quads * 4 * _LANES].reshape(quads, 4 * _LANES))
    lanes = sums[:_LANES].copy()
    for register in range(quads * 4, registers):
        for k in range(_LANES):
            lanes[k] += values[register * _LANES + k]
    for quarter in range(1, 4):
        for k in range(_LANES):
            lanes[k] += sums[quarter * _LANES + k]
    total = ZERO
    for i in range(registers * _LANES, values.size):
        total += values[i]
    for k in range(_LANES):
        total += lanes[k]
    return f32(total / f32(values.size))

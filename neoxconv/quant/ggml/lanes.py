"""Blocks side by side: 64 of them at a time, each in a lane, for the searches behind ggml's super-blocks.

Every sum runs over its own block's weights in a fixed order, and the lanes fill the vector registers, whatever their
width: the same bytes on every machine, without fastmath and without FMA.

A candidate scale gives every weight y = a * x + b, its code q (the nearest) and the rest e = y - q. Sums of q, q * q,
e, e * q and e * e, each weighted, hold all there is to know: the best line through these codes (least squares) and its
error, without the cancellation that sums of x * x bring. They also give the error of any other scale and minimum with
the same codes, which is how those are rounded to their few bits: not each to its nearest, but together.

The searches import this file as `at`: s[at.SCALE, i] is the scale in lane i of their scratch s.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml.searches import ABOVE
from neoxconv.quant.kernels import (
    ZERO,
    as_bits,
    as_float,
    f32,
    float_bits,
    half_bits,
    i32,
    kernel,
    part,
    u8,
    u32,
    u64,
)

_Eights = npt.NDArray[np.uint64]

# How much errors matter: kind, share; importance [m, n, LANES], which repeats itself, and spread [blocks], or empty.
Worth = tuple[int, float, Floats, Floats]
Found = tuple[npt.NDArray[np.uint32], Floats]  # codes [blocks, n / 4], four in each; integers and steps [blocks, 4]

LANES, MOST = 64, 32  # blocks side by side; weights in a block at most
MAGIC = f32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer
TWO, INFINITY, TINY = f32(2), f32(np.inf), f32(1e-15)

# Rows of the scratch, one number for each lane: a candidate's error and scales, of the best line through its codes,
# and its weighted sums; the same of the best one so far; what integers and steps err in all; the same of the best.
ERROR, SCALE, LEAST, A, B, Q, QQ, E, EQ, EE = range(10)
BEST_ERROR, BEST_SCALE, BEST_LEAST, BEST_A, BEST_B, BEST_Q, BEST_QQ, BEST_E, BEST_EQ, BEST_EE = range(10, 20)
TRY_TOTAL, TRY_SCALE, TRY_LEAST, TRY_STEP, TRY_FLOOR = range(20, 25)
BEST_TOTAL, PICK_SCALE, PICK_LEAST, PICK_STEP, PICK_FLOOR = range(25, 30)
LOW, SPAN, SUM, SIZE, TRY_ERROR, UNIT, PER_QQ = range(30, 37)
_SPARE, ROWS = 37, 47


@part
def rounded_to_half(value: np.float32) -> np.float32:
    """The float16 nearest to a number; infinity where it is too large."""
    return as_float(float_bits(half_bits(as_bits(value))))


@part
def load(weights: Floats, first: int, x: Floats) -> None:
    """Blocks [first + lane] as columns of `x`; zeros beyond the last one and for what is not finite."""
    for i in range(LANES):
        if first + i < weights.shape[0]:
            row = weights[first + i]
            for j in range(row.size):
                x[j, i] = pick(abs(row[j]) < INFINITY, row[j], ZERO)
        else:
            for j in range(weights.shape[1]):
                x[j, i] = ZERO


@part
def weigh(x: Floats, w: Floats, s: Floats, n: int, first: int, worth: Worth) -> None:
    """How much the error of each weight matters; by the columns' importance where there is one."""
    if worth[2].size:
        _weigh_columns(x, w, n, first, worth)
    else:
        _weigh_alone(x, w, s, n, worth)


@part
def _weigh_alone(x: Floats, w: Floats, s: Floats, n: int, worth: Worth) -> None:
    """ABOVE: |x| + share * root mean square; SQUARE: x * x + share * mean square, both of the block."""
    kind, share = worth[0], f32(worth[1])
    for i in range(LANES):
        s[SIZE, i] = ZERO
    for j in range(n):
        for i in range(LANES):
            s[SIZE, i] += x[j, i] * x[j, i]
    for i in range(LANES):
        mean = s[SIZE, i] / f32(n)
        s[SIZE, i] = share * (np.sqrt(mean) if kind == ABOVE else mean)
    for j in range(n):
        for i in range(LANES):
            w[j, i] = s[SIZE, i] + (abs(x[j, i]) if kind == ABOVE else x[j, i] * x[j, i])


@part
def _weigh_columns(x: Floats, w: Floats, n: int, first: int, worth: Worth) -> None:
    """importance * sqrt(x * x + spread), or importance alone without spreads."""
    importance, spread = worth[2][first // LANES % worth[2].shape[0]], worth[3][first : first + LANES]
    for j in range(n):
        for i in range(LANES):
            w[j, i] = importance[j, i]
        if spread.size:
            for i in range(LANES):
                w[j, i] *= np.sqrt(x[j, i] * x[j, i] + spread[i])


@kernel
def mean_squares(groups: Floats, share: float, means: Floats) -> None:
    """`share` of the mean square of each row of `groups` [m, n]; four rows at a time, as sums wait for their turn."""
    last = means.size - 1
    for m in range(0, means.size, 4):
        m1, m2, m3 = min(m + 1, last), min(m + 2, last), min(m + 3, last)
        row, row1, row2, row3 = groups[m], groups[m1], groups[m2], groups[m3]
        total, total1, total2, total3 = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
        for k in range(row.size):
            total += _square(row[k])
            total1 += _square(row1[k])
            total2 += _square(row2[k])
            total3 += _square(row3[k])
        means[m], means[m1] = f32(share * total / row.size), f32(share * total1 / row.size)
        means[m2], means[m3] = f32(share * total2 / row.size), f32(share * total3 / row.size)


@part
def _square(weight: np.float32) -> np.float32:
    """0 of what is not finite."""
    return pick(abs(weight) < INFINITY, weight * weight, ZERO)


@part
def pick(better: bool | np.bool_, new: np.float32, old: np.float32) -> np.float32:
    """One of two numbers that are both computed: a branch around one of them would keep its loop out of vectors."""
    return new if better else old


@part
def take(s: Floats, new: int, best: int, rows: int) -> None:
    """The rows from `new` on take the place of those from `best` on."""
    for row in range(rows):
        for i in range(LANES):
            s[best + row, i] = s[new + row, i]


@part
def keep(s: Floats, new: int, best: int, first: bool) -> None:
    """Take the rows between `new` and `best` for those from `best` on, in lanes where the first of them is less.

    The `first` time in all lanes. By way of spare rows: LLVM would make masked stores of a choice that goes where one
    side came from; AMD's are slow.
    """
    for row in range(best - new):
        for i in range(LANES):
            s[_SPARE + row, i] = pick(first | (s[new, i] < s[best, i]), s[new + row, i], s[best + row, i])
    take(s, _SPARE, best, best - new)


@part
def forget(s: Floats) -> None:
    """No candidate is the best yet."""
    for i in range(LANES):
        s[BEST_ERROR, i] = INFINITY
        for row in range(BEST_A, BEST_EE + 1):
            s[row, i] = ZERO


@part
def keep_total(s: Floats, subs: int, first: bool) -> None:
    """Take what was tried for the super-blocks whose whole error it lowers; for all of them the first time."""
    for group in range(0, LANES, subs):
        total = ZERO
        for i in range(group, group + subs):
            total += s[TRY_ERROR, i]
        for i in range(group, group + subs):
            s[TRY_TOTAL, i] = total
    keep(s, TRY_TOTAL, BEST_TOTAL, first)


@part
def nearest(y: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """The whole number nearest to y, from `low` to `high`."""
    return f32(min(max((y + MAGIC) - MAGIC, low), high))


@part
def _byte(code: np.float32) -> np.int32:
    """A code; what a NaN becomes fits into a byte too."""
    return i32(i32(code) & i32(255))


@part
def write_out(x: Floats, s: Floats, first: int, found: Found) -> None:
    """The lanes' codes, and their integers and steps.

    Four codes of a block are written as one integer (of a little-endian machine), which takes a third of the time.
    """
    fours, numbers = found
    lanes, four = min(LANES, fours.shape[0] - first), np.empty(LANES, np.int32)
    for k in range(fours.shape[1]):
        j = 4 * k
        for i in range(LANES):
            low = i32(_byte(x[j, i]) | i32(_byte(x[j + 1, i]) << i32(8)))
            four[i] = i32(low | i32(_byte(x[j + 2, i]) << i32(16)) | i32(_byte(x[j + 3, i]) << i32(24)))
        for i in range(lanes):
            fours[first + i, k] = u32(four[i])
    for i in range(lanes):
        numbers[first + i, 0], numbers[first + i, 1] = s[PICK_SCALE, i], s[PICK_LEAST, i]
        numbers[first + i, 2], numbers[first + i, 3] = s[PICK_STEP, i], s[PICK_FLOOR, i]


@kernel
def pack_plane(codes: _Eights, low: np.uint64, bits: np.uint64, shape: tuple[int, int, int], packed: _Eights) -> None:
    """Bits `low` to `low + bits` of codes [n, outer, count, inner] as bytes [n, outer, inner] of `count` codes each.

    Eight codes side by side are an integer, and so are eight bytes; `inner` counts these.
    """
    outer, count, inner = shape
    mask = u64(u64(u64(u64(1) << bits) - u64(1)) * u64(0x0101010101010101))
    for b in range(codes.shape[0]):
        for o in range(outer):
            for i in range(inner):
                word = u64(0)
                for k in range(count):
                    field = u64(u64(codes[b, (o * count + k) * inner + i] >> low) & mask)
                    word = u64(word | u64(field << u64(u64(k) * bits)))
                packed[b, o * inner + i] = word


@kernel
def unpack_plane(packed: Bytes, low: int, bits: int, shape: tuple[int, int, int], codes: Bytes) -> None:
    """Add the bits in the bytes of a plane to codes that are zero there; the inverse of `pack_plane`."""
    outer, count, inner = shape
    mask = u8((1 << bits) - 1)
    for b in range(codes.shape[0]):
        for o in range(outer):
            for k in range(count):
                for i in range(inner):
                    field = u8(u8(packed[b, o * inner + i] >> u8(k * bits)) & mask)
                    codes[b, (o * count + k) * inner + i] |= u8(field << u8(low))

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

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml.searches import ABOVE
from neoxconv.quant.kernels import ZERO, as_bits, as_float, f32, float_bits, half_bits, i32, kernel, part, u8

# How much errors matter: kind, share; importance [column blocks, n] and spread [blocks], or both empty.
Worth = tuple[int, float, Floats, Floats]

LANES, MOST = 64, 32  # blocks side by side; weights in a block at most
MAGIC = f32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer
TWO, INFINITY, TINY = f32(2), f32(np.inf), f32(1e-15)

# Rows of the scratch, one number for each lane.
A, B, Q, QQ, E, EQ, EE = range(7)  # the candidate, and its weighted sums
BEST_A, BEST_B, BEST_Q, BEST_QQ, BEST_E, BEST_EQ, BEST_EE = range(7, 14)  # of the best one so far, in the same order
_CANDIDATE_ROWS = 7
ERROR, SCALE, LEAST, LOW, SPAN, SUM, SIZE = range(14, 21)
STEP, FLOOR, TRY_SCALE, TRY_LEAST, TRY_ERROR, _TOTAL, BEST_TOTAL = range(21, 28)
PICK_SCALE, PICK_LEAST, PICK_STEP, PICK_FLOOR = range(28, 32)
ROWS = 32


@part
def rounded_to_half(value: np.float32) -> np.float32:
    """The float16 nearest to a number; infinity where it is too large."""
    return as_float(float_bits(half_bits(as_bits(value))))


@part
def load(weights: Floats, first: int, x: Floats) -> None:
    """Blocks [first + lane] as columns of `x`; zeros beyond the last one and for what is not finite."""
    for i in range(LANES):
        if first + i < weights.shape[0]:
            for j in range(weights.shape[1]):
                value = weights[first + i, j]
                x[j, i] = value if abs(value) < INFINITY else ZERO
        else:
            for j in range(weights.shape[1]):
                x[j, i] = ZERO


@part
def weigh(x: Floats, w: Floats, s: Floats, n: int, first: int, worth: Worth) -> None:
    """How much the error of each weight matters; by the columns' importance where there is one."""
    if worth[2].size:
        _weigh_columns(x, w, first, worth)
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
def _weigh_columns(x: Floats, w: Floats, first: int, worth: Worth) -> None:
    """importance * sqrt(x * x + spread), or importance alone without spreads."""
    importance, spread = worth[2], worth[3]
    for i in range(LANES):
        block = first + i
        mean = spread[block] if block < spread.size else ZERO
        for j in range(importance.shape[1]):
            w[j, i] = importance[block % importance.shape[0], j]
            if spread.size:
                w[j, i] *= np.sqrt(x[j, i] * x[j, i] + mean)


@kernel
def mean_squares(weights: Floats, group: int, share: float, spread: Floats) -> None:
    """`share` of the mean square of every `group` blocks [m, n] that follow each other, for each of them: [m]."""
    for begin in range(0, weights.shape[0], group):
        total = np.float64(0)
        for b in range(begin, begin + group):
            for j in range(weights.shape[1]):
                value = weights[b, j] if abs(weights[b, j]) < INFINITY else ZERO
                total += value * value
        for b in range(begin, begin + group):
            spread[b] = f32(share * total / (group * weights.shape[1]))


@part
def keep(s: Floats, i: int, better: bool) -> None:
    """Where it is better, the candidate is the best."""
    for row in range(_CANDIDATE_ROWS):
        s[BEST_A + row, i] = s[row, i] if better else s[BEST_A + row, i]


@part
def forget(s: Floats) -> None:
    """No candidate is the best yet."""
    for i in range(LANES):
        s[ERROR, i] = INFINITY
        for row in range(_CANDIDATE_ROWS):
            s[BEST_A + row, i] = ZERO


@part
def choose_total(s: Floats, subs: int, first: bool) -> None:
    """Take what was tried for the super-blocks whose whole error it lowers; for all of them the first time."""
    for group in range(0, LANES, subs):
        total = ZERO
        for i in range(group, group + subs):
            total += s[TRY_ERROR, i]
        for i in range(group, group + subs):
            s[_TOTAL, i] = total
    for i in range(LANES):
        better = (s[_TOTAL, i] < s[BEST_TOTAL, i]) | first
        s[BEST_TOTAL, i] = s[_TOTAL, i] if better else s[BEST_TOTAL, i]
        s[PICK_SCALE, i] = s[TRY_SCALE, i] if better else s[PICK_SCALE, i]
        s[PICK_LEAST, i] = s[TRY_LEAST, i] if better else s[PICK_LEAST, i]
        s[PICK_STEP, i] = s[STEP, i] if better else s[PICK_STEP, i]
        s[PICK_FLOOR, i] = s[FLOOR, i] if better else s[PICK_FLOOR, i]


@part
def nearest(y: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """The whole number nearest to y, from `low` to `high`."""
    return f32(min(max((y + MAGIC) - MAGIC, low), high))


@part
def write_out(x: Floats, s: Floats, first: int, codes: Bytes, numbers: Floats) -> None:
    """The lanes' codes [blocks, n], and their integers and steps [blocks, 4]."""
    for i in range(min(LANES, codes.shape[0] - first)):
        for j in range(codes.shape[1]):
            codes[first + i, j] = u8(i32(x[j, i]))
        numbers[first + i, 0], numbers[first + i, 1] = s[PICK_SCALE, i], s[PICK_LEAST, i]
        numbers[first + i, 2], numbers[first + i, 3] = s[PICK_STEP, i], s[PICK_FLOOR, i]


@kernel
def pack_plane(codes: Bytes, low: int, bits: int, shape: tuple[int, int, int], packed: Bytes) -> None:
    """Bits `low` to `low + bits` of codes [n, outer, count, inner] as bytes [n, outer, inner] of `count` codes each."""
    outer, count, inner = shape
    mask = u8((1 << bits) - 1)
    for b in range(codes.shape[0]):
        for o in range(outer):
            for i in range(inner):
                packed[b, o * inner + i] = u8(0)
            for k in range(count):
                for i in range(inner):
                    field = u8(u8(codes[b, (o * count + k) * inner + i] >> u8(low)) & mask)
                    packed[b, o * inner + i] |= u8(field << u8(k * bits))


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

"""Whole numbers of 2 to 8 bits, packed without gaps: written and read row by row, in one pass each.

As in compressed-tensors; where bits lie is said in dense_kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neoxconv.core.encoding import EXACT
from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.kernels import HALF, INFINITY, ZERO, as_bits, f32, i32, kernel, u8, u32
from neoxconv.quant.scaled.dense_kernels import EIGHT, copy, pack, unpack
from neoxconv.quant.scaled.kernels import ROUNDER
from neoxconv.quant.scaled.rounding_kernels import Rounding, rounded

_EXACT = f32(EXACT)


@kernel
def pack_rows(codes: Bytes, bits: int, packed: Bytes) -> None:
    """Rows of codes [n, k] as rows of bytes [n, whole words]; zeros fill the last word up."""
    whole = -(-codes.shape[1] // 32) * 32
    row, out = np.zeros(whole, np.uint8), np.empty(whole // EIGHT * bits, np.uint8)
    for r in range(codes.shape[0]):
        copy(codes[r], row)
        pack(row, bits, out)
        copy(out, packed[r])


@kernel
def unpack_rows(packed: Bytes, bits: int, codes: Bytes) -> None:
    """The way back: rows of bytes [n, whole words] as rows of codes [n, k]."""
    whole = -(-codes.shape[1] // 32) * 32
    row, taken = np.empty(whole, np.uint8), np.zeros(whole // EIGHT * bits, np.uint8)
    for r in range(codes.shape[0]):
        copy(packed[r], taken)
        unpack(taken, bits, row)
        copy(row, codes[r])


@kernel
def encode_rows(rows: Floats, scales: Floats, zeros: Floats, to: Rounding, bits: int, packed: Bytes) -> None:
    """Rows [n, k] over the scales [n, groups] of as many columns each, plus the zeros [n, groups], as packed codes.

    Both results are rounded to a type; codes are the nearest of -2**(bits - 1) to 2**(bits - 1) - 1, and stored from 0
    on.
    """
    count, columns = rows.shape
    width = columns // scales.shape[1]
    least, most = f32(-(1 << (bits - 1))), f32((1 << (bits - 1)) - 1)
    codes = np.empty((1, columns), np.uint8)
    for r in range(count):
        for g in range(scales.shape[1]):
            row, out = rows[r, g * width : (g + 1) * width], codes[0, g * width : (g + 1) * width]
            scale, zero = scales[r, g], zeros[r, g]
            for i in range(row.size):
                number = rounded(f32(rounded(f32(row[i] / scale), to) + zero), to)
                number = min(max(number, least), most)
                out[i] = u8(as_bits(f32(number + ROUNDER)) + u32(1 << (bits - 1)))  # the last bits: a whole number's
        pack_rows(codes, bits, packed[r : r + 1])


@kernel
def read_rows(packed: Bytes, scales: Floats, zeros: Floats, bits: int, values: Floats) -> None:
    """What packed codes stand for, values [n, k]: (code - zero) * scale, with the scales and zeros [n, groups]."""
    count, columns = values.shape
    width = columns // scales.shape[1]
    offset = i32(1 << (bits - 1))
    codes = np.empty((1, columns), np.uint8)
    for r in range(count):
        unpack_rows(packed[r : r + 1], bits, codes)
        for g in range(scales.shape[1]):
            row, out = codes[0, g * width : (g + 1) * width], values[r, g * width : (g + 1) * width]
            scale, zero = scales[r, g], zeros[r, g]
            for i in range(row.size):
                out[i] = f32(f32(f32(i32(row[i]) - offset) - zero) * scale)


class Numbers(NamedTuple):
    """Of the groups of weights, each [groups]: scale and zero as they are encoded; scale and what is taken away as they
    are read back, and how much the latter may be off; and how many weights, in their order, are a group."""

    scale: Floats
    zero: Floats
    decoded: Floats
    least: Floats
    slack: Floats
    width: int


@kernel
def _code(number: np.float32, top: np.float32) -> np.float32:
    """The code nearest to a number, the lower where two are as near; the largest for a NaN."""
    return max(-top, min(top - f32(1), np.ceil(f32(number - HALF))))


@kernel
def _nearest(asked: np.float32, found: np.float32, top: np.float32) -> bool:
    """Whether no code is nearer to what is asked for than the one that was found."""
    return bool(abs(asked - found) <= abs(asked - _code(asked, top)) + abs(asked) * _EXACT)


@kernel
def check_rows(weights: Floats, values: Floats, groups: Numbers, to: Rounding, bits: int, wrong: Bools) -> None:
    """Fill `wrong`, by the rule of check_kernels.py: it, weights and the values that are read are flat, of one length.

    A weight over its scale may be rounded to the type of the model, as compressed-tensors does on a processor, or not,
    as it does on a GPU.
    """
    top = f32(1 << (bits - 1))
    for g in range(groups.scale.size):
        start, stop = g * groups.width, (g + 1) * groups.width
        row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
        scale, zero, decoded, least = groups.scale[g], groups.zero[g], groups.decoded[g], groups.least[g]
        slack = groups.slack[g]
        for i in range(row.size):
            share = f32(row[i] / scale) if scale > ZERO else ZERO
            exact, near = f32(share + zero), rounded(f32(rounded(share, to) + zero), to)
            found = _code(f32(f32(read[i] + least) / decoded) if decoded != ZERO else ZERO, top)
            away = abs(read[i] - f32(f32(found * decoded) - least))
            is_code = (away <= f32(abs(read[i]) + abs(least)) * _EXACT + slack) & (abs(read[i]) < INFINITY)
            nearest = _nearest(exact, found, top) | _nearest(near, found, top) | (abs(decoded) * top <= slack)
            both_nan = (row[i] != row[i]) & (read[i] != read[i])
            out[i] = not ((is_code & nearest) | both_nan)

"""Whole numbers of 2 to 8 bits, packed without gaps: written and read row by row, in one pass each.

As in compressed-tensors, number i of a row begins at bit i * bits, the lowest bit of a byte first; 32 numbers take
`bits` words of 32 bits. Eight numbers are `bits` whole bytes, which is how they are packed here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.kernels import HALF, INFINITY, ZERO, as_bits, as_float, f32, i32, kernel, u8, u16, u32
from neoxconv.quant.scaled.kernels import ROUNDER

_EXACT = f32(1e-5)  # what float32 arithmetic in another order may cost, as a part of a number
_EIGHT = 8
u64 = np.uint64


class Rounding(NamedTuple):
    """To a type whose exponents are float32's, or enough of them: the last bits that it lacks, and half of them.

    float16: 13 bits, bfloat16: 16, float32: none. What float16 rounds further, below 2**-14, is no code but 0; what is
    infinite in it is beyond every code.
    """

    lost: np.uint32  # the bits that it lacks, set
    half: np.uint32  # less than half of them
    odd: np.uint32  # the last bit that it has; 0 for float32
    shift: np.uint32  # how far that is from the end


@kernel
def _rounded(value: np.float32, to: Rounding) -> np.float32:
    """The number of a type nearest to a float32, ties to even."""
    bits = as_bits(value)
    return as_float(u32(u32(bits + to.half) + u32(u32(bits >> to.shift) & to.odd)) & u32(~to.lost))


@kernel
def _copy(source: Bytes, target: Bytes) -> None:
    """As much as both hold; faster than numba's own way."""
    for i in range(min(source.size, target.size)):
        target[i] = source[i]


@kernel
def _pack(codes: Bytes, bits: int, packed: Bytes) -> None:
    """Codes [8 n] as bytes [n bits]; of 4 and 8 bits, which are written, faster than as all others."""
    if bits == 8:
        _copy(codes, packed)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for j in range(pairs.size):
            packed[j] = u8(pairs[j] | u16(pairs[j] >> u16(4)))
    else:
        for j in range(codes.size // _EIGHT):
            word = u64(0)
            for k in range(_EIGHT):
                word |= u64(codes[_EIGHT * j + k]) << u64(k * bits)
            for k in range(bits):
                packed[j * bits + k] = u8(word >> u64(8 * k))


@kernel
def _unpack(packed: Bytes, bits: int, codes: Bytes) -> None:
    """The way back."""
    if bits == 8:
        _copy(packed, codes)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for j in range(pairs.size):
            pairs[j] = u16(packed[j] | u16(u16(packed[j]) << u16(4))) & u16(0x0F0F)
    else:
        mask = u64((1 << bits) - 1)
        for j in range(codes.size // _EIGHT):
            word = u64(0)
            for k in range(bits):
                word |= u64(packed[j * bits + k]) << u64(8 * k)
            for k in range(_EIGHT):
                codes[_EIGHT * j + k] = u8(u64(word >> u64(k * bits)) & mask)


@kernel
def pack_rows(codes: Bytes, bits: int, packed: Bytes) -> None:
    """Rows of codes [n, k] as rows of bytes [n, whole words]; zeros fill the last word up."""
    whole = -(-codes.shape[1] // 32) * 32
    row, out = np.zeros(whole, np.uint8), np.empty(whole // _EIGHT * bits, np.uint8)
    for r in range(codes.shape[0]):
        _copy(codes[r], row)
        _pack(row, bits, out)
        _copy(out, packed[r])


@kernel
def unpack_rows(packed: Bytes, bits: int, codes: Bytes) -> None:
    """The way back: rows of bytes [n, whole words] as rows of codes [n, k]."""
    whole = -(-codes.shape[1] // 32) * 32
    row, taken = np.empty(whole, np.uint8), np.zeros(whole // _EIGHT * bits, np.uint8)
    for r in range(codes.shape[0]):
        _copy(packed[r], taken)
        _unpack(taken, bits, row)
        _copy(row, codes[r])


@kernel
def extremes(groups: npt.NDArray[np.int32], found: npt.NDArray[np.int32]) -> None:
    """The least and the largest of the numbers of every row of float32 bits [n, k] and 0, as bits [n, 2].

    As whole numbers, the bits of negative ones turned round, they are in the order of what they stand for.
    """
    for g in range(groups.shape[0]):
        least, most = i32(0), i32(0)
        row = groups[g]
        for i in range(row.size):
            number = i32(row[i] ^ i32(i32(row[i] >> i32(31)) & i32(0x7FFFFFFF)))
            least, most = min(least, number), max(most, number)
        found[g, 0], found[g, 1] = i32(least ^ i32(i32(least >> i32(31)) & i32(0x7FFFFFFF))), most


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
                number = _rounded(f32(_rounded(f32(row[i] / scale), to) + zero), to)
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
            exact, near = f32(share + zero), _rounded(f32(_rounded(share, to) + zero), to)
            found = _code(f32(f32(read[i] + least) / decoded) if decoded != ZERO else ZERO, top)
            away = abs(read[i] - f32(f32(found * decoded) - least))
            is_code = (away <= f32(abs(read[i]) + abs(least)) * _EXACT + slack) & (abs(read[i]) < INFINITY)
            nearest = _nearest(exact, found, top) | _nearest(near, found, top) | (abs(decoded) * top <= slack)
            both_nan = (row[i] != row[i]) & (read[i] != read[i])
            out[i] = not ((is_code & nearest) | both_nan)

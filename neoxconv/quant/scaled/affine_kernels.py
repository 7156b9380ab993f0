"""Kernels of types whose groups have a scale and a bias; written as in kernels.py, for the same reasons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import ONE, ZERO, f32, i32, kernel, u8, u32
from neoxconv.quant.scaled.kernels import ROUNDER

_ALL = i32(0x7FFFFFFF)
_Words = npt.NDArray[np.uint32]


@kernel
def _ordered(bits: np.int32) -> np.int32:
    """Integers in the order of the float32 with these bits, and back."""
    return i32(bits ^ ((bits >> i32(31)) & _ALL))


@kernel
def extremes(groups: Floats, found: Floats) -> None:
    """The least and the largest number [n, 2] of every row of [n, k]."""
    for g in range(groups.shape[0]):
        row = groups[g].view(np.int32)
        low, high = _ALL, i32(-_ALL)
        for i in range(row.size):
            value = _ordered(row[i])
            low, high = min(low, value), max(high, value)
        ends = found[g].view(np.int32)
        ends[0], ends[1] = _ordered(low), _ordered(high)


@kernel
def nearest_steps(groups: Floats, lines: Floats, top: np.float32, codes: Bytes) -> None:
    """Codes [n, k], 0 to `top`, of groups [n, k]: weights plus the second number of their line [n, 2], in steps of the
    first, rounded to nearest, ties to even."""
    for g in range(groups.shape[0]):
        row, out, step, least = groups[g], codes[g], lines[g, 0], lines[g, 1]
        for i in range(row.size):
            share = min(max(f32(f32(row[i] + least) / step), -ONE), top + ONE)
            out[i] = u8(i32(min(max(f32(f32(share + ROUNDER) - ROUNDER), ZERO), top)))


@kernel
def pack_codes(codes: Bytes, bits: int, words: _Words) -> None:
    """Codes [n] of so many bits as dense bits, lowest first: 32 of them are `bits` words."""
    for block in range(codes.size // 32):
        row, out = codes[block * 32 : (block + 1) * 32], words[block * bits : (block + 1) * bits]
        held, filled, w = np.uint64(0), 0, 0
        for i in range(row.size):
            held |= np.uint64(row[i]) << np.uint64(filled)
            filled += bits
            if filled >= 32:
                out[w] = u32(held & np.uint64(0xFFFFFFFF))
                held >>= np.uint64(32)
                filled -= 32
                w += 1


@kernel
def unpack_codes(words: _Words, bits: int, codes: Bytes) -> None:
    """The way back."""
    mask = np.uint64((1 << bits) - 1)
    for block in range(codes.size // 32):
        row, out = words[block * bits : (block + 1) * bits], codes[block * 32 : (block + 1) * 32]
        held, filled, w = np.uint64(0), 0, 0
        for i in range(out.size):
            if filled < bits:
                held |= np.uint64(row[w]) << np.uint64(filled)
                filled += 32
                w += 1
            out[i] = u8(held & mask)
            held >>= np.uint64(bits)
            filled -= bits


@kernel
def read_steps(codes: Bytes, scales: Floats, biases: Floats, values: Floats) -> None:
    """What codes [n, k] stand for, with the scale [n] and the bias [n] of each row: rounded twice."""
    for g in range(codes.shape[0]):
        row, out, scale, bias = codes[g], values[g], scales[g], biases[g]
        for i in range(row.size):
            out[i] = f32(f32(f32(row[i]) * scale) + bias)

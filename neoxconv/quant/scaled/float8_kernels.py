"""float32 to float8 in numba; written as kernels.py is, for the same reasons.

A form travels as six integers, and the loops have no branches: LLVM makes vectors of them, as fast as memory
is. At work are integers, one addition and one division, each rounded as IEEE 754 says; the sign is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import INFINITY, NAN, as_bits, as_float, f32, kernel, part, u8, u32

_INFINITE = u32(0x7F800000)


class Limits(NamedTuple):
    """What the kernels know about a form of float8; E4M3's in brackets."""

    unit: np.uint32  # codes in a power of two [8]
    lift: np.uint32  # how far above a number lies the power of two whose float32 steps are its steps here [20]
    exponent_gap: np.uint32  # the code that float32's exponents are ahead by [121 * 8 = 968]
    normal: np.uint32  # the float32 bits of the smallest normal number [2**-6]
    over: np.uint32  # those of the power of two above the largest number [512]
    top: np.uint32  # the code of the largest number [0x7E, 448]
    infinite: np.uint32  # that of infinity; beyond all others where there is none [0x80]
    spread: np.uint32  # how much further apart the float32 bits of neighbours are than codes [2**20]
    ahead: np.uint32  # those of the power of two by which exponents here are ahead [2**120]


@part
def _nearest(size: np.uint32, limits: Limits) -> np.uint32:
    """The code nearest to a magnitude, ties to even; a larger one than any number has where it is beyond the largest.

    Adding 2**lift times the power of two below `size` makes the adder round to the steps of the form. 1.0 in E4M3: its
    exponent in float32 is 127; added to 2**20 it is 8 of the steps of 1/8 there; 8 + 127 * 8 - 968 = 0x38, exponent 7
    (as the bias is 7, 2**0) and mantissa 0.
    """
    size = u32(min(size, limits.over))
    exponent = u32(u32(max(size, limits.normal)) >> u32(23))
    magic = u32(u32(exponent + limits.lift) << u32(23))
    steps = u32(as_bits(as_float(size) + as_float(magic)) - magic)
    return u32(steps + u32(u32(exponent * limits.unit) - limits.exponent_gap))


@part
def _float8_bits(bits: np.uint32, limits: Limits) -> np.uint8:
    """The float8 nearest to the float32 with these bits; at most the largest. A NaN becomes 0x7F or 0xFF."""
    size = u32(bits & u32(0x7FFFFFFF))
    code = u32(min(_nearest(size, limits), limits.top))
    if size > _INFINITE:
        code = u32(0x7F)
    return u8(code | u32(u32(bits >> u32(24)) & u32(0x80)))


@part
def rounded(value: np.float32, limits: Limits, largest: np.float32) -> np.float32:
    """The number of the form nearest to a float32; at most the largest. A NaN stays one."""
    bits = as_bits(value)
    size = u32(min(u32(bits & u32(0x7FFFFFFF)), limits.over))
    exponent = u32(u32(max(size, limits.normal)) >> u32(23))
    magic = as_float(u32(u32(exponent + limits.lift) << u32(23)))
    number = f32(min(f32(f32(as_float(size) + magic) - magic), largest))
    if value != value:
        number = value
    return as_float(u32(as_bits(number) | u32(bits & u32(0x80000000))))


@kernel
def number(code: np.uint8, limits: Limits) -> np.float32:
    """What a code stands for. As the upper bits of a float32 it is too small by a power of two, subnormals as well."""
    size = u32(code & u8(0x7F))
    value = as_float(u32(size * limits.spread)) * as_float(limits.ahead)
    if size > limits.top:
        value = INFINITY if size == limits.infinite else NAN
    return as_float(u32(as_bits(value) | u32(u32(code & u8(0x80)) << u32(24))))


@kernel
def narrow(bits: npt.NDArray[np.uint32], limits: Limits, codes: Bytes) -> None:
    """Fill `codes` with the float8 of the float32 numbers whose bits are given (both 1-D)."""
    for i in range(bits.size):
        codes[i] = _float8_bits(bits[i], limits)


@kernel
def divide(rows: Floats, scales: Floats, limits: Limits, codes: Bytes) -> None:
    """The same for rows [n, columns], each divided by its scale [n] first."""
    for r in range(rows.shape[0]):
        row, out, scale = rows[r], codes[r], scales[r]
        for i in range(row.size):
            out[i] = _float8_bits(as_bits(row[i] / scale), limits)

"""float32 to float8 in numba; written as kernels.py is, for the same reasons.

A form travels as six integers (`Limits`), and the loops have no branches: LLVM makes vectors of them, as fast as memory
is. At work are integers, one addition and one division, each rounded as IEEE 754 says; the sign is copied.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import as_bits, as_float, kernel, u8, u32

Limits = tuple[np.uint32, np.uint32, np.uint32, np.uint32, np.uint32, np.uint32]  # float8.limits says what they are
INFINITE = u32(0x7F800000)


@kernel
def nearest(size: np.uint32, limits: Limits) -> np.uint32:
    """The code nearest to a magnitude, ties to even; a larger one than any number has where it is beyond the largest.

    Adding 2**lift times the power of two below `size` makes the adder round to the steps of the form.
    """
    unit, lift, back, normal, over, _ = limits
    size = u32(min(size, over))
    exponent = u32(u32(max(size, normal)) >> u32(23))
    magic = u32(u32(exponent + lift) << u32(23))
    steps = u32(as_bits(as_float(size) + as_float(magic)) - magic)
    return u32(steps + u32(u32(exponent * unit) - back))


@kernel
def float8_bits(bits: np.uint32, limits: Limits) -> np.uint8:
    """The float8 nearest to the float32 with these bits; at most the largest. A NaN becomes 0x7F or 0xFF."""
    size = u32(bits & u32(0x7FFFFFFF))
    code = u32(min(nearest(size, limits), limits[5]))
    if size > INFINITE:
        code = u32(0x7F)
    return u8(code | u32(u32(bits >> u32(24)) & u32(0x80)))


@kernel
def narrow(bits: npt.NDArray[np.uint32], limits: Limits, codes: Bytes) -> None:
    """Fill `codes` with the float8 of the float32 numbers whose bits are given (both 1-D)."""
    for i in range(bits.size):
        codes[i] = float8_bits(bits[i], limits)


@kernel
def divide(rows: Floats, scales: Floats, limits: Limits, codes: Bytes) -> None:
    """The same for rows [n, columns], each divided by its scale [n] first."""
    for r in range(rows.shape[0]):
        row, out, scale = rows[r], codes[r], scales[r]
        for i in range(row.size):
            out[i] = float8_bits(as_bits(row[i] / scale), limits)

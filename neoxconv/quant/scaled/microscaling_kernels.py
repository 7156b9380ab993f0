"""float32 to numbers of 4 bits in numba; written as kernels.py is, for the same reasons."""

from __future__ import annotations

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import ZERO, as_bits, f32, kernel, u8, u32
from neoxconv.quant.scaled.rounding_kernels import Rounding, rounded

# Halfway between the numbers 0, 1/2, 1, 3/2, 2, 3, 4 and 6 of E2M1.
_MIDDLES = (f32(0.25), f32(0.75), f32(1.25), f32(1.75), f32(2.5), f32(3.5), f32(5))
_SIGN = u32(0x80000000)


@kernel
def nearest_e2m1(groups: Floats, scales: Floats, to: Rounding, codes: Bytes) -> None:
    """The codes [n, k] of groups [n, k] over their scales [n]; quotients are rounded to a type first.

    Of two numbers that are as near the smaller magnitude is taken; there is no negative zero. A scale of 0 makes zeros.
    """
    for g in range(groups.shape[0]):
        row, out, scale = groups[g], codes[g], scales[g]
        some = u8(scale != ZERO)
        for i in range(row.size):
            size = abs(rounded(f32(row[i] / scale), to))
            rank = u8(0)
            for k in range(7):
                rank += u8(size > _MIDDLES[k])
            sign = u8(u32(u32(as_bits(row[i]) & _SIGN) >> u32(28)))
            out[i] = some * u8(rank | (sign * u8(rank > u8(0))))


@kernel
def read(codes: Bytes, scales: Floats, numbers: Floats, values: Floats) -> None:
    """What codes [n, k] stand for in a table of numbers, times the scale [n] of each row."""
    for r in range(codes.shape[0]):
        row, out, scale = codes[r], values[r], scales[r]
        for i in range(row.size):
            out[i] = numbers[row[i]] * scale

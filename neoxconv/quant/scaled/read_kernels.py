"""Kernels that read codes whose scales lie beside them: products are rounded once, as kernels.py says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Doubles, Floats
from neoxconv.quant.kernels import f32, kernel, u8

_PAIRS = 32  # half a block of NF4 and FP4


@kernel
def read_pairs(packed: Bytes, sizes: Floats, table: Floats, values: Floats) -> None:
    """Two codes of 4 bits in a byte, the first in its upper half; every `_PAIRS` bytes share a size.

    Packed [n], sizes [blocks], the table [16], values [2 n].
    """
    scaled = np.empty(16, np.float32)
    for g in range(sizes.size):
        for k in range(16):
            scaled[k] = table[k] * sizes[g]
        for i in range(g * _PAIRS, min((g + 1) * _PAIRS, packed.size)):
            values[2 * i] = scaled[packed[i] >> u8(4)]
            values[2 * i + 1] = scaled[packed[i] & u8(15)]


@kernel
def read_steps(codes: npt.NDArray[np.int8], steps: Doubles, values: Floats) -> None:
    """Codes [n, k] times the step [n] of each row, in float64."""
    for r in range(codes.shape[0]):
        row, out, step = codes[r], values[r], steps[r]
        for i in range(row.size):
            out[i] = f32(np.float64(row[i]) * step)


@kernel
def read_numbers(codes: Bytes, scales: Floats, table: Floats, values: Floats) -> None:
    """What codes [n, k] stand for in a table [256], times the scale [n] of each row."""
    for r in range(codes.shape[0]):
        row, out, scale = codes[r], values[r], scales[r]
        for i in range(row.size):
            out[i] = table[row[i]] * scale

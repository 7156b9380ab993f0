"""Kernels that read codes whose scales lie beside them: products are rounded once, as kernels.py says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Doubles, Floats
from neoxconv.quant.kernels import f32, kernel
from neoxconv.quant.scaled.float8_kernels import Limits, number

_BLOCK = 64  # weights of NF4 and FP4 that share a size


@kernel
def read_pairs(packed: Bytes, pairs: npt.NDArray[np.uint64], sizes: Floats, values: Floats) -> None:
    """Two codes of 4 bits in a byte, each of which stands for a pair of numbers, times the sizes of their blocks.

    Packed [n], pairs [256], each two float32; sizes [blocks]; values [2 n].
    """
    both = values.view(np.uint64)
    for i in range(packed.size):
        both[i] = pairs[packed[i]]
    for g in range(sizes.size):
        block, size = values[g * _BLOCK : (g + 1) * _BLOCK], sizes[g]
        for i in range(block.size):
            block[i] *= size


@kernel
def read_steps(codes: npt.NDArray[np.int8], steps: Doubles, values: Floats) -> None:
    """Codes [n, k] times the step [n] of each row, in float64."""
    for r in range(codes.shape[0]):
        row, out, step = codes[r], values[r], steps[r]
        for i in range(row.size):
            out[i] = f32(np.float64(row[i]) * step)


@kernel
def read_numbers(codes: Bytes, scales: Floats, form: Limits, values: Floats) -> None:
    """The numbers of a form of float8 that codes [n, k] stand for, times the scale [n] of each row."""
    for r in range(codes.shape[0]):
        row, out, scale = codes[r], values[r], scales[r]
        for i in range(row.size):
            out[i] = number(row[i], form) * scale

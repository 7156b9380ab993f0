"""Kernels of types whose groups have a scale and a bias; written as in kernels.py, for the same reasons."""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import ONE, ZERO, f32, i32, kernel, u8
from neoxconv.quant.scaled.kernels import ROUNDER


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
def read_steps(codes: Bytes, scales: Floats, biases: Floats, values: Floats) -> None:
    """What codes [n, k] stand for, with the scale [n] and the bias [n] of each row: rounded twice."""
    for g in range(codes.shape[0]):
        row, out, scale, bias = codes[g], values[g], scales[g], biases[g]
        for i in range(row.size):
            out[i] = f32(f32(f32(row[i]) * scale) + bias)

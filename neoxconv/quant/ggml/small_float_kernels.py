"""The kernel that rounds blocks to 4-bit floating point with the scale that errs least (small_floats.py)."""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.ggml.check_kernels import Meaning, judge
from neoxconv.quant.kernels import INFINITY, ZERO, f32, kernel, part, u8

_TINY = f32(1e-6)  # of float32 arithmetic, a part of a weight
# Halfway between two values, and how far apart these are.
_STEPS = ((0.5, 1.0), (1.5, 1.0), (2.5, 1.0), (3.5, 1.0), (5.0, 2.0), (7.0, 2.0), (10.0, 4.0))


@part
def _round(weights: Floats, importance: Floats, scale: np.float32, codes: Bytes) -> np.float32:
    """Fill `codes` with those nearest to weights [block]; returns the sum of importance * error^2."""
    total = ZERO
    for j in range(weights.size):
        size = abs(weights[j])
        y = size / scale if (scale > ZERO) & (size < INFINITY) else ZERO
        code, value = u8(0), ZERO
        for border, gap in _STEPS:
            more = y > f32(border)
            code += u8(1) if more else u8(0)
            value += f32(gap) if more else ZERO
        error = size - value * scale
        total += importance[j] * error * error
        codes[j] = code | (u8(8) if (weights[j] < ZERO) & (code > u8(0)) else u8(0))
    return f32(total)


@kernel
def choose(weights: Floats, importance: Floats, tried: Bytes, table: Floats, scales: Bytes, codes: Bytes) -> None:
    """Fill scales [n] with the best of those `tried` [n, any number], and codes of weights [n, block].

    `table` is what scales stand for, importance [column blocks, block].
    """
    trial = np.empty(weights.shape[1], np.uint8)
    for b in range(weights.shape[0]):
        least, worth = INFINITY, importance[b % importance.shape[0]]
        scales[b], codes[b] = tried[b, 0], u8(0)
        for t in range(tried.shape[1]):
            error = _round(weights[b], worth, table[tried[b, t]], trial)
            if error < least or t == 0:
                least = error
                scales[b] = tried[b, t]
                codes[b] = trial


@kernel
def compare(weights: Floats, codes: Bytes, numbers: tuple[Floats, Floats], meaning: Meaning, wrong: Bools) -> None:
    """Fill `wrong` where a weight is not explained (check_kernels.py): it, weights and codes [n, block]; `numbers` are
    scales, and what explains an error besides [n], NaN where nothing does."""
    for b in range(weights.shape[0]):
        scale, fixed = numbers[0][b], numbers[1][b]
        judge(weights[b], codes[b], (scale, ZERO, scale, _TINY, ZERO, fixed, INFINITY), meaning, wrong[b])

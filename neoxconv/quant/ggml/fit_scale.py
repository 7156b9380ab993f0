"""The search for a scale alone: Q3_K, Q6_K and, with sixteen values for codes, IQ4_XS and IQ4_NL."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from neoxconv.dtypes import Floats
from neoxconv.quant.ggml import lanes as at
from neoxconv.quant.ggml.searches import CURVE
from neoxconv.quant.kernels import ONE, ZERO, f32, kernel, part

_Codes = tuple[float, float, bool]  # the lowest and the highest, and whether they stand for IQ4's values
_BORDERS = tuple((low + high) / 2 for low, high in pairwise(CURVE))
_STEPS = tuple((border, high - low) for border, (low, high) in zip(_BORDERS, pairwise(CURVE), strict=True))


@part
def _on_curve(y: np.float32) -> np.float32:
    """The value of IQ4's sixteen that is nearest to y; of two the lower."""
    q = f32(CURVE[0])
    for border, step in _STEPS:
        q += f32(step) if y > f32(border) else ZERO
    return f32(q)


@part
def _index_on_curve(y: np.float32) -> np.float32:
    """Which of the sixteen it is: 0 to 15."""
    q = ZERO
    for border in _BORDERS:
        q += ONE if y > f32(border) else ZERO
    return f32(q)


@part
def _sum_scale(x: Floats, w: Floats, s: Floats, n: int, codes: _Codes) -> None:
    """The weighted sums of the candidate a * x with whole numbers for codes."""
    low, high = f32(codes[0]), f32(codes[1])
    for i in range(at.LANES):
        s[at.QQ, i], s[at.EQ, i], s[at.EE, i] = ZERO, ZERO, ZERO
    for j in range(0, n, 4):
        for i in range(at.LANES):
            a = s[at.A, i]
            y0, y1, y2, y3 = x[j, i] * a, x[j + 1, i] * a, x[j + 2, i] * a, x[j + 3, i] * a
            q0, q1, q2, q3 = (
                at.nearest(y0, low, high),
                at.nearest(y1, low, high),
                at.nearest(y2, low, high),
                at.nearest(y3, low, high),
            )
            e0, e1, e2, e3 = y0 - q0, y1 - q1, y2 - q2, y3 - q3
            w0, w1, w2, w3 = w[j, i], w[j + 1, i], w[j + 2, i], w[j + 3, i]
            c0, c1, c2, c3 = w0 * e0, w1 * e1, w2 * e2, w3 * e3
            s[at.QQ, i] += (w0 * q0 * q0 + w1 * q1 * q1) + (w2 * q2 * q2 + w3 * q3 * q3)
            s[at.EQ, i] += (c0 * q0 + c1 * q1) + (c2 * q2 + c3 * q3)
            s[at.EE, i] += (c0 * e0 + c1 * e1) + (c2 * e2 + c3 * e3)


@kernel  # as a part it would lose its vectors: ten times slower
def _sum_curve(x: Floats, w: Floats, s: Floats, n: int) -> None:
    """The same with IQ4's sixteen values for codes."""
    for i in range(at.LANES):
        s[at.QQ, i], s[at.EQ, i], s[at.EE, i] = ZERO, ZERO, ZERO
    for j in range(n):
        for i in range(at.LANES):
            y = x[j, i] * s[at.A, i]
            q = _on_curve(y)
            e = y - q
            c = w[j, i] * e
            s[at.QQ, i] += w[j, i] * q * q
            s[at.EQ, i] += c * q
            s[at.EE, i] += c * e


@part
def _keep_scale(s: Floats) -> None:
    """Fit the scale to the candidate's codes; keep it where its error is the least so far."""
    for i in range(at.LANES):
        a, qq, eq, ee = s[at.A, i], s[at.QQ, i], s[at.EQ, i], s[at.EE, i]
        fits = (qq > ZERO) & (a != ZERO)
        slope = at.pick(fits, eq / qq, ZERO)
        unit = at.pick(fits, ONE / a, ZERO)
        s[at.ERROR, i] = at.pick(fits, (ee - slope * eq) * unit * unit, at.INFINITY)
        s[at.SCALE, i] = (ONE + slope) * unit
    at.keep(s, at.ERROR, at.BEST_ERROR, False)


@part
def _try_scale(x: Floats, w: Floats, s: Floats, n: int, codes: _Codes) -> None:
    """Sum up the candidate in row A, and keep it where it is the best."""
    if codes[2]:
        _sum_curve(x, w, s, n)
    else:
        _sum_scale(x, w, s, n, codes)
    _keep_scale(s)


@part
def _search_scale(x: Floats, w: Floats, s: Floats, n: int, codes: _Codes, grid: Floats) -> None:
    """The best scale of each block: the largest weight at each number of `grid`, then the codes of the best scale."""
    low = f32(codes[0])
    for i in range(at.LANES):
        s[at.SPAN, i] = ZERO
    for j in range(0, n, 2):
        for i in range(at.LANES):
            size = at.pick(abs(x[j, i]) > abs(s[at.SPAN, i]), x[j, i], s[at.SPAN, i])
            s[at.SPAN, i] = at.pick(abs(x[j + 1, i]) > abs(size), x[j + 1, i], size)
    for i in range(at.LANES):
        s[at.BEST_SCALE, i] = s[at.SPAN, i] / low
    at.forget(s)
    for k in range(grid.size + 1):  # one loop for all, as what is in it is compiled wherever it stands
        last = k == grid.size
        place = ONE if last else grid[k]
        for i in range(at.LANES):
            size = at.pick(last, s[at.BEST_SCALE, i], s[at.SPAN, i])
            s[at.A, i] = at.pick(abs(size) > at.TINY, place / size, ZERO)
        _try_scale(x, w, s, n, codes)


@part
def _round_scales(s: Floats, subs: int, levels: np.float32, trims: Floats) -> None:
    """Scales as integers from -levels to levels - 1 times a super-block's float16 step, which the largest one sets.

    A super-block of a single block has its scale for a step. `trims` as in `round_lines`.
    """
    for group in range(0, at.LANES, subs):
        extreme = ZERO
        for i in range(group, group + subs):
            extreme = at.pick(abs(s[at.BEST_SCALE, i]) > abs(extreme), s[at.BEST_SCALE, i], extreme)
        s[at.SPAN, group] = extreme
    for i in range(at.LANES):
        s[at.UNIT, i] = at.pick(s[at.BEST_A, i] != ZERO, ONE / s[at.BEST_A, i], ZERO)
    for t in range(len(trims)):
        for group in range(0, at.LANES, subs):
            extreme = s[at.SPAN, group]
            step = f32(extreme / (trims[t, 0] - levels)) if subs > 1 else extreme
            half = at.rounded_to_half(f32(abs(step)))
            for i in range(group, group + subs):
                s[at.TRY_STEP, i] = -half if step < ZERO else half
        for i in range(at.LANES):
            step, unit = s[at.TRY_STEP, i], s[at.UNIT, i]
            per_step = at.pick(step != ZERO, ONE / step, ZERO)
            integer = at.nearest(f32(s[at.BEST_SCALE, i] * per_step), -levels, levels - ONE)
            slope = integer * step * s[at.BEST_A, i] - ONE
            error = s[at.BEST_EE, i] - at.TWO * slope * s[at.BEST_EQ, i] + slope * slope * s[at.BEST_QQ, i]
            s[at.TRY_SCALE, i], s[at.TRY_LEAST, i], s[at.TRY_FLOOR, i] = integer, ZERO, ZERO
            s[at.TRY_ERROR, i] = error * unit * unit
        at.keep_total(s, subs, t == 0)


@part
def _scale_codes(x: Floats, s: Floats, n: int, codes: _Codes) -> None:
    """Replace the weights by their codes, counted from 0."""
    low, high, curve = f32(codes[0]), f32(codes[1]), codes[2]
    for i in range(at.LANES):
        scale = s[at.PICK_SCALE, i] * s[at.PICK_STEP, i]
        s[at.A, i] = at.pick(scale != ZERO, ONE / scale, ZERO)
    for j in range(n):
        for i in range(at.LANES):
            y = x[j, i] * s[at.A, i]
            x[j, i] = _index_on_curve(y) if curve else at.nearest(y, low, high) - low


@kernel
def scales(
    weights: Floats,
    worth: at.Worth,
    form: tuple[int, float, _Codes],
    candidates: tuple[Floats, Floats],
    found: at.Found,
) -> None:
    """Encode blocks [m, n] by scale alone: `found` has their codes from 0 on, and [m, 4] integer, -, step, -.

    `candidates` as in `lines`; `form`: blocks in a super-block, integers of a scale to each side, and the codes.
    """
    (subs, levels, kind), (grid, trims) = form, candidates
    n = weights.shape[1]
    x, w = np.empty((at.MOST, at.LANES), np.float32), np.empty((at.MOST, at.LANES), np.float32)
    s = np.zeros((at.ROWS, at.LANES), np.float32)
    for first in range(0, weights.shape[0], at.LANES):
        at.load(weights, first, x)
        at.weigh(x, w, s, n, first, worth)
        _search_scale(x, w, s, n, kind, grid)
        _round_scales(s, subs, f32(levels), trims)
        _scale_codes(x, s, n, kind)
        at.write_out(x, s, first, found)

"""The search for a scale and a least weight: Q2_K, Q4_K and Q5_K."""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Floats
from neoxconv.quant.ggml import lanes as at
from neoxconv.quant.kernels import ONE, ZERO, f32, kernel, part


@part
def _sum_line(x: Floats, w: Floats, s: Floats, n: int, top: np.float32) -> None:
    """The weighted sums of the candidate a * x + b with codes 0 to `top`."""
    for i in range(at.LANES):
        s[at.Q, i], s[at.QQ, i], s[at.E, i], s[at.EQ, i], s[at.EE, i] = ZERO, ZERO, ZERO, ZERO, ZERO
    for j in range(0, n, 2):
        for i in range(at.LANES):
            y0 = x[j, i] * s[at.A, i] + s[at.B, i]
            y1 = x[j + 1, i] * s[at.A, i] + s[at.B, i]
            q0 = at.nearest(y0, ZERO, top)
            q1 = at.nearest(y1, ZERO, top)
            e0, e1 = y0 - q0, y1 - q1
            a0, a1 = w[j, i] * q0, w[j + 1, i] * q1
            c0, c1 = w[j, i] * e0, w[j + 1, i] * e1
            s[at.Q, i] += a0 + a1
            s[at.QQ, i] += a0 * q0 + a1 * q1
            s[at.E, i] += c0 + c1
            s[at.EQ, i] += c0 * q0 + c1 * q1
            s[at.EE, i] += c0 * e0 + c1 * e1


@part
def _keep_line(s: Floats) -> None:
    """Fit scale and minimum (0 at most) to the candidate's codes; keep it where its error is the least so far."""
    for i in range(at.LANES):
        a, b, q, qq, e, eq, ee = s[at.A, i], s[at.B, i], s[at.Q, i], s[at.QQ, i], s[at.E, i], s[at.EQ, i], s[at.EE, i]
        spread = s[at.SUM, i] * qq - q * q
        fits = (spread > ZERO) & (a > ZERO)
        inverse = at.pick(fits, ONE / spread, ZERO)
        slope = (s[at.SUM, i] * eq - q * e) * inverse  # e is about slope * q + offset
        offset = (qq * e - q * eq) * inverse
        positive = offset > b
        slope = at.pick(positive & (qq > ZERO), (eq - b * q) / qq, slope)
        offset = at.pick(positive, b, offset)
        error = ee - at.TWO * (slope * eq + offset * e)
        error += slope * slope * qq + at.TWO * slope * offset * q + offset * offset * s[at.SUM, i]
        unit = at.pick(fits, ONE / a, ZERO)
        s[at.ERROR, i] = at.pick(fits, error * unit * unit, at.INFINITY)
        s[at.SCALE, i] = (ONE + slope) * unit
        s[at.LEAST, i] = (b - offset) * unit
    at.keep(s, at.ERROR, at.BEST_ERROR, False)


@part
def _search_line(x: Floats, w: Floats, s: Floats, n: int, top: np.float32, grid: Floats) -> None:
    """The best scale and minimum of each block: codes from `grid` steps over its range, then from the best line."""
    for i in range(at.LANES):
        s[at.LOW, i], s[at.SPAN, i], s[at.SUM, i] = ZERO, x[0, i], ZERO
    for j in range(n):
        for i in range(at.LANES):
            s[at.LOW, i] = min(s[at.LOW, i], x[j, i])
            s[at.SPAN, i] = max(s[at.SPAN, i], x[j, i])
            s[at.SUM, i] += w[j, i]
    for i in range(at.LANES):
        s[at.SPAN, i] = s[at.SPAN, i] - s[at.LOW, i]
        s[at.BEST_SCALE, i] = s[at.SPAN, i] / top
        s[at.BEST_LEAST, i] = -s[at.LOW, i]
    at.forget(s)
    for k in range(grid.size + 1):  # one loop for all, as what is in it is compiled wherever it stands
        last = k == grid.size
        steps = ONE if last else grid[k]
        for i in range(at.LANES):
            size = at.pick(last, s[at.BEST_SCALE, i], s[at.SPAN, i])
            s[at.A, i] = at.pick(size > at.TINY, steps / size, ZERO)
            s[at.B, i] = at.pick(last, s[at.BEST_LEAST, i], -s[at.LOW, i]) * s[at.A, i]
        _sum_line(x, w, s, n, top)
        _keep_line(s)


@part
def largest(s: Floats, row: int, group: int, subs: int) -> np.float32:
    """The largest number of a super-block's lanes, 0 at least."""
    result = ZERO
    for i in range(group, group + subs):
        result = max(result, s[row, i])
    return f32(result)


@part
def _round_lines(s: Floats, subs: int, levels: np.float32, trims: Floats) -> None:
    """Scales and minima as integers of at most `levels` times a super-block's two float16 steps.

    For each of the two integers nearest to a minimum the scale is fitted anew, as its error is known for the best
    codes; so too for steps with a little less than `levels` (`trims`) to the largest: a super-block's least error wins.
    """
    for group in range(0, at.LANES, subs):
        s[at.SPAN, group] = largest(s, at.BEST_SCALE, group, subs)
        s[at.LOW, group] = largest(s, at.BEST_LEAST, group, subs)
    for i in range(at.LANES):
        a, qq = s[at.BEST_A, i], s[at.BEST_QQ, i]
        s[at.UNIT, i] = at.pick(a > ZERO, ONE / a, ZERO)
        s[at.PER_QQ, i] = at.pick(qq > ZERO, ONE / qq, ZERO)
    for t in range(len(trims)):
        for group in range(0, at.LANES, subs):
            step = at.rounded_to_half(f32(s[at.SPAN, group] / (levels - trims[t, 0])))
            floor = at.rounded_to_half(f32(s[at.LOW, group] / (levels - trims[t, 1])))
            for i in range(group, group + subs):
                s[at.TRY_STEP, i], s[at.TRY_FLOOR, i] = step, floor
        _round_minima(s, levels)
        at.keep_total(s, subs, t == 0)


@part
def _round_minima(s: Floats, levels: np.float32) -> None:
    """The better of the two integers nearest to each minimum, with the scale that goes with it."""
    for i in range(at.LANES):
        step, floor = s[at.TRY_STEP, i], s[at.TRY_FLOOR, i]
        per_step = at.pick(step > ZERO, ONE / step, ZERO)
        per_floor = at.pick(floor > ZERO, ONE / floor, ZERO)
        a, b, unit, per_qq = s[at.BEST_A, i], s[at.BEST_B, i], s[at.UNIT, i], s[at.PER_QQ, i]
        known = a > ZERO
        wanted = s[at.BEST_LEAST, i] * per_floor
        near = (wanted + at.MAGIC) - at.MAGIC
        other = near + at.pick(wanted > near, ONE, -ONE)
        near, other = min(max(near, ZERO), levels), min(max(other, ZERO), levels)
        for_near, for_other = b - near * floor * a, b - other * floor * a
        slope = (s[at.BEST_EQ, i] - for_near * s[at.BEST_Q, i]) * per_qq
        scale = at.pick(known, (ONE + slope) * unit, s[at.BEST_SCALE, i])
        scale_near = at.nearest(scale * per_step, ZERO, levels)
        error_near = _line_error(s, i, scale_near * step * a - ONE, for_near) * unit * unit
        slope = (s[at.BEST_EQ, i] - for_other * s[at.BEST_Q, i]) * per_qq
        scale = at.pick(known, (ONE + slope) * unit, s[at.BEST_SCALE, i])
        scale_other = at.nearest(scale * per_step, ZERO, levels)
        error_other = _line_error(s, i, scale_other * step * a - ONE, for_other) * unit * unit
        better = error_other < error_near
        s[at.TRY_LEAST, i] = at.pick(better, other, near)
        s[at.TRY_SCALE, i] = at.pick(better, scale_other, scale_near)
        s[at.TRY_ERROR, i] = at.pick(better, error_other, error_near)


@part
def _line_error(s: Floats, i: int, slope: np.float32, offset: np.float32) -> np.float32:
    """The weighted square error, in codes, of the best codes read with a scale 1 + slope and this offset."""
    error = s[at.BEST_EE, i] - at.TWO * (slope * s[at.BEST_EQ, i] + offset * s[at.BEST_E, i])
    error += (
        slope * slope * s[at.BEST_QQ, i] + at.TWO * slope * offset * s[at.BEST_Q, i] + offset * offset * s[at.SUM, i]
    )
    return f32(error)


@part
def _line_codes(x: Floats, s: Floats, n: int, top: np.float32) -> None:
    """Replace the weights by their codes."""
    for i in range(at.LANES):
        scale = s[at.PICK_SCALE, i] * s[at.PICK_STEP, i]
        s[at.A, i] = at.pick(scale > ZERO, ONE / scale, ZERO)
        offset = s[at.PICK_LEAST, i] * s[at.PICK_FLOOR, i] * s[at.A, i]
        s[at.B, i] = offset if offset < at.INFINITY else ZERO
    for j in range(n):
        for i in range(at.LANES):
            x[j, i] = at.nearest(x[j, i] * s[at.A, i] + s[at.B, i], ZERO, top)


@kernel
def lines(
    weights: Floats,
    worth: at.Worth,
    form: tuple[int, float, float],
    candidates: tuple[Floats, Floats],
    found: at.Found,
) -> None:
    """Encode blocks [m, n] by scale and minimum: `found` has their codes, and [m, 4] integers and steps of both.

    `form`: blocks in a super-block, largest code, largest integer of a scale; `candidates`: grid and trims of a Search.
    """
    (subs, top, levels), (grid, trims) = form, candidates
    n = weights.shape[1]
    x, w = np.empty((at.MOST, at.LANES), np.float32), np.empty((at.MOST, at.LANES), np.float32)
    s = np.zeros((at.ROWS, at.LANES), np.float32)
    for first in range(0, weights.shape[0], at.LANES):
        at.load(weights, first, x)
        at.weigh(x, w, s, n, first, worth)
        _search_line(x, w, s, n, f32(top), grid)
        _round_lines(s, subs, f32(levels), trims)
        _line_codes(x, s, n, f32(top))
        at.write_out(x, s, first, found)

"""The search for a scale and a least weight: Q2_K, Q4_K and Q5_K."""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml.lanes import (
    BEST_A,
    BEST_B,
    BEST_E,
    BEST_EE,
    BEST_EQ,
    BEST_Q,
    BEST_QQ,
    BEST_TOTAL,
    EE,
    EQ,
    ERROR,
    FLOOR,
    INFINITY,
    LANES,
    LEAST,
    LOW,
    MAGIC,
    MOST,
    PICK_FLOOR,
    PICK_LEAST,
    PICK_SCALE,
    PICK_STEP,
    QQ,
    ROWS,
    SCALE,
    SPAN,
    STEP,
    SUM,
    TINY,
    TRY_ERROR,
    TRY_LEAST,
    TRY_SCALE,
    TWO,
    A,
    B,
    E,
    Q,
    Worth,
    choose_total,
    forget,
    keep,
    load,
    nearest,
    rounded_to_half,
    weigh,
    write_out,
)
from neoxconv.quant.kernels import ONE, ZERO, f32, kernel


@kernel
def sum_line(x: Floats, w: Floats, s: Floats, n: int, top: np.float32) -> None:
    """The weighted sums of the candidate a * x + b with codes 0 to `top`."""
    for i in range(LANES):
        s[Q, i], s[QQ, i], s[E, i], s[EQ, i], s[EE, i] = ZERO, ZERO, ZERO, ZERO, ZERO
    for j in range(0, n, 2):
        for i in range(LANES):
            y0 = x[j, i] * s[A, i] + s[B, i]
            y1 = x[j + 1, i] * s[A, i] + s[B, i]
            q0 = nearest(y0, ZERO, top)
            q1 = nearest(y1, ZERO, top)
            e0, e1 = y0 - q0, y1 - q1
            a0, a1 = w[j, i] * q0, w[j + 1, i] * q1
            c0, c1 = w[j, i] * e0, w[j + 1, i] * e1
            s[Q, i] += a0 + a1
            s[QQ, i] += a0 * q0 + a1 * q1
            s[E, i] += c0 + c1
            s[EQ, i] += c0 * q0 + c1 * q1
            s[EE, i] += c0 * e0 + c1 * e1


@kernel
def keep_line(s: Floats) -> None:
    """Fit scale and minimum (0 at most) to the candidate's codes; keep it where its error is the least so far."""
    for i in range(LANES):
        a, b, q, qq, e, eq, ee = s[A, i], s[B, i], s[Q, i], s[QQ, i], s[E, i], s[EQ, i], s[EE, i]
        spread = s[SUM, i] * qq - q * q
        fits = (spread > ZERO) & (a > ZERO)
        inverse = ONE / spread if fits else ZERO
        slope = (s[SUM, i] * eq - q * e) * inverse  # e is about slope * q + offset
        offset = (qq * e - q * eq) * inverse
        positive = offset > b
        slope = (eq - b * q) / qq if positive & (qq > ZERO) else slope
        offset = b if positive else offset
        error = ee - TWO * (slope * eq + offset * e)
        error += slope * slope * qq + TWO * slope * offset * q + offset * offset * s[SUM, i]
        unit = ONE / a if fits else ZERO
        error = error * unit * unit
        better = (error < s[ERROR, i]) & fits
        s[ERROR, i] = error if better else s[ERROR, i]
        s[SCALE, i] = (ONE + slope) * unit if better else s[SCALE, i]
        s[LEAST, i] = (b - offset) * unit if better else s[LEAST, i]
        keep(s, i, better)


@kernel
def search_line(x: Floats, w: Floats, s: Floats, n: int, top: np.float32, grid: Floats) -> None:
    """The best scale and minimum of each block: codes from `grid` steps over its range, then from the best line."""
    for i in range(LANES):
        s[LOW, i], s[SPAN, i], s[SUM, i] = ZERO, x[0, i], ZERO
    for j in range(n):
        for i in range(LANES):
            s[LOW, i] = min(s[LOW, i], x[j, i])
            s[SPAN, i] = max(s[SPAN, i], x[j, i])
            s[SUM, i] += w[j, i]
    for i in range(LANES):
        s[SPAN, i] = s[SPAN, i] - s[LOW, i]
        s[SCALE, i] = s[SPAN, i] / top
        s[LEAST, i] = -s[LOW, i]
    forget(s)
    for k in range(grid.size):
        for i in range(LANES):
            s[A, i] = grid[k] / s[SPAN, i] if s[SPAN, i] > TINY else ZERO
            s[B, i] = -s[LOW, i] * s[A, i]
        sum_line(x, w, s, n, top)
        keep_line(s)
    for i in range(LANES):
        s[A, i] = ONE / s[SCALE, i] if s[SCALE, i] > TINY else ZERO
        s[B, i] = s[LEAST, i] * s[A, i]
    sum_line(x, w, s, n, top)
    keep_line(s)


@kernel
def largest(s: Floats, row: int, group: int, subs: int) -> np.float32:
    """The largest number of a super-block's lanes, 0 at least."""
    result = ZERO
    for i in range(group, group + subs):
        result = max(result, s[row, i])
    return f32(result)


@kernel
def round_lines(s: Floats, subs: int, levels: np.float32, trims: Floats) -> None:
    """Scales and minima as integers of at most `levels` times a super-block's two float16 steps.

    For each of the two integers nearest to a minimum the scale is fitted anew, as its error is known for the best
    codes; so too for steps with a little less than `levels` (`trims`) to the largest: a super-block's least error wins.
    """
    for i in range(LANES):
        s[BEST_TOTAL, i] = INFINITY
    for t in range(len(trims)):
        for group in range(0, LANES, subs):
            step = rounded_to_half(f32(largest(s, SCALE, group, subs) / (levels - trims[t, 0])))
            floor = rounded_to_half(f32(largest(s, LEAST, group, subs) / (levels - trims[t, 1])))
            for i in range(group, group + subs):
                s[STEP, i], s[FLOOR, i] = step, floor
        round_minima(s, levels)
        choose_total(s, subs, t == 0)


@kernel
def round_minima(s: Floats, levels: np.float32) -> None:
    """The better of the two integers nearest to each minimum, with the scale that goes with it."""
    for i in range(LANES):
        per_step = ONE / s[STEP, i] if s[STEP, i] > ZERO else ZERO
        per_floor = ONE / s[FLOOR, i] if s[FLOOR, i] > ZERO else ZERO
        a, b, qq = s[BEST_A, i], s[BEST_B, i], s[BEST_QQ, i]
        known = a > ZERO
        unit = ONE / a if known else ZERO
        per_qq = ONE / qq if qq > ZERO else ZERO
        wanted = s[LEAST, i] * per_floor
        near = (wanted + MAGIC) - MAGIC
        other = near + (ONE if wanted > near else -ONE)
        near, other = min(max(near, ZERO), levels), min(max(other, ZERO), levels)
        for_near, for_other = b - near * s[FLOOR, i] * a, b - other * s[FLOOR, i] * a
        slope = (s[BEST_EQ, i] - for_near * s[BEST_Q, i]) * per_qq
        scale = (ONE + slope) * unit if known else s[SCALE, i]
        scale_near = nearest(scale * per_step, ZERO, levels)
        error_near = line_error(s, i, scale_near * s[STEP, i] * a - ONE, for_near) * unit * unit
        slope = (s[BEST_EQ, i] - for_other * s[BEST_Q, i]) * per_qq
        scale = (ONE + slope) * unit if known else s[SCALE, i]
        scale_other = nearest(scale * per_step, ZERO, levels)
        error_other = line_error(s, i, scale_other * s[STEP, i] * a - ONE, for_other) * unit * unit
        better = error_other < error_near
        s[TRY_LEAST, i] = other if better else near
        s[TRY_SCALE, i] = scale_other if better else scale_near
        s[TRY_ERROR, i] = error_other if better else error_near


@kernel
def line_error(s: Floats, i: int, slope: np.float32, offset: np.float32) -> np.float32:
    """The weighted square error, in codes, of the best codes read with a scale 1 + slope and this offset."""
    error = s[BEST_EE, i] - TWO * (slope * s[BEST_EQ, i] + offset * s[BEST_E, i])
    error += slope * slope * s[BEST_QQ, i] + TWO * slope * offset * s[BEST_Q, i] + offset * offset * s[SUM, i]
    return f32(error)


@kernel
def line_codes(x: Floats, s: Floats, n: int, top: np.float32) -> None:
    """Replace the weights by their codes."""
    for i in range(LANES):
        scale = s[PICK_SCALE, i] * s[PICK_STEP, i]
        s[A, i] = ONE / scale if scale > ZERO else ZERO
        offset = s[PICK_LEAST, i] * s[PICK_FLOOR, i] * s[A, i]
        s[B, i] = offset if offset < INFINITY else ZERO
    for j in range(n):
        for i in range(LANES):
            x[j, i] = nearest(x[j, i] * s[A, i] + s[B, i], ZERO, top)


@kernel
def lines(
    weights: Floats,
    worth: Worth,
    form: tuple[int, float, float],
    places: tuple[Floats, Floats],
    codes: Bytes,
    numbers: Floats,
) -> None:
    """Encode blocks [m, n] by scale and minimum: their codes [m, n], and [m, 4] integers and steps of both.

    `form`: blocks in a super-block, largest code, largest integer of a scale; `places`: search.Search's grid and trims.
    """
    (subs, top, levels), (grid, trims) = form, places
    n = weights.shape[1]
    x, w = np.empty((MOST, LANES), np.float32), np.empty((MOST, LANES), np.float32)
    s = np.zeros((ROWS, LANES), np.float32)
    for first in range(0, weights.shape[0], LANES):
        load(weights, first, x)
        weigh(x, w, s, n, first, worth)
        search_line(x, w, s, n, f32(top), grid)
        round_lines(s, subs, f32(levels), trims)
        line_codes(x, s, n, f32(top))
        write_out(x, s, first, codes, numbers)

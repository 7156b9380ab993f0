"""The search for a scale alone: Q3_K, Q6_K and, with sixteen values for codes, IQ4_XS and IQ4_NL."""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml.lanes import (
    BEST_A,
    BEST_EE,
    BEST_EQ,
    BEST_QQ,
    BEST_TOTAL,
    EE,
    EQ,
    ERROR,
    INFINITY,
    LANES,
    MOST,
    PICK_SCALE,
    PICK_STEP,
    QQ,
    ROWS,
    SCALE,
    SPAN,
    STEP,
    TINY,
    TRY_ERROR,
    TRY_LEAST,
    TRY_SCALE,
    TWO,
    A,
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

BORDERS = (-115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0)


@kernel
def on_curve(y: np.float32) -> np.float32:
    """The value of IQ4's sixteen that is nearest to y; of two the lower."""
    q = f32(-127)
    q += f32(23) if y > f32(-115.5) else ZERO
    q += f32(21) if y > f32(-93.5) else ZERO
    q += f32(18) if y > f32(-74) else ZERO
    q += f32(16) if y > f32(-57) else ZERO
    q += f32(14) if y > f32(-42) else ZERO
    q += f32(13) if y > f32(-28.5) else ZERO
    q += f32(12) if y > f32(-16) else ZERO
    q += f32(11) if y > f32(-4.5) else ZERO
    q += f32(12) if y > f32(7) else ZERO
    q += f32(12) if y > f32(19) else ZERO
    q += f32(13) if y > f32(31.5) else ZERO
    q += f32(15) if y > f32(45.5) else ZERO
    q += f32(16) if y > f32(61) else ZERO
    q += f32(20) if y > f32(79) else ZERO
    q += f32(24) if y > f32(101) else ZERO
    return f32(q)


@kernel
def place_on_curve(y: np.float32) -> np.float32:
    """Which of the sixteen it is: 0 to 15."""
    q = ZERO
    for border in BORDERS:
        q += ONE if y > f32(border) else ZERO
    return f32(q)


@kernel
def sum_scale(x: Floats, w: Floats, s: Floats, n: int, low: np.float32, high: np.float32) -> None:
    """The weighted sums of the candidate a * x with codes `low` to `high`."""
    for i in range(LANES):
        s[QQ, i], s[EQ, i], s[EE, i] = ZERO, ZERO, ZERO
    for j in range(0, n, 4):
        for i in range(LANES):
            a = s[A, i]
            y0, y1, y2, y3 = x[j, i] * a, x[j + 1, i] * a, x[j + 2, i] * a, x[j + 3, i] * a
            q0, q1, q2, q3 = (
                nearest(y0, low, high),
                nearest(y1, low, high),
                nearest(y2, low, high),
                nearest(y3, low, high),
            )
            e0, e1, e2, e3 = y0 - q0, y1 - q1, y2 - q2, y3 - q3
            w0, w1, w2, w3 = w[j, i], w[j + 1, i], w[j + 2, i], w[j + 3, i]
            c0, c1, c2, c3 = w0 * e0, w1 * e1, w2 * e2, w3 * e3
            s[QQ, i] += (w0 * q0 * q0 + w1 * q1 * q1) + (w2 * q2 * q2 + w3 * q3 * q3)
            s[EQ, i] += (c0 * q0 + c1 * q1) + (c2 * q2 + c3 * q3)
            s[EE, i] += (c0 * e0 + c1 * e1) + (c2 * e2 + c3 * e3)


@kernel
def sum_curve(x: Floats, w: Floats, s: Floats, n: int) -> None:
    """The same with IQ4's sixteen values for codes."""
    for i in range(LANES):
        s[QQ, i], s[EQ, i], s[EE, i] = ZERO, ZERO, ZERO
    for j in range(n):
        for i in range(LANES):
            y = x[j, i] * s[A, i]
            q = on_curve(y)
            e = y - q
            c = w[j, i] * e
            s[QQ, i] += w[j, i] * q * q
            s[EQ, i] += c * q
            s[EE, i] += c * e


@kernel
def keep_scale(s: Floats) -> None:
    """Fit the scale to the candidate's codes; keep it where its error is the least so far."""
    for i in range(LANES):
        a, qq, eq, ee = s[A, i], s[QQ, i], s[EQ, i], s[EE, i]
        fits = (qq > ZERO) & (a != ZERO)
        slope = eq / qq if fits else ZERO
        unit = ONE / a if fits else ZERO
        error = (ee - slope * eq) * unit * unit
        better = (error < s[ERROR, i]) & fits
        s[ERROR, i] = error if better else s[ERROR, i]
        s[SCALE, i] = (ONE + slope) * unit if better else s[SCALE, i]
        keep(s, i, better)


@kernel
def try_scale(x: Floats, w: Floats, s: Floats, n: int, low: np.float32, high: np.float32, curved: bool) -> None:
    """Sum up the candidate in A, and keep it where it is the best."""
    if curved:
        sum_curve(x, w, s, n)
    else:
        sum_scale(x, w, s, n, low, high)
    keep_scale(s)


@kernel
def search_scale(
    x: Floats, w: Floats, s: Floats, n: int, ends: tuple[float, float], grid: Floats, curved: bool
) -> None:
    """The best scale of each block: the largest weight at each place of `grid`, then the codes of the best scale."""
    low, high = f32(ends[0]), f32(ends[1])
    for i in range(LANES):
        s[SPAN, i] = ZERO
    for j in range(n):
        for i in range(LANES):
            s[SPAN, i] = x[j, i] if abs(x[j, i]) > abs(s[SPAN, i]) else s[SPAN, i]
    for i in range(LANES):
        s[SCALE, i] = s[SPAN, i] / low
    forget(s)
    for k in range(grid.size):
        for i in range(LANES):
            s[A, i] = grid[k] / s[SPAN, i] if abs(s[SPAN, i]) > TINY else ZERO
        try_scale(x, w, s, n, low, high, curved)
    for i in range(LANES):
        s[A, i] = ONE / s[SCALE, i] if abs(s[SCALE, i]) > TINY else ZERO
    try_scale(x, w, s, n, low, high, curved)


@kernel
def round_scales(s: Floats, subs: int, levels: np.float32, trims: Floats) -> None:
    """Scales as integers from -levels to levels - 1 times a super-block's float16 step, which the largest one sets.

    A super-block of a single block has its scale for a step. `trims` as in `round_lines`.
    """
    for i in range(LANES):
        s[BEST_TOTAL, i] = INFINITY
    for t in range(len(trims)):
        for group in range(0, LANES, subs):
            extreme = ZERO
            for i in range(group, group + subs):
                extreme = s[SCALE, i] if abs(s[SCALE, i]) > abs(extreme) else extreme
            step = f32(extreme / (trims[t, 0] - levels)) if subs > 1 else extreme
            half = rounded_to_half(f32(abs(step)))
            for i in range(group, group + subs):
                s[STEP, i] = -half if step < ZERO else half
        for i in range(LANES):
            per_step = ONE / s[STEP, i] if s[STEP, i] != ZERO else ZERO
            a = s[BEST_A, i]
            unit = ONE / a if a != ZERO else ZERO
            integer = nearest(f32(s[SCALE, i] * per_step), -levels, levels - ONE)
            slope = integer * s[STEP, i] * a - ONE
            error = s[BEST_EE, i] - TWO * slope * s[BEST_EQ, i] + slope * slope * s[BEST_QQ, i]
            s[TRY_SCALE, i], s[TRY_LEAST, i] = integer, ZERO
            s[TRY_ERROR, i] = error * unit * unit
        choose_total(s, subs, t == 0)


@kernel
def scale_codes(x: Floats, s: Floats, n: int, ends: tuple[float, float], curved: bool) -> None:
    """Replace the weights by their codes, counted from 0."""
    low, high = f32(ends[0]), f32(ends[1])
    for i in range(LANES):
        scale = s[PICK_SCALE, i] * s[PICK_STEP, i]
        s[A, i] = ONE / scale if scale != ZERO else ZERO
    for j in range(n):
        for i in range(LANES):
            y = x[j, i] * s[A, i]
            x[j, i] = place_on_curve(y) if curved else nearest(y, low, high) - low


@kernel
def scales(
    weights: Floats,
    worth: Worth,
    form: tuple[int, float, float, float, bool],
    places: tuple[Floats, Floats],
    codes: Bytes,
    numbers: Floats,
) -> None:
    """Encode blocks [m, n] by scale alone: their codes [m, n] from 0 on, and [m, 4] integer, -, step, -.

    `places` as in `lines`; `form`: blocks in a super-block, smallest and largest code, integers of a scale to
    each side, and whether the codes stand for IQ4's values.
    """
    (subs, low, high, levels, curved), (grid, trims) = form, places
    n = weights.shape[1]
    x, w = np.empty((MOST, LANES), np.float32), np.empty((MOST, LANES), np.float32)
    s = np.zeros((ROWS, LANES), np.float32)
    for first in range(0, weights.shape[0], LANES):
        load(weights, first, x)
        weigh(x, w, s, n, first, worth)
        search_scale(x, w, s, n, (low, high), grid, curved)
        round_scales(s, subs, f32(levels), trims)
        scale_codes(x, s, n, (low, high), curved)
        write_out(x, s, first, codes, numbers)

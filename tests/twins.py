"""The rules by which stored weights are judged, once more in plain numpy: what the kernels must agree with."""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import Encoding, Groups, Scaled, Scales, scale_and_least
from neoxconv.dtypes import F32, Bools, Bytes, DType, Floats, narrow, widen
from neoxconv.quant import SCALED
from neoxconv.quant.ggml import codebooks, small_floats
from neoxconv.quant.ggml.searches import CURVE, SEARCHES

STEP_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}  # where a block's first float16 lies; at its beginning in the others
ENDS = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q5_1": (0, 31)}


def halves(encoding: Encoding, stored: Bytes, number: int) -> Floats:
    """One of the float16 numbers of blocks: their step, or the one after it."""
    at = STEP_AT.get(encoding.name, 0) + 2 * number
    blocks = np.ascontiguousarray(stored).reshape(-1, encoding.dtype.nbytes)
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def half_ulp(values: Floats) -> Floats:
    """How far rounding to float16 may move values."""
    return np.maximum(np.abs(values) * np.float32(1.01 / 2048), np.float32(1.01 * 2.0**-25))


def wrong_blocks(encoding: Encoding, rows: Floats, stored: Bytes, weighted: bool) -> Bools:
    """Which weights no encoder could have stored so as Q8_0, Q4_0, Q4_1, Q5_0, Q5_1."""
    weights, (lowest, highest) = rows.reshape(-1, 32), ENDS[encoding.name]
    ranged = encoding.name.endswith("_1")
    step, least = halves(encoding, stored, 0), halves(encoding, stored, 1) * np.float32(ranged)
    least = least if ranged else np.zeros_like(step)
    if encoding.grid:
        codes = encoding.grid.unpack(stored)[0].reshape(-1, 32).astype(np.float32) + np.float32(lowest)
    else:
        codes = np.ascontiguousarray(stored).reshape(-1, 34)[:, 2:].view(np.int8).astype(np.float32)
    levels = np.float32(highest if ranged or lowest == -highest else -lowest)
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    needed = (high - low if ranged else np.maximum(-low, high)) / levels
    floor = low if ranged else np.zeros_like(low)
    finite = np.isfinite(needed)
    if weighted:
        needed, floor = np.abs(step), least
    slope, slack = half_ulp(needed), half_ulp(floor)
    fits = finite & (np.abs(np.abs(step) - needed) <= slope) & (np.abs(least - floor) <= slack)
    free = 2 * needed + levels * np.float32(1.01 * 2.0**-25) if weighted else needed / 2
    error = weights - (codes * step + least)
    towards = error * np.where(step < 0, np.float32(-1), np.float32(1))
    within = np.abs(error) <= np.abs(codes) * slope + (free + slope + slack)
    within |= (codes == highest) & (towards > 0) | (codes == lowest) & (towards < 0)
    return np.asarray(~(within & fits)).reshape(rows.shape)


def wrong_superblocks(encoding: Encoding, rows: Floats, stored: Bytes, weighted: bool) -> Bools:
    """Which weights no encoder could have stored so as a super-block or IQ4_NL; all where what is read is no number."""
    how, grid = SEARCHES[encoding.name], encoding.grid
    assert grid
    codes, scale, least = (
        each.reshape(-1, how.subs, each.size * how.block // rows.size) for each in grid.unpack(stored)
    )
    step = halves(encoding, stored, 0)[:, None]
    floor = halves(encoding, stored, 1)[:, None] if how.least else np.zeros_like(step)
    values = np.array(CURVE if how.curve else range(how.lowest, how.highest + 1), np.float32)
    half, end, tiny = np.diff(values) / 2, np.float32(np.inf), np.float32(2.0**-25 * how.levels)
    above, below = np.append(half, end)[codes], np.insert(half, 0, end)[codes]
    weights, size = rows.reshape(codes.shape), np.abs(scale)
    read = values[codes] * scale - least
    error = (weights - read) * np.copysign(np.float32(1), scale)
    slack = (np.abs(weights) + least) * blur(step) + least * blur(floor) + np.float32(1e-6) * size
    bad = ~((error <= above * size + slack) & (error >= -below * size - slack))
    if weighted:
        furthest = np.float32(max(-how.lowest, how.highest))
        coarse = np.float32(1.5) * (np.abs(step) * furthest + np.abs(floor)) + tiny * (furthest + 1)
        bad = np.where(size != 0, bad, ~(np.abs(weights + least) <= coarse))
    else:
        bad = bad & (size != 0) | ~fits(encoding, weights, (scale, least, step, floor))
    return np.asarray(bad | ~np.isfinite(weights)).reshape(rows.shape)


def wrong_codebooks(encoding: Encoding, rows: Floats, stored: Bytes, weighted: bool) -> Bools:
    """Which weights no encoder could have stored so as an entry of a codebook, whatever mattered to it."""
    form = next(form for form in codebooks.FORMS if form.name == encoding.name)
    taken, bound, points = codebooks.take_apart(form, stored), codebooks.bound(form), codebooks.points(form)
    shape = *taken.scale.shape, form.block // points.shape[1], points.shape[1]
    scale, step = taken.scale[:, :, None, None], taken.step[:, None, None, None]
    signs = np.ones((len(scale), 256), np.float32)
    if taken.signs.size:
        signs -= 2 * (taken.signs[:, :, None] >> np.arange(8, dtype=np.uint32) & 1).reshape(-1, 256)
    x, entries = (rows.reshape(-1, 256) * signs).reshape(shape), taken.entries.reshape(shape[:3])
    shift = np.repeat(taken.shifts, entries[0].size // (taken.shifts.shape[1] or entries[0].size), axis=1)
    shift = shift.reshape(*shape[:3], 1) if shift.size else np.zeros((*shape[:3], 1), np.float32)
    rounding = step + bound.moved * scale + np.float32(2.0**-20)
    largest = np.abs(x).max(axis=(2, 3), keepdims=True)
    fits = np.isfinite(x).all(axis=(2, 3), keepdims=True) & np.isfinite(scale)
    fits &= (scale <= largest * bound.most + rounding) & (scale >= largest * bound.least - rounding)
    judged = fits & (scale > 0)
    marks = judged & another_is_nearer(form, x, entries, (scale, rounding, shift))
    counts = marks.any(axis=3).sum(axis=2)
    few = 2 * (counts > 0).sum(axis=1) <= shape[1]
    for factor in bound.factors:
        tried = judged & another_is_nearer(form, x, entries, (scale * factor, rounding, shift))
        fewer = (tried.any(axis=3).sum(axis=2) < counts) & few[:, None]
        marks = np.where(fewer[:, :, None, None], tried, marks)
        counts = np.where(fewer, tried.any(axis=3).sum(axis=2), counts)
    wrong = (marks | ~fits | ~np.isfinite(x)).reshape(-1, 32, 8)
    if taken.signs.size:
        turned = (-x > rounding * points[entries]).reshape(wrong.shape)
        many = (turned & (scale > rounding).repeat(form.block, 1).reshape(wrong.shape)).sum(axis=2) > int(form.even)
        wrong |= turned & many[:, :, None]
    return np.asarray(wrong).reshape(rows.shape)


def wrong_small_floats(encoding: Encoding, rows: Floats, stored: Bytes, weighted: bool) -> Bools:
    """Which weights no encoder could have stored so as MXFP4 or NVFP4."""
    form = next(form for form in small_floats.FORMS if form.name == encoding.name)
    blocks = np.ascontiguousarray(stored).reshape(-1, encoding.dtype.nbytes)
    scales, halves = blocks[:, : form.subs].reshape(-1, 1), blocks[:, form.subs :].reshape(-1, form.block // 2)
    codes = np.concatenate([halves & 15, halves >> 4], axis=1)
    table, weights = small_floats.scales_of(form), rows.reshape(-1, form.block)
    usual = table[: form.highest + 1] * np.float32(12)
    largest = np.where(np.isfinite(weights), np.abs(weights), 0).max(axis=1)
    needed = np.array([next((i for i, most in enumerate(usual) if most >= each), form.highest) for each in largest])
    may = np.clip(needed[:, None] + np.arange(min(form.tried), max(form.tried) + 1), 0, form.highest)
    fits = (may == scales).any(axis=1) & np.isfinite(weights).all(axis=1)
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
    value, scale = values[codes & 7] * np.where(codes > 7, np.float32(-1), np.float32(1)), table[scales]
    order = np.concatenate([-values[:0:-1], values])
    place = np.searchsorted(order, value)
    half = np.concatenate([[np.inf], np.diff(order) / 2, [np.inf]]).astype(np.float32)
    error = weights - value * scale
    room = np.abs(weights) * np.float32(1e-6) + np.where(scale == 0, table[1] * np.float32(12), np.float32(2.0**-149))
    above = np.where(place == len(order) - 1, np.inf, half[place + 1] * scale + room)
    below = np.where(place == 0, np.inf, half[place] * scale + room)
    return np.asarray(~(fits[:, None] & (error <= above) & (error >= -below))).reshape(rows.shape)


def another_is_nearer(
    form: codebooks.CodebookForm, x: Floats, entries: Bytes, numbers: tuple[Floats, Floats, Floats]
) -> Bools:
    """Weights [..., groups, size] for which one of the entries near them is better, as it is for all of their group."""
    (scale, rounding, shift), book, points = numbers, codebooks.book(form), codebooks.points(form)
    levels = np.rint((x / scale - shift - book.low) / book.gap).clip(0, book.levels - 1)
    place = (np.nan_to_num(levels) * book.levels ** np.arange(book.size)[::-1]).sum(axis=-1).astype(np.int64)
    near = book.near[place] >> np.uint32(16)
    a, b = points[near] + shift[..., None], (points[entries] + shift)[..., None, :]
    room = rounding[..., None] * (np.abs(a) + np.abs(b)) + codebooks.bound(form).apart * scale[..., None]
    weights, scales = x[..., None, :], scale[..., None]
    nearer = np.abs(weights - scales * a) + room < np.abs(weights - scales * b)
    better = ((points[near] == points[entries][..., None, :]) | nearer).all(axis=-1) & (near != entries[..., None])
    chosen = np.take_along_axis(near, better.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return np.asarray(better.any(axis=-1)[..., None] & (points[chosen] != points[entries]))


def blur(step: Floats) -> Floats:
    """By what share rounding to float16 may have moved a step, before and after."""
    return np.maximum(np.float32(1 / 1024), np.float32(2.0**-24) / np.maximum(np.abs(step), np.float32(2.0**-24)))


def fits(encoding: Encoding, weights: Floats, numbers: tuple[Floats, ...]) -> Bools:
    """Whether scale and least weight of blocks [n, subs, block], with their steps, are about those that they need."""
    how, (scale, least, step, floor) = SEARCHES[encoding.name], numbers
    low, high = weights.min(axis=2, keepdims=True), weights.max(axis=2, keepdims=True)
    tiny, lost = np.float32(2.0**-25 * how.levels), np.float32(1.5 if how.subs > 1 else 0)
    moved = np.float32(0.3 + 0.9 / (how.highest - how.lowest))
    if how.least:
        low = np.minimum(low, np.float32(0))
        span, reach = high - low, np.float32(how.highest)
        result = np.abs(least + low) <= span * moved + floor * lost + tiny
    else:
        span, reach = np.maximum(-low, high), np.float32(-how.lowest)
        result = np.isfinite(scale)
    slack = span * moved + np.abs(step) * (reach * lost + np.float32(1 / 1024)) + tiny * reach
    return np.asarray(result & (np.abs(np.abs(scale) * reach - span) <= slack))


# Of types that differ in bits and groups alone, a few: all of them are compared with their libraries' bytes.
_A_FEW = (
    *("MLX_2BIT_32", "MLX_3BIT_64", "MLX_4BIT_128"),
    *("W4A16_G64", "W4A16_G32_ASYM", "W8A16_CHANNEL", "W8A16_CHANNEL_ASYM"),
)
ROWS = [row for name, row in SCALED.items() if name in _A_FEW or not ("BIT_" in name or name.startswith("W"))]


def fitting(encoding: Scaled, shape: tuple[int, int]) -> tuple[int, int]:
    """The next shape whose columns the encoding takes."""
    return shape[0], -(-shape[1] // encoding.multiple) * encoding.multiple


def nearest(encoding: Scaled, shares: Floats) -> Floats:
    """What the nearest codes stand for, as shares are given."""
    middles = (encoding.table[:-1] + encoding.table[1:]) / np.float32(2)
    return encoding.table[np.searchsorted(middles, shares)]


def wide(groups: Groups, numbers: Floats, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Scale and least of every weight of a shape, of those of its group."""
    scale, least = (groups.per_weight(each, shape) for each in scale_and_least(numbers))
    return scale, least


def rounded_in(native: DType, steps: np.float32, rows: Floats, scales: tuple[Floats, Floats]) -> Floats:
    """Weights over their scale, plus the zero, rounded to a type each, in `steps` of a share."""

    def rounded(values: Floats) -> Floats:
        return widen(narrow(values.astype(np.float32), native), native)

    encoded, low = scales
    return rounded(rounded(rows / (encoded / steps)) + np.rint(low / encoded * steps)) / steps


def wrong_scaled(encoding: Scaled, rows: Floats, values: Floats, scales: Scales) -> Bools:
    """Which weights of whole groups cannot have become the values that are read of them."""
    (encoded, low), (decoded, least), (slack, _) = (
        wide(encoding.groups, each, rows.shape) for each in (scales.encoded, scales.decoded, scales.slack)
    )
    asked = np.where((encoded > 0) | (encoded < 0), (rows + low) / encoded, 0)
    best, found = nearest(encoding, asked), nearest(encoding, np.where(decoded != 0, (values + least) / decoded, 0))
    near = 1e-5 * (np.abs(values) + np.abs(least)) + slack
    no_code = ~((np.abs(values - (found * decoded - least)) <= near) & np.isfinite(values))
    further = ~(np.abs(asked - found) <= np.abs(asked - best) + scales.near * np.abs(asked))
    if scales.native is not F32:
        near = rounded_in(scales.native, np.float32(1 / np.diff(encoding.table).min()), rows, (encoded, low))
        further &= ~(np.abs(near - found) <= np.abs(near - nearest(encoding, near)) + scales.near * np.abs(near))
    further &= np.abs(decoded) > slack
    return np.asarray((no_code | further) & ~(np.isnan(rows) & np.isnan(values)))

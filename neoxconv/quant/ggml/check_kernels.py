"""Kernels that read blocks, and tell which of their weights cannot have been stored as they are.

A weight w whose code stands for v is read as v * scale - least, and explained by that where

    |w - (v * scale - least)| <= gap * by_gap + (|w| + least) * by_weight + |v| * by_value + fixed

with `gap` half the distance to the next code, in scales; beyond the last code at either end it may be any distance
short of its weight. A block's numbers follow from its weights and scales, for each family by a kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.ggml.simple_kernels import extremes, largest_size
from neoxconv.quant.kernels import HALF, INFINITY, NAN, ONE, ZERO, f32, i32, kernel, part

SCALE, LEAST, BY_GAP, BY_WEIGHT, BY_VALUE, FIXED, BEYOND = range(7)  # BEYOND: how far beyond the last code
NUMBERS = 7

_ROUNDING = f32(1.01 / 2048)  # half a unit in the last place of a float16; 1 % for float32 arithmetic
_SMALLEST = f32(1.01 * 2.0**-25)  # the same for subnormals
_TWICE = f32(1 / 1024)  # rounding to float16, before and after
_STEP_16 = f32(2.0**-24)  # the smallest float16 above 0
_TINY = f32(1e-6)  # of float32 arithmetic
# Chosen by hand as MOVED is, superblocks.py.
_STEPS_LOST = f32(1.5)  # of the super-block's step, by rounding scales and least weights to integers


class Meaning(NamedTuple):
    """What codes stand for: code + zero, from `lowest` to `highest`; or a curve [3, codes] of values and of the gaps
    above and below each, infinite at its ends. Without a curve it is empty."""

    zero: np.float32
    lowest: np.float32
    highest: np.float32
    curve: Floats


class Simple(NamedTuple):
    """What is known of a simple block's scale: the block's largest weight, or with a least weight its range, over
    `levels`. `weighted`: it may be any."""

    levels: np.float32
    least: bool
    weighted: bool


class Super(NamedTuple):
    """How far a block's scale and least weight may be from those that its weights need.

    `reach`: what the code stands for that is given to a block's largest weight, `furthest`: the one furthest from 0;
    `levels`: of how many steps scales are at most; `moved`: how far a search moves them, a part of the block's range;
    `alone`: they are not rounded to integers; `weighted`: they may be any.
    """

    reach: np.float32
    furthest: np.float32
    levels: np.float32
    moved: np.float32
    alone: bool
    least: bool
    weighted: bool


@kernel
def read(codes: Bytes, scale: Floats, least: Floats, meaning: Meaning, values: Floats) -> None:
    """Fill `values` [n, block] with what is read of codes [n, block], scales and least weights [n]."""
    curved = meaning.curve.shape[1] > 0
    for b in range(codes.shape[0]):
        row, out = codes[b], values[b]
        for j in range(row.size):
            value = meaning.curve[0, row[j]] if curved else f32(i32(row[j])) + meaning.zero
            out[j] = value * scale[b] - least[b]


@kernel
def compare(weights: Floats, codes: Bytes, numbers: Floats, meaning: Meaning, wrong: Bools, values: Floats) -> None:
    """The same, and `wrong` where a weight is not explained: numbers [n, NUMBERS], all others [n, block]."""
    curved = meaning.curve.shape[1] > 0
    for b in range(codes.shape[0]):
        row, code, out, read_as = weights[b], codes[b], wrong[b], values[b]
        scale, least, by_gap, by_weight, by_value, fixed, beyond = numbers[b]
        sign = -ONE if scale < ZERO else ONE
        for j in range(row.size):
            if curved:
                value, above, below = (
                    meaning.curve[0, code[j]],
                    meaning.curve[1, code[j]],
                    meaning.curve[2, code[j]],
                )
            else:
                value = f32(i32(code[j])) + meaning.zero
                above = INFINITY if value == meaning.highest else HALF
                below = INFINITY if value == meaning.lowest else HALF
            number = value * scale - least
            error = (row[j] - number) * sign
            room = (abs(row[j]) + least) * by_weight + abs(value) * by_value + fixed
            most = beyond if above == INFINITY else above * by_gap + room
            last = beyond if below == INFINITY else below * by_gap + room
            out[j] = not ((error <= most) & (error >= -last) & (abs(row[j]) < INFINITY))
            read_as[j] = number


@part
def _half_ulp(value: np.float32) -> np.float32:
    """How far rounding to float16 may move a number."""
    return f32(max(abs(value) * _ROUNDING, _SMALLEST))


@kernel
def bound_simple(weights: Floats, scale: Floats, least: Floats, form: Simple, numbers: Floats) -> None:
    """The numbers of simple blocks [n, block]; FIXED is NaN, which explains nothing, where a block's are not its own.

    Half a step and what rounding both numbers to float16 may come to. An importance matrix may have moved the step to
    suit the few weights that matter, and llama.cpp fits it after the codes are chosen: two steps then.
    """
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        if form.least:
            lowest, high = extremes(bits[b])
            span = f32(high - lowest)
        else:
            lowest, span = ZERO, largest_size(bits[b])
        step = f32(span / form.levels)
        finite = abs(step) < INFINITY
        if form.weighted:
            step, lowest = abs(scale[b]), -least[b]
        slope, slack = _half_ulp(step), _half_ulp(lowest)
        fits = finite & (abs(abs(scale[b]) - step) <= slope) & (abs(-least[b] - lowest) <= slack)
        free = step + step + form.levels * _SMALLEST if form.weighted else step * HALF
        numbers[b, SCALE], numbers[b, LEAST] = scale[b], least[b]
        numbers[b, BY_GAP], numbers[b, BY_WEIGHT], numbers[b, BY_VALUE] = ZERO, ZERO, slope
        numbers[b, FIXED] = f32(free + slope) + slack if fits else NAN
        numbers[b, BEYOND] = INFINITY


@part
def _blur(step: np.float32) -> np.float32:
    """By what share rounding to float16 may have moved a step, twice over: encoders use it before as well as after."""
    return f32(max(_TWICE, _STEP_16 / max(abs(step), _STEP_16)))


@part
def _fits(low: np.float32, high: np.float32, block: tuple[np.float32, ...], form: Super) -> bool:
    """Whether a block's scale and least weight, then the steps of both, are about those that its weights need."""
    scale, least, step, floor = block
    tiny = f32(_STEP_16 * HALF) * form.levels  # what rounding a subnormal step comes to in all
    lost = ZERO if form.alone else _STEPS_LOST
    result = abs(scale) < INFINITY
    span = max(-low, high)
    if form.least:
        low = min(low, ZERO)
        span = high - low
        result = abs(least + low) <= span * form.moved + floor * lost + tiny
    slack = span * form.moved + abs(step) * (form.reach * lost + _TWICE) + tiny * form.reach
    return bool(result & (abs(abs(scale) * form.reach - span) <= slack))


@kernel
def bound_super(
    weights: Floats, scales: tuple[Floats, Floats], steps: tuple[Floats, Floats], form: Super, numbers: Floats
) -> None:
    """The numbers of super-blocks' blocks [n, block], scales and least weights [n], and the steps of both [supers].

    A scale of 0 leaves no choice; with an importance matrix it shows a block that was too small for the steps.
    """
    bits, subs = weights.view(np.int32), weights.shape[0] // max(1, steps[0].size)
    for b in range(weights.shape[0]):
        scale, least, step, floor = scales[0][b], scales[1][b], steps[0][b // subs], steps[1][b // subs]
        fixed, by_weight, beyond = least * _blur(floor) + _TINY * abs(scale), _blur(step), INFINITY
        if scale == ZERO:
            tiny = f32(_STEP_16 * HALF) * form.levels * (form.furthest + ONE)
            fixed = _STEPS_LOST * (abs(step) * form.furthest + abs(floor)) + tiny if form.weighted else INFINITY
            by_weight, beyond = ZERO, fixed
        if not form.weighted:
            low, high = extremes(bits[b])
            if not ((low == low) & (high == high) & _fits(low, high, (scale, least, step, floor), form)):
                fixed = NAN
        numbers[b, SCALE], numbers[b, LEAST] = scale, least
        numbers[b, BY_GAP], numbers[b, BY_WEIGHT], numbers[b, BY_VALUE] = abs(scale), by_weight, ZERO
        numbers[b, FIXED], numbers[b, BEYOND] = fixed, beyond

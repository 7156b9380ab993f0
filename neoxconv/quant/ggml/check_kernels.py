"""Kernels that read blocks, and tell which of their weights cannot have been stored as they are.

A weight w whose code stands for v is read as v * scale - least, and explained by that where

    |w - (v * scale - least)| <= gap * by_gap + (|w| + least) * by_weight + |v| * by_value + fixed

with `gap` half the distance to the next code, in scales; beyond the last code at either end it may be any distance
short of its weight. A block's numbers follow from its weights and scales, for each family by a kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.ggml.simple_kernels import fifths, half, largest_size
from neoxconv.quant.kernels import HALF, INFINITY, NAN, ONE, ZERO, extremes, f32, i32, kernel, part, u8, u32

_MOST_OF_A_STEP = f32(0.75)  # what explains less explains no code but the last for a weight beyond it
_BITS = np.array([1 << j for j in range(16)], np.uint32)
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


_Numbers = tuple[np.float32, ...]  # scale, least, by_gap, by_weight, by_value, fixed; how far beyond the last code


@kernel
def judge(row: Floats, code: Bytes, numbers: _Numbers, meaning: Meaning, wrong: Bools) -> None:
    """Fill `wrong` where a weight of a block is not explained, all [block]."""
    curved = meaning.curve.shape[1] > 0
    scale, least, by_gap, by_weight, by_value, fixed, beyond = numbers
    sign = -ONE if scale < ZERO else ONE
    for j in range(row.size):
        if curved:
            value, above, below = meaning.curve[0, code[j]], meaning.curve[1, code[j]], meaning.curve[2, code[j]]
        else:
            value = f32(i32(code[j])) + meaning.zero
            above = INFINITY if value == meaning.highest else HALF
            below = INFINITY if value == meaning.lowest else HALF
        error = (row[j] - (value * scale - least)) * sign
        room = (abs(row[j]) + least) * by_weight + abs(value) * by_value + fixed
        most = beyond if above == INFINITY else above * by_gap + room
        last = beyond if below == INFINITY else below * by_gap + room
        wrong[j] = not ((error <= most) & (error >= -last) & (abs(row[j]) < INFINITY))


@part
def _half_ulp(value: np.float32) -> np.float32:
    """How far rounding to float16 may move a number."""
    return f32(max(abs(value) * _ROUNDING, _SMALLEST))


@kernel
def _bound_simple(bits: npt.NDArray[np.int32], scale: np.float32, least: np.float32, form: Simple) -> _Numbers:
    """The numbers of a simple block; `fixed` is NaN, which explains nothing, where scale and least are not its own.

    Half a step and what rounding both numbers to float16 may come to. An importance matrix may have moved the step to
    suit the few weights that matter, and llama.cpp fits it after the codes are chosen: two steps then.
    """
    if form.least:
        lowest, high = extremes(bits)
        span = f32(high - lowest)
    else:
        lowest, span = ZERO, largest_size(bits)
    step = f32(span / form.levels)
    finite = abs(step) < INFINITY
    if form.weighted:
        step, lowest = abs(scale), -least
    slope, slack = _half_ulp(step), _half_ulp(lowest)
    fits = finite & (abs(abs(scale) - step) <= slope) & (abs(-least - lowest) <= slack)
    free = step + step + form.levels * _SMALLEST if form.weighted else step * HALF
    return scale, least, ZERO, ZERO, slope, f32(free + slope) + slack if fits else NAN, INFINITY


@kernel
def compare_simple(
    weights: Floats, codes: Bytes, numbers: tuple[Floats, Floats], form: Simple, meaning: Meaning, wrong: Bools
) -> None:
    """Fill `wrong` where a weight of simple blocks is not explained: it, weights and codes [n, 32], `numbers` are
    scales and least weights [n]."""
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        block = _bound_simple(bits[b], numbers[0][b], numbers[1][b], form)
        judge(weights[b], codes[b], block, meaning, wrong[b])


@kernel
def _is_near(weight: np.float32, value: np.float32, numbers: _Numbers) -> bool:
    """Whether a weight of a simple block is explained, be its code the last one or not."""
    scale, least, _, _, by_value, fixed, _ = numbers
    return bool(abs(weight - (value * scale - least)) <= abs(value) * by_value + fixed)


@kernel
def _ends(numbers: _Numbers, meaning: Meaning) -> tuple[np.float32, np.float32]:
    """The least and the largest number that codes stand for: a weight beyond one is explained where that would be.

    Infinite where steps are so small that the code before the last would do as well.
    """
    scale, least, _, _, by_value, fixed, _ = numbers
    if not max(-meaning.lowest, meaning.highest) * by_value + fixed < abs(scale) * _MOST_OF_A_STEP:
        return -INFINITY, INFINITY
    low, high = meaning.lowest * scale - least, meaning.highest * scale - least
    return (high, low) if scale < ZERO else (low, high)


@kernel
def _within(weight: np.float32, ends: tuple[np.float32, np.float32]) -> np.float32:
    """The number between two that is nearest to a weight."""
    cut = weight if weight > ends[0] else ends[0]
    return cut if cut < ends[1] else ends[1]


@kernel
def doubt_bytes(weights: Floats, blocks: Bytes, form: Simple, meaning: Meaning, doubtful: Bools) -> None:
    """Fill `doubtful` [n] where not all weights [n, 32] are near, in blocks [n, bytes] whose codes have eight bits.

    A quick look at simple blocks as they are stored: hardly any that is right fails, and none passes that is wrong.
    """
    bits, at = weights.view(np.int32), blocks.shape[1] - 32
    for b in range(weights.shape[0]):
        numbers = _bound_simple(bits[b], half(blocks[b], 0), ZERO, form)
        row, codes, misses = weights[b], blocks[b, at:], i32(0)
        for j in range(row.size):
            misses = i32(misses + i32(not _is_near(row[j], f32(i32(np.int8(codes[j]))), numbers)))
        doubtful[b] = misses > 0


@kernel
def doubt_nibbles(weights: Floats, blocks: Bytes, form: Simple, meaning: Meaning, doubtful: Bools) -> None:
    """The same for codes of four bits, two weights at a time."""
    bits, at, zero = weights.view(np.int32), blocks.shape[1] - 16, meaning.zero
    for b in range(weights.shape[0]):
        scale, least = half(blocks[b], 0), -half(blocks[b], 2) if form.least else ZERO
        numbers = _bound_simple(bits[b], scale, least, form)
        low, high, codes, misses = weights[b, :16], weights[b, 16:], blocks[b, at:], i32(0)
        ends = _ends(numbers, meaning)
        for j in range(16):
            first = _is_near(_within(low[j], ends), f32(i32(codes[j] & u8(15))) + zero, numbers)
            second = _is_near(_within(high[j], ends), f32(i32(codes[j] >> u8(4))) + zero, numbers)
            misses = i32(misses + i32(not (first & second)))
        doubtful[b] = misses > 0


@kernel
def doubt_fives(weights: Floats, blocks: Bytes, form: Simple, meaning: Meaning, doubtful: Bools) -> None:
    """The same for codes of five bits, the fifth worth sixteen."""
    bits, at, zero, upper = weights.view(np.int32), blocks.shape[1] - 16, meaning.zero, meaning.zero + f32(16)
    for b in range(weights.shape[0]):
        scale, least = half(blocks[b], 0), -half(blocks[b], 2) if form.least else ZERO
        numbers = _bound_simple(bits[b], scale, least, form)
        low, high, codes, misses = weights[b, :16], weights[b, 16:], blocks[b, at:], i32(0)
        ends, fifth = _ends(numbers, meaning), fifths(blocks[b])
        later = u32(fifth >> u32(16))
        for j in range(16):
            value = f32(i32(codes[j] & u8(15))) + (upper if u32(fifth & _BITS[j]) else zero)
            other = f32(i32(codes[j] >> u8(4))) + (upper if u32(later & _BITS[j]) else zero)
            near = _is_near(_within(low[j], ends), value, numbers) & _is_near(_within(high[j], ends), other, numbers)
            misses = i32(misses + i32(not near))
        doubtful[b] = misses > 0


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
def _bound_super(bits: npt.NDArray[np.int32], block: _Numbers, form: Super) -> _Numbers:
    """The numbers of a super-block's block, by its scale and least weight and the steps of both.

    A scale of 0 leaves no choice; with an importance matrix it shows a block that was too small for the steps.
    """
    scale, least, step, floor = block
    fixed, by_weight, beyond = least * _blur(floor) + _TINY * abs(scale), _blur(step), INFINITY
    if scale == ZERO:
        tiny = f32(_STEP_16 * HALF) * form.levels * (form.furthest + ONE)
        fixed = _STEPS_LOST * (abs(step) * form.furthest + abs(floor)) + tiny if form.weighted else INFINITY
        by_weight, beyond = ZERO, fixed
    if not form.weighted:
        low, high = extremes(bits)
        if not ((low == low) & (high == high) & _fits(low, high, block, form)):
            fixed = NAN
    return scale, least, abs(scale), by_weight, ZERO, fixed, beyond


@kernel
def compare_super(
    weights: Floats,
    codes: Bytes,
    scales: tuple[Floats, Floats],
    steps: tuple[Floats, Floats],
    form: Super,
    meaning: Meaning,
    wrong: Bools,
) -> None:
    """The same for super-blocks' blocks: weights, codes and wrong [n, block], scales and least weights [n], and the
    steps of both [supers]."""
    bits, subs = weights.view(np.int32), weights.shape[0] // max(1, steps[0].size)
    for b in range(weights.shape[0]):
        block = scales[0][b], scales[1][b], steps[0][b // subs], steps[1][b // subs]
        judge(weights[b], codes[b], _bound_super(bits[b], block, form), meaning, wrong[b])

"""Inner loops in numba, compiled on first use and cached: import this module inside the function that needs it.

No fastmath: an order of operations that is written down gives the same bytes on every CPU. Minima and maxima are
integer reductions over the bit patterns, which vectorize without it; they run over `.size`, as LLVM would unroll a loop
over a constant 32 before it vectorizes. Constants are typed, because a Python float would make numba use float64.

A block kernel takes weights [n, 32] float32 and fills blocks [n, bytes of a block] uint8 as ggml's
quantize_row_*_ref does (ggml-quants.c, compiled without FMA and without an imatrix).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from neoxconv.dtypes import Bytes, Floats

F = TypeVar("F", bound=Callable[..., object])
Halves = npt.NDArray[np.uint16]
Ruler = tuple[np.float32, np.float32, np.float32, np.int32]  # low, scale, offset, top

f32, i32, u32, u16, u8 = np.float32, np.int32, np.uint32, np.uint16, np.uint8
ZERO, ONE, HALF, INFINITY, NAN = f32(0), f32(1), f32(0.5), f32(np.inf), f32(np.nan)
BELOW_HALF = f32(0.49999997)  # with 0.5 itself, 0.49999997 would round up to 1
STEP_16 = f32(2.0**-14)  # the smallest normal float16


def kernel(function: F) -> F:
    """`function`, compiled: releases the GIL, is cached on disk, divides by zero as IEEE 754 says, costs no call."""
    return cast(F, njit(nogil=True, cache=True, error_model="numpy", forceinline=True)(function))


@kernel
def as_float(bits: np.uint32 | np.int32) -> np.float32:
    """The float32 with these bits."""
    return u32(bits).view(np.float32)


@kernel
def as_bits(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    return f32(value).view(np.uint32)


@kernel
def half_bits(bits: np.uint32) -> np.uint16:
    """The float16 nearest to the float32 with these bits, ties to even, as bits; NaNs keep their upper bits."""
    size = u32(bits & u32(0x7FFFFFFF))
    result = u32(u32(size - u32(112 << 23)) + u32(0xFFF) + (u32(size >> u32(13)) & u32(1))) >> u32(13)
    if size < u32(113 << 23):  # subnormal: adding 0.5 lets the adder round at 2**-24
        result = u32(as_bits(as_float(size) + HALF) - u32(0x3F000000))
    if size >= u32(0x477FF000):
        result = u32(0x7C00)
    if size > u32(0x7F800000):
        result = u32(max(u32(0x7C01), u32(0x7C00) | (u32(size >> u32(13)) & u32(0x3FF))))
    return u16(result | (u32(bits >> u32(16)) & u32(0x8000)))


@kernel
def narrow_f16(bits: npt.NDArray[np.uint32], halves: Halves) -> None:
    """Fill `halves` with the float16 bits of the float32 numbers whose bits are given (both 1-D)."""
    for i in range(bits.size):
        halves[i] = half_bits(bits[i])


@kernel
def narrow_bf16(bits: npt.NDArray[np.uint32], halves: Halves) -> None:
    """The same for bfloat16; a NaN becomes quiet."""
    for i in range(bits.size):
        rounded = u32(bits[i] + u32(0x7FFF) + (u32(bits[i] >> u32(16)) & u32(1))) >> u32(16)
        if (bits[i] & u32(0x7FFFFFFF)) > u32(0x7F800000):
            rounded = u32(bits[i] >> u32(16)) | u32(0x40)
        halves[i] = u16(rounded)


@kernel
def float_bits(half: np.uint16) -> np.uint32:
    """The float32 bits of a float16: exact, infinities and NaN payloads included."""
    size = u32(u32(half & u16(0x7FFF)) << u32(13))
    wide = u32(size + u32(112 << 23))
    if size < u32(0x00800000):  # subnormal: let the adder normalise it; no subnormal float32 takes part
        wide = as_bits(as_float(size + u32(113 << 23)) - STEP_16)
    if size >= u32(0x0F800000):
        wide = u32(size + u32(224 << 23))
    return u32(wide | u32(u32(half & u16(0x8000)) << u32(16)))


@kernel
def widen_f16(halves: Halves, bits: npt.NDArray[np.uint32]) -> None:
    """Fill `bits` with the float32 bits of float16 numbers (both 1-D)."""
    for i in range(halves.size):
        bits[i] = float_bits(halves[i])


@kernel
def inverse(step: np.float32) -> np.float32:
    """1 / step; 0 for 0. NaN where it overflows: ggml's codes are all 0 then, on x86, and so are those of a NaN."""
    if step == ZERO:
        return ZERO
    result = f32(ONE / step)
    if abs(result) == INFINITY:
        return NAN
    return result


@kernel
def ordered(bits: np.int32) -> np.int32:
    """An integer that sorts as the float32 with these bits does; its own inverse."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & i32(0x7FFFFFFF)))


@kernel
def extremes(bits: npt.NDArray[np.int32]) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of 32 weights, given as bits; at least one is NaN where a weight is."""
    low, high = i32(0x7FFFFFFF), i32(-0x80000000)
    for j in range(bits.size):
        value = ordered(bits[j])
        low, high = i32(min(low, value)), i32(max(high, value))
    return as_float(ordered(low)), as_float(ordered(high))


@kernel
def first(weights: Floats, size: np.float32) -> np.float32:
    """The first weight of that absolute value: which sign wins a tie."""
    for j in range(32):
        if abs(weights[j]) == size:
            return f32(weights[j])
    return ZERO


@kernel
def put_half(block: Bytes, at: int, value: np.float32) -> None:
    """Store `value` as float16 at byte `at`."""
    bits = half_bits(as_bits(value))
    block[at] = u8(bits & u16(255))
    block[at + 1] = u8(bits >> u16(8))


@kernel
def code(weight: np.float32, ruler: Ruler) -> np.int32:
    """(weight - low) * scale + offset, cut to an integer of at most `top`; 0 for NaN."""
    low, scale, offset, top = ruler
    return i32(min(i32((weight - low) * scale + offset), top) & i32(31))


@kernel
def put_codes(block: Bytes, weights: Floats, ruler: Ruler) -> None:
    """Store the codes of 32 weights at the end of `block`: nibbles j | (j + 16) << 4, before them any fifth bits."""
    at = block.size - 16
    for j in range(16):
        block[at + j] = u8((code(weights[j], ruler) & i32(15)) | (code(weights[j + 16], ruler) & i32(15)) << i32(4))
    if ruler[3] == 31:
        fifth = u32(0)
        for j in range(weights.size):
            fifth |= u32(u32(code(weights[j], ruler) >> i32(4)) << u32(j))
        for j in range(4):
            block[at - 4 + j] = u8((fifth >> u32(8 * j)) & u32(255))


@kernel
def largest_size(bits: npt.NDArray[np.int32]) -> np.float32:
    """The largest absolute value of 32 weights, given as bits; NaN where one is."""
    size = i32(0)
    for j in range(bits.size):
        size = i32(max(size, i32(bits[j] & i32(0x7FFFFFFF))))
    return as_float(size)


@kernel
def balanced(weights: Floats, levels: int, blocks: Bytes) -> None:
    """Q8_0: step = largest |w| / levels, codes = w / step, halves away from zero."""
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        step = f32(largest_size(bits[b]) / f32(levels))
        put_half(blocks[b], 0, step)
        scale = inverse(step)
        for j in range(weights.shape[1]):
            value = weights[b, j] * scale
            blocks[b, 2 + j] = u8(i32(value + (BELOW_HALF if value >= ZERO else -BELOW_HALF)) & i32(255))


@kernel
def signed(weights: Floats, levels: int, blocks: Bytes) -> None:
    """Q4_0, Q5_0: the weight of largest size takes the code -levels, which is stored as 0."""
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        low, high = extremes(bits[b])
        largest = high if high > -low else low
        if high == -low:
            largest = first(weights[b], high) + ZERO  # never -0
        if high != high or low != low:
            largest = NAN
        step = f32(largest / f32(-levels))
        put_half(blocks[b], 0, step)
        put_codes(blocks[b], weights[b], (ZERO, inverse(step), f32(levels) + HALF, i32(2 * levels - 1)))


@kernel
def ranged(weights: Floats, levels: int, blocks: Bytes) -> None:
    """Q4_1, Q5_1: codes 0 to levels from the smallest weight, which is stored, to the largest."""
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        low, high = extremes(bits[b])
        if low == ZERO:
            low = first(weights[b], ZERO)
        step = f32((high - low) / f32(levels))
        put_half(blocks[b], 0, step)
        put_half(blocks[b], 2, low)
        put_codes(blocks[b], weights[b], (low, inverse(step), HALF, i32(levels)))


@kernel
def spans(weights: Floats) -> Floats:
    """The smallest and the largest weight of each block: [n, 32] -> [n, 2]."""
    bits, result = weights.view(np.int32), np.empty((weights.shape[0], 2), np.float32)
    for b in range(weights.shape[0]):
        result[b, 0], result[b, 1] = extremes(bits[b])
    return result


@kernel
def unpack(blocks: Bytes, zero: int, fifth: bool) -> Floats:
    """The codes [n, 32] in the nibbles (and fifth bits) at the end of each block, less `zero`."""
    codes, at = np.empty((blocks.shape[0], 32), np.float32), blocks.shape[1] - 16
    for b in range(blocks.shape[0]):
        for j in range(16):
            codes[b, j] = f32(i32(blocks[b, at + j] & u8(15)) - i32(zero))
            codes[b, j + 16] = f32(i32(blocks[b, at + j] >> u8(4)) - i32(zero))
        if fifth:
            bits = u32(0)
            for j in range(4):
                bits |= u32(u32(blocks[b, at - 4 + j]) << u32(8 * j))
            for j in range(codes.shape[1]):
                codes[b, j] += f32(i32(u32(bits >> u32(j)) & u32(1)) << i32(4))
    return codes


@kernel
def outside(weights: Floats, codes: Floats, limits: Floats, ends: tuple[float, float]) -> npt.NDArray[np.bool_]:
    """True where |w - (step * code + least)| > |code| * slope + fixed and the code could move on towards the weight.

    weights, codes [n, 32]; limits [n, 4]: step, least, slope, fixed; ends: smallest and largest code. NaN is outside.
    """
    result, low, high = np.empty(weights.shape, np.bool_), f32(ends[0]), f32(ends[1])
    for b in range(weights.shape[0]):
        step, least, slope, fixed = limits[b]
        sign = -ONE if step < ZERO else ONE
        for j in range(32):
            error = weights[b, j] - (codes[b, j] * step + least)
            within = abs(error) <= abs(codes[b, j]) * slope + fixed
            above = (codes[b, j] == high) & (error * sign > ZERO)
            below = (codes[b, j] == low) & (error * sign < ZERO)
            result[b, j] = not (within | above | below)
    return result

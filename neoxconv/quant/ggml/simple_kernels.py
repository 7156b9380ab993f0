"""Kernels of the simple blocks: one scale, or a scale and a least value, for 32 weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.kernels import (
    BELOW_HALF,
    HALF,
    INFINITY,
    NAN,
    ONE,
    ZERO,
    as_bits,
    as_float,
    extremes,
    f32,
    float_bits,
    half_bits,
    i32,
    kernel,
    part,
    u8,
    u16,
    u32,
)

_Ruler = tuple[np.float32, np.float32, np.float32, np.int32]  # low, scale, offset, top


@part
def _inverse(step: np.float32) -> np.float32:
    """1 / step; 0 for 0. NaN where it overflows: ggml's codes are all 0 then, on x86, and so are those of a NaN."""
    if step == ZERO:
        return ZERO
    result = f32(ONE / step)
    if abs(result) == INFINITY:
        return NAN
    return result


@part
def first(weights: Floats, size: np.float32) -> np.float32:
    """The first weight of that absolute value: which sign wins a tie."""
    for j in range(32):
        if abs(weights[j]) == size:
            return f32(weights[j])
    return ZERO


@part
def _put_half(block: Bytes, at: int, value: np.float32) -> None:
    """Store `value` as float16 at byte `at`."""
    bits = half_bits(as_bits(value))
    block[at] = u8(bits & u16(255))
    block[at + 1] = u8(bits >> u16(8))


@part
def code(weight: np.float32, ruler: _Ruler) -> np.int32:
    """(weight - low) * scale + offset, cut to an integer of at most `top`; 0 for NaN."""
    low, scale, offset, top = ruler
    return i32(min(i32((weight - low) * scale + offset), top) & i32(31))


@part
def _put_codes(block: Bytes, weights: Floats, ruler: _Ruler, fifth: bool) -> None:
    """Store the codes of 32 weights at the end of `block`: nibbles j | (j + 16) << 4, before them any fifth bits."""
    at = block.size - 16
    for j in range(16):
        block[at + j] = u8((code(weights[j], ruler) & i32(15)) | (code(weights[j + 16], ruler) & i32(15)) << i32(4))
    if fifth:
        bits = u32(0)
        for j in range(weights.size):
            bits |= u32(u32(code(weights[j], ruler) >> i32(4)) << u32(j))
        for j in range(4):
            block[at - 4 + j] = u8((bits >> u32(8 * j)) & u32(255))


@part
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
        _put_half(blocks[b], 0, step)
        scale = _inverse(step)
        for j in range(weights.shape[1]):
            value = weights[b, j] * scale
            blocks[b, 2 + j] = u8(i32(value + (BELOW_HALF if value >= ZERO else -BELOW_HALF)) & i32(255))


@kernel
def signed(weights: Floats, levels: int, fifth: bool, blocks: Bytes) -> None:
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
        _put_half(blocks[b], 0, step)
        _put_codes(blocks[b], weights[b], (ZERO, _inverse(step), f32(levels) + HALF, i32(2 * levels - 1)), fifth)


@kernel
def ranged(weights: Floats, levels: int, fifth: bool, blocks: Bytes) -> None:
    """Q4_1, Q5_1: codes 0 to levels from the smallest weight, which is stored, to the largest."""
    bits = weights.view(np.int32)
    for b in range(weights.shape[0]):
        low, high = extremes(bits[b])
        if low == ZERO:
            low = first(weights[b], ZERO)
        step = f32((high - low) / f32(levels))
        _put_half(blocks[b], 0, step)
        _put_half(blocks[b], 2, low)
        _put_codes(blocks[b], weights[b], (low, _inverse(step), HALF, i32(levels)), fifth)


@kernel
def half(block: Bytes, at: int) -> np.float32:
    """The float16 at byte `at` of a block."""
    return as_float(float_bits(u16(u16(block[at]) | u16(u16(block[at + 1]) << u16(8)))))


@kernel
def halves(blocks: Bytes, at: int, numbers: Floats) -> None:
    """Fill `numbers` [n] with the float16 at byte `at` of each block."""
    for b in range(blocks.shape[0]):
        numbers[b] = half(blocks[b], at)


@kernel
def fifths(block: Bytes) -> np.uint32:
    """The fifth bits of a block's 32 codes, the first lowest."""
    bits, at = u32(0), block.size - 20
    for j in range(4):
        bits |= u32(u32(block[at + j]) << u32(8 * j))
    return u32(bits)


@kernel
def unpack_bytes(blocks: Bytes, codes: Bytes) -> None:
    """Fill codes [n, 32] from the signed bytes at the end of each block, with 128 added."""
    at = blocks.shape[1] - 32
    for b in range(blocks.shape[0]):
        stored, row = blocks[b, at:], codes[b]
        for j in range(row.size):
            row[j] = stored[j] ^ u8(128)


@kernel
def unpack(blocks: Bytes, fifth: bool, codes: Bytes) -> None:
    """Fill codes [n, 32] from the nibbles (and fifth bits) at the end of each block."""
    at = blocks.shape[1] - 16
    for b in range(blocks.shape[0]):
        nibbles, low, high = blocks[b, at:], codes[b, :16], codes[b, 16:]
        for j in range(nibbles.size):
            low[j] = nibbles[j] & u8(15)
            high[j] = nibbles[j] >> u8(4)
        if fifth:
            bits, row = fifths(blocks[b]), codes[b]
            for j in range(row.size):
                row[j] |= u8(u8(u32(bits >> u32(j)) & u32(1)) << u8(4))

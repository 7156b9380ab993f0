"""Inner loops in numba, compiled on first use and cached: import this module inside the function that needs it.

No fastmath: an order of operations that is written down gives the same bytes on every CPU. Minima and maxima are
integer reductions over the bit patterns, which vectorize without it; they run over `.size`, as LLVM would unroll a loop
over a constant 32 before it vectorizes. Constants are typed, because a Python float would make numba use float64.

A block kernel takes weights [n, 32] float32 and fills blocks [n, bytes of a block] uint8 as ggml's
quantize_row_*_ref does (ggml-quants.c, compiled without FMA and without an imatrix).
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import __version__ as numba_version
from numba import config, njit

from neoxconv.dtypes import Floats
from neoxconv.quant.kernel_cache import folder_for
from neoxconv.quant.parts import PartCompiler

F = TypeVar("F", bound=Callable[..., object])
_Halves = npt.NDArray[np.uint16]

f32, i32, u64, u32, u16, u8 = np.float32, np.int32, np.uint64, np.uint32, np.uint16, np.uint8
ZERO, ONE, HALF, INFINITY, NAN = f32(0), f32(1), f32(0.5), f32(np.inf), f32(np.nan)
BELOW_HALF = f32(0.49999997)  # with 0.5 itself, 0.49999997 would round up to 1
_STEP_16 = f32(2.0**-14)  # the smallest normal float16


_SETTINGS: Any = config  # numba's, some from the environment
_CACHE = folder_for(_SETTINGS.CACHE_DIR, numba_version)
_ALIKE: dict[str, Any] = {"error_model": "numpy", "forceinline": True}
_FROM_PYTHON: dict[str, Any] = {**_ALIKE, "nogil": True, "no_cfunc_wrapper": True}  # nor is any called from C
_DECORATING = Lock()  # threads may import kernels of several modules at once, and the setting is one for all


def kernel(function: F) -> F:
    """`function`, compiled to be called from Python: releases the GIL, is cached on disk, divides by zero as IEEE 754
    says, costs kernels that call it no call.

    Kernels take their arguments by position, in the searches more than four: x, w, s and n are the same in all of them,
    and an object that held them could not be cached (numba's jitclass cannot).
    """
    with _DECORATING:
        chosen, _SETTINGS.CACHE_DIR = _SETTINGS.CACHE_DIR, str(_CACHE or "")  # numba looks at it now
        try:
            return cast(F, njit(cache=bool(_CACHE), **_FROM_PYTHON)(function))
        finally:
            _SETTINGS.CACHE_DIR = chosen  # others' kernels stay theirs


def part(function: F) -> F:
    """`function`, which only kernels call: much quicker to compile than a `kernel`, and only where one needs it."""
    return cast(F, njit(pipeline_class=PartCompiler, **_ALIKE)(function))


@part
def _ordered(bits: np.int32) -> np.int32:
    """An integer that sorts as the float32 with these bits does; its own inverse."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & i32(0x7FFFFFFF)))


@part
def extremes(bits: npt.NDArray[np.int32]) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of a row of weights, given as bits; at least one is NaN where a weight is."""
    low, high = i32(0x7FFFFFFF), i32(-0x80000000)
    for j in range(bits.size):
        value = _ordered(bits[j])
        low, high = i32(min(low, value)), i32(max(high, value))
    return as_float(_ordered(low)), as_float(_ordered(high))


_LANES = 64  # sums side by side: enough for the widest registers, and in one order on all machines


@kernel
def _size(value: np.float32) -> np.uint32:
    """The bits of a float32 without its sign, which are ordered as magnitudes are."""
    return u32(f32(value).view(np.uint32) & u32(0x7FFFFFFF))


@kernel
def _square(value: np.float32) -> float:
    """The square, in float64."""
    return np.float64(value) * np.float64(value)


@kernel
def tally(weights: Floats, values: Floats) -> tuple[np.float32, float, float]:
    """The largest |w - v|, the sum of (w - v)^2 and that of w^2, in float64, of flat arrays of one length.

    A NaN is larger than anything. Every 64th number goes to the same sum, four at a time; these are added in their
    order.
    """
    tops = np.zeros(_LANES, np.uint32)
    squares, powers = np.zeros(_LANES, np.float64), np.zeros(_LANES, np.float64)
    whole = weights.size - weights.size % (4 * _LANES)
    for start in range(0, whole, 4 * _LANES):
        row, read = weights[start : start + 4 * _LANES], values[start : start + 4 * _LANES]
        for i in range(tops.size):
            a, b, c, d = row[i], row[i + _LANES], row[i + 2 * _LANES], row[i + 3 * _LANES]
            e, f = f32(a - read[i]), f32(b - read[i + _LANES])
            g, h = f32(c - read[i + 2 * _LANES]), f32(d - read[i + 3 * _LANES])
            tops[i] = max(max(max(_size(e), _size(f)), max(_size(g), _size(h))), tops[i])
            squares[i] += (_square(e) + _square(f)) + (_square(g) + _square(h))
            powers[i] += (_square(a) + _square(b)) + (_square(c) + _square(d))
    for start in range(whole, weights.size, _LANES):
        row, read = weights[start : start + _LANES], values[start : start + _LANES]
        for i in range(row.size):
            error = f32(row[i] - read[i])
            tops[i] = max(tops[i], _size(error))
            squares[i] += _square(error)
            powers[i] += _square(row[i])
    top, square, power = u32(0), np.float64(0), np.float64(0)
    for i in range(_LANES):
        top = max(top, tops[i])
        square += squares[i]
        power += powers[i]
    return u32(top).view(np.float32), square, power


@part
def as_float(bits: np.uint32 | np.int32) -> np.float32:
    """The float32 with these bits."""
    return u32(bits).view(np.float32)


@part
def as_bits(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    return f32(value).view(np.uint32)


@part
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
def narrow_f16(bits: npt.NDArray[np.uint32], halves: _Halves) -> None:
    """Fill `halves` with the float16 bits of the float32 numbers whose bits are given (both 1-D)."""
    for i in range(bits.size):
        halves[i] = half_bits(bits[i])


@kernel
def narrow_bf16(bits: npt.NDArray[np.uint32], halves: _Halves) -> None:
    """The same for bfloat16; a NaN becomes quiet."""
    for i in range(bits.size):
        rounded = u32(bits[i] + u32(0x7FFF) + (u32(bits[i] >> u32(16)) & u32(1))) >> u32(16)
        if (bits[i] & u32(0x7FFFFFFF)) > u32(0x7F800000):
            rounded = u32(bits[i] >> u32(16)) | u32(0x40)
        halves[i] = u16(rounded)


@part
def float_bits(half: np.uint16) -> np.uint32:
    """The float32 bits of a float16: exact, infinities and NaN payloads included."""
    size = u32(u32(half & u16(0x7FFF)) << u32(13))
    wide = u32(size + u32(112 << 23))
    if size < u32(0x00800000):  # subnormal: let the adder normalise it; no subnormal float32 takes part
        wide = as_bits(as_float(size + u32(113 << 23)) - _STEP_16)
    if size >= u32(0x0F800000):
        wide = u32(size + u32(224 << 23))
    return u32(wide | u32(u32(half & u16(0x8000)) << u32(16)))


@kernel
def widen_f16(halves: _Halves, bits: npt.NDArray[np.uint32]) -> None:
    """Fill `bits` with the float32 bits of float16 numbers (both 1-D)."""
    for i in range(halves.size):
        bits[i] = float_bits(halves[i])

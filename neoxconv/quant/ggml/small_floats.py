"""ggml's 4-bit floating point: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, times a scale of 8 bits.

    MXFP4: 32 weights; a byte of scale, a power of 2; 16 bytes of codes
    NVFP4: 64 weights; four bytes of scales, one for each 16, of 4 bits exponent and 3 mantissa; 32 bytes of codes

Weight j of n that share a scale has the low half of byte j, weight j + n / 2 the high half. What a scale stands for is
told by llama.cpp's package gguf. The search tries the scales next to the one that the largest weight needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from neoxconv.core.encoding import Comparison, Context, Encoding
from neoxconv.dtypes import Array, Bytes, DType, Floats, Numbers
from neoxconv.quant.ggml.blocks import Blocks, values_of, whole_blocks
from neoxconv.quant.ggml.search import importance_in_lanes
from neoxconv.quant.ggml.searches import check_columns

if TYPE_CHECKING:
    from neoxconv.quant.ggml.check_kernels import Meaning
    from neoxconv.quant.ggml.small_float_kernels import Scales

_NOTHING = Context()
_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # ggml-common.h
_SMALLEST = np.float32(2.0**-149)


@dataclass(frozen=True)
class _FloatForm:
    """Blocks of `subs` scales, each for `block` weights. `scales` is gguf's name of what bytes stand for, up to
    `highest`; `tried` are the scales of the search, counted from the least with which no weight is cut."""

    name: str
    block: int
    subs: int
    scales: str
    highest: int
    tried: tuple[int, ...]

    @property
    def weights(self) -> int:
        return self.block * self.subs

    @property
    def layout(self) -> np.dtype[np.void]:
        return np.dtype([("scales", "u1", self.subs), ("codes", "u1", (self.subs, self.block // 2))])


@cache
def scales_of(form: _FloatForm) -> Floats:
    """What the 256 bytes of a scale stand for."""
    from gguf import quants

    told: Callable[[Bytes], Array] = getattr(getattr(quants, form.name), form.scales)
    return told(np.arange(256, dtype=np.uint8)).astype(np.float32)


def _needed(form: _FloatForm, weights: Floats) -> Numbers:
    """The byte of the least scale [n] with which no weight of blocks [n, block] is cut, or the highest."""
    largest = np.nan_to_num(np.abs(weights), nan=0, posinf=0).max(axis=1, initial=0)
    needed: Numbers = np.minimum(np.searchsorted(_most(form), largest), form.highest)
    return needed


@cache
def _most(form: _FloatForm) -> Floats:
    """The largest weight that is not cut, of each scale."""
    with np.errstate(over="ignore"):
        most: Floats = scales_of(form)[: form.highest + 1] * _VALUES[7]
    return most


def encode(form: _FloatForm, rows: Floats, context: Context = _NOTHING) -> Bytes:
    """Rows [n, columns] as blocks [n, bytes]. Raises PlanError where they do not divide the columns."""
    from neoxconv.quant.ggml.small_float_kernels import search

    check_columns(form.name, form.weights, rows)
    weights = np.ascontiguousarray(rows, np.float32).reshape(-1, form.block)
    scales, codes = np.empty(len(weights), np.uint8), np.empty((len(weights), form.block // 8), np.uint32)
    worth, _ = importance_in_lanes(context.importance, weights, 1, 0)
    search(weights, worth, _scales(form), scales, codes)
    stored = np.empty(len(weights) // form.subs, form.layout)
    stored["scales"] = scales.reshape(-1, form.subs)
    stored["codes"] = codes.view(np.uint8).reshape(-1, form.subs, form.block // 2)
    return stored.view(np.uint8).reshape(len(rows), rows.shape[1] // form.weights * form.layout.itemsize)


@cache
def _scales(form: _FloatForm) -> Scales:
    """The bytes of scales as the search takes them."""
    from neoxconv.quant.ggml.small_float_kernels import Scales

    values, most = np.zeros(258, np.float32), np.full(258, np.inf, np.float32)
    values[:256], most[: form.highest + 1] = scales_of(form), _most(form)
    sizes = (np.arange(2048, dtype=np.uint32) << 20).view(np.float32)  # up to infinities and NaNs, which are no weights
    first = np.searchsorted(_most(form), np.nan_to_num(sizes, nan=np.inf)).astype(np.uint8)
    return Scales(values, most, first, np.array(form.tried), form.highest)


def _take_apart(form: _FloatForm, stored: Bytes) -> tuple[Bytes, Blocks]:
    """The bytes of scales [n], and the blocks. Raises CheckpointError where the bytes are no whole number of blocks."""
    blocks = whole_blocks(form.name, form.layout, stored).view(form.layout)[:, 0]
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=2).reshape(-1, form.block)
    scales = blocks["scales"].reshape(-1)
    return scales, Blocks(codes, scales_of(form)[scales], np.zeros(len(scales), np.float32))


@cache
def _meaning() -> Meaning:
    """What codes stand for, and half the way to the next."""
    from neoxconv.quant.ggml.check_kernels import Meaning

    order = np.unique(_VALUES)
    place, half = np.searchsorted(order, _VALUES), np.concatenate([[np.inf], np.diff(order) / 2, [np.inf]])
    curve = np.stack([_VALUES, half[place + 1], half[place]]).astype(np.float32)
    return Meaning(np.float32(0), np.float32(-12), np.float32(12), curve)


def decode(form: _FloatForm, stored: Bytes) -> Floats:
    """Blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    columns = stored.shape[1] // form.layout.itemsize * form.weights
    return values_of(_take_apart(form, stored)[1], _meaning()).reshape(len(stored), columns)


def compare(form: _FloatForm, rows: Floats, stored: Bytes, weighted: bool = False) -> Comparison:
    """Weights beside blocks; wrong are those further away than the nearest code, and blocks of scales not tried."""
    from neoxconv.quant.ggml import small_float_kernels

    (scales, blocks), weights = _take_apart(form, stored), np.ascontiguousarray(rows, np.float32)
    weights = weights.reshape(-1, form.block)
    away = scales.astype(np.int64) - _needed(form, weights)
    least, most = min(form.tried), max(form.tried)
    fits = (away >= least) | (scales == form.highest)
    fits &= (away <= most) | (scales == 0)
    fits &= np.isfinite(weights).all(axis=1) & (scales <= form.highest)
    lost = np.where(blocks.scale == 0, scales_of(form)[1] * _VALUES[7], _SMALLEST)  # too small for any scale
    fixed, wrong = np.where(fits, lost, np.nan).astype(np.float32), np.empty(weights.shape, np.bool_)
    meant = _meaning()
    small_float_kernels.compare(weights, blocks.codes, (blocks.scale, fixed), meant, wrong)
    return Comparison(wrong.reshape(rows.shape), lambda: values_of(blocks, meant).reshape(rows.shape))


def encoding(form: _FloatForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    encoder = partial(encode, form)
    return Encoding(
        name=form.name,
        dtype=DType(form.name, form.weights, form.layout.itemsize, np.dtype(np.uint8)),
        encode=encoder,
        decode=partial(decode, form),
        compare=partial(compare, form),
        search=encoder,
    )


FORMS = (
    _FloatForm("MXFP4", block=32, subs=1, scales="e8m0_to_fp32_half", highest=254, tried=(-1, 0)),
    _FloatForm("NVFP4", block=16, subs=4, scales="ue4m3_to_fp32", highest=126, tried=(0, -1, -2, 1)),
)
MXFP4, NVFP4 = map(encoding, FORMS)

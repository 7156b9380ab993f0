"""ggml's super-blocks: blocks of 16 or 32 weights share float16 steps, each has small integers times these.

    w ~ step * scale * code - floor * least    Q2_K, Q4_K, Q5_K: codes from zero on
    w ~ step * scale * code                    Q3_K, Q6_K: codes around zero
    w ~ step * scale * CURVE[code]             IQ4_XS; IQ4_NL without a scale: sixteen values, close together near zero

Codes and integers lie in planes: a field holds some bits of each, and one of its bytes those of several that are
equally far apart. The searches are in fit_line.py and fit_scale.py; the bytes are ggml's (ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv.core.encoding import Context, Encoding
from neoxconv.dtypes import Bytes, DType, Floats
from neoxconv.errors import CheckpointError
from neoxconv.quant.ggml.planes import Plane, pack, pack_sixes, unpack, unpack_sixes
from neoxconv.quant.ggml.search import find, grid
from neoxconv.quant.ggml.searches import CURVE, SEARCHES, Search, check_columns

_NOTHING = Context()

# How far `fits` lets a block's scale and least weight be from those that its weights need. Chosen by hand, so wide that
# neither our bytes nor ggml's are called wrong (tests/quant/test_superblocks.py tries both on three kinds of weights).
_MOVED = 0.3  # of the block's range, by a search
_MOVED_BY_CODES = 0.9  # of the distance between two codes, by a search: the more the fewer codes there are
_STEPS_LOST = 1.5  # of the super-block's step, by rounding to integers
_HALF_SUBNORMAL = 2.0**-25  # half the smallest float16 above 0: how far a subnormal step is rounded

_VALUES = np.array(CURVE, np.float32)


@dataclass(frozen=True)
class _SuperBlockForm:
    """The bytes of a super-block: fields, and where in them codes and integer scales lie.

    Without `scales` there are none, or with least weights both as `pack_sixes` has them.
    """

    name: str
    layout: np.dtype[Any]
    codes: tuple[Plane, ...]
    scales: tuple[Plane, ...] = ()

    @property
    def search(self) -> Search:
        """Which codes and integers there are, and how they are found."""
        return SEARCHES[self.name]

    @property
    def weights(self) -> int:
        """In a super-block."""
        return self.search.block * self.search.subs


def encode(form: _SuperBlockForm, rows: Floats, context: Context = _NOTHING) -> Bytes:
    """Rows [n, columns] as super-blocks [n, bytes]. Raises PlanError where they do not divide the columns."""
    check_columns(form.name, form.weights, rows)
    codes, numbers = find(form.search, rows, context)
    blocks = rows.shape[1] // form.search.block
    return _pack(form, codes.reshape(rows.shape), numbers.reshape(len(rows), blocks, 4))


def _pack(form: _SuperBlockForm, codes: Bytes, numbers: Floats) -> Bytes:
    """Rows of super-blocks [n, bytes] of codes [n, columns] and [n, blocks, 4] integers and steps."""
    count, columns = codes.shape
    supers = count * columns // form.weights
    codes, numbers = codes.reshape(supers, form.weights), numbers.reshape(supers, form.search.subs, 4)
    stored = np.zeros(supers, form.layout)
    stored["step"] = numbers[:, 0, 2]
    integers = numbers[..., 0].astype(np.int32)
    if form.search.least:
        stored["floor"] = numbers[:, 0, 3]
        integers = np.concatenate([integers, numbers[..., 1].astype(np.int32)], axis=1)
    if form.scales:
        pack(stored, form.scales, (integers + offset(form)).astype(np.uint8))
    elif form.search.least:
        stored["scales"] = pack_sixes(integers.astype(np.uint8))
    pack(stored, form.codes, codes)
    return stored.view(np.uint8).reshape(count, columns // form.weights * form.layout.itemsize)


def offset(form: _SuperBlockForm) -> int:
    """What is added to an integer scale where it is stored."""
    return 0 if form.search.least or form.search.signed or not form.scales else form.search.levels


@dataclass(frozen=True)
class _SuperBlocks:
    """Super-blocks taken apart: codes [n, blocks, block] uint8 and, [n, blocks, 1] in float32, scale and least weight;
    [n, 1, 1] the steps that these are multiples of.
    """

    codes: Bytes
    scale: Floats
    least: Floats
    step: Floats
    floor: Floats


def _take_apart(form: _SuperBlockForm, stored: Bytes) -> _SuperBlocks:
    """The numbers in super-blocks [n, bytes]. Raises CheckpointError where the bytes are no whole number of them."""
    if stored.shape[1] % form.layout.itemsize:
        raise CheckpointError(
            f"{form.name}: blocks have {form.layout.itemsize} bytes, but a row has {stored.shape[1]}. "
            "The file is damaged or its type is another one."
        )
    how = form.search
    raw = np.ascontiguousarray(stored).reshape(stored.size // form.layout.itemsize, form.layout.itemsize)
    supers = raw.view(form.layout)[:, 0]
    step = supers["step"].astype(np.float32)[:, None, None]
    floor = supers["floor"].astype(np.float32)[:, None, None] if how.least else np.zeros_like(step)
    if form.scales:
        integers = unpack(supers, form.scales)
    else:
        integers = unpack_sixes(supers["scales"]) if how.least else np.ones((len(supers), 1), np.uint8)
    if how.signed:
        integers = integers.view(np.int8)
    numbers = (integers.astype(np.float32) - np.float32(offset(form))).reshape(len(supers), 1 + how.least, how.subs, 1)
    codes = unpack(supers, form.codes).reshape(len(supers), how.subs, how.block)
    with np.errstate(invalid="ignore"):  # 0 * infinity, in a damaged block
        least = floor * numbers[:, 1] if how.least else np.zeros_like(step)
        return _SuperBlocks(codes, step * numbers[:, 0], least, step, floor)


def _unpack(form: _SuperBlockForm, stored: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Codes [n, columns], scales and least weights [n, blocks] of rows of super-blocks [n, bytes]."""
    taken, rows = _take_apart(form, stored), len(stored)
    shape = (len(taken.codes), form.search.subs, 1)
    scale, least = (np.broadcast_to(each, shape).reshape(rows, -1) for each in (taken.scale, taken.least))
    return taken.codes.reshape(rows, -1), scale, least


def _values_of(form: _SuperBlockForm, codes: Bytes) -> Floats:
    """What codes stand for."""
    return _VALUES[codes] if form.search.curve else codes.astype(np.float32) + np.float32(form.search.lowest)


def decode(form: _SuperBlockForm, stored: Bytes) -> Floats:
    """Super-blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    taken = _take_apart(form, stored)
    with np.errstate(invalid="ignore"):
        values = _values_of(form, taken.codes) * taken.scale
        if form.search.least:
            values -= taken.least
    return values.reshape(len(stored), stored.shape[1] // form.layout.itemsize * form.weights)


def wrong(form: _SuperBlockForm, rows: Floats, stored: Bytes, weighted: bool = False) -> npt.NDArray[np.bool_]:
    """True where a weight is further from its stored value than rounding to the nearest code explains.

    A code at the end of its range may be any distance short of its weight, and a scale of 0 leaves no choice. Where a
    block's range is not about the one that its weights need, it is wrong whole; with an importance matrix (`weighted`)
    it may be any that suits the few weights that matter.
    """
    taken = _take_apart(form, stored)
    weights = np.asarray(rows, np.float32).reshape(taken.codes.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        value, size = _values_of(form, taken.codes), np.abs(taken.scale)
        error = (weights - (value * taken.scale - taken.least)) * np.copysign(np.float32(1), taken.scale)
        above, below = gaps(form)
        slack = (np.abs(weights) + taken.least) * _blur(taken.step) + taken.least * _blur(taken.floor) + _TINY * size
        bad = ~((error <= above[taken.codes] * size + slack) & (error >= -below[taken.codes] * size - slack))
        if weighted:
            bad = np.where(size != 0, bad, np.abs(weights + taken.least) > _too_coarse(form, taken))
        else:
            bad &= size != 0
            bad |= ~fits(form, weights, taken)
        bad |= ~np.isfinite(weights)
        return np.asarray(bad.reshape(rows.shape))


def _too_coarse(form: _SuperBlockForm, taken: _SuperBlocks) -> Floats:
    """How far from its least weight a block may reach whose scale is 0, as its super-block's steps are too coarse."""
    how = form.search
    reach = np.float32(max(-how.lowest, how.highest))
    tiny = np.float32(_HALF_SUBNORMAL * how.levels) * (reach + 1)
    return np.asarray(np.float32(_STEPS_LOST) * (np.abs(taken.step) * reach + np.abs(taken.floor)) + tiny)


def _blur(step: Floats) -> Floats:
    """By what share rounding to float16 may have moved a step, twice over: encoders use it before as well as after."""
    return np.maximum(np.float32(1 / 1024), np.float32(2.0**-24) / np.maximum(np.abs(step), np.float32(2.0**-24)))


def gaps(form: _SuperBlockForm) -> tuple[Floats, Floats]:
    """How far above and below its value, in scales, a weight may lie that has a code."""
    values = _VALUES if form.search.curve else np.arange(form.search.lowest, form.search.highest + 1, dtype=np.float32)
    half = np.diff(values) / 2
    return np.append(half, np.float32(np.inf)), np.insert(half, 0, np.float32(np.inf))


def fits(form: _SuperBlockForm, weights: Floats, taken: _SuperBlocks) -> npt.NDArray[np.bool_]:
    """Whether each block's scale and least weight [n, blocks, 1] are about those that its weights need.

    A search moves them by a share of the block's range, the more the fewer codes there are, and rounding to integers by
    some steps: see MOVED, MOVED_BY_CODES and STEPS_LOST.
    """
    how = form.search
    low, high = weights.min(axis=2, keepdims=True), weights.max(axis=2, keepdims=True)
    tiny = np.float32(_HALF_SUBNORMAL * how.levels)  # what rounding a subnormal step comes to in all
    moves = np.float32(_MOVED + _MOVED_BY_CODES / (how.highest - how.lowest))
    rounding = np.float32(_STEPS_LOST if how.subs > 1 else 0)
    if how.least:
        low = np.minimum(low, np.float32(0))
        span, reach = high - low, np.float32(how.highest)
        result = np.abs(taken.least + low) <= span * moves + taken.floor * rounding + tiny
    else:
        span, reach = np.maximum(-low, high), np.float32(-how.lowest)
        result = np.isfinite(taken.scale)
    slack = span * moves + np.abs(taken.step) * (reach * rounding + np.float32(1 / 1024)) + tiny * reach
    return np.asarray(result & (np.abs(np.abs(taken.scale) * reach - span) <= slack))


def encoding(form: _SuperBlockForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    dtype = DType(form.name, form.weights, form.layout.itemsize, np.dtype(np.uint8))
    encoder = partial(encode, form)
    return Encoding(
        name=form.name,
        dtype=dtype,
        encode=encoder,
        decode=partial(decode, form),
        wrong=partial(wrong, form),
        search=encoder,
        grid=grid(form.search, partial(_pack, form), partial(_unpack, form)),
    )


def layout(*fields: tuple[Any, ...]) -> np.dtype[Any]:
    """Fields that follow each other without gaps."""
    return np.dtype(list(fields))


_TINY = np.float32(1e-6)  # of float32 arithmetic

_STEP, _FLOOR = ("step", "<f2"), ("floor", "<f2")
_HALVES, _BITS, _NIBBLES = (2, 4, 32), (1, 8, 32), (4, 2, 32)

Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS, IQ4_NL = map(
    encoding,
    (
        _SuperBlockForm(
            name="Q2_K",
            layout=layout(("scales", "u1", 16), ("qs", "u1", 64), _STEP, _FLOOR),
            codes=(Plane("qs", 0, 2, _HALVES),),
            scales=(Plane("scales", 0, 4, (1, 2, 16)),),
        ),
        _SuperBlockForm(
            name="Q3_K",
            layout=layout(("hmask", "u1", 32), ("qs", "u1", 64), ("nibbles", "u1", 8), ("upper", "u1", 4), _STEP),
            codes=(Plane("qs", 0, 2, _HALVES), Plane("hmask", 2, 1, _BITS)),
            scales=(Plane("nibbles", 0, 4, (1, 2, 8)), Plane("upper", 4, 2, (1, 4, 4))),
        ),
        _SuperBlockForm(
            name="Q4_K",
            layout=layout(_STEP, _FLOOR, ("scales", "u1", 12), ("qs", "u1", 128)),
            codes=(Plane("qs", 0, 4, _NIBBLES),),
        ),
        _SuperBlockForm(
            name="Q5_K",
            layout=layout(_STEP, _FLOOR, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)),
            codes=(Plane("qs", 0, 4, _NIBBLES), Plane("qh", 4, 1, _BITS)),
        ),
        _SuperBlockForm(
            name="Q6_K",
            layout=layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "u1", 16), _STEP),
            codes=(Plane("ql", 0, 4, (2, 2, 64)), Plane("qh", 4, 2, _HALVES)),
            scales=(Plane("scales", 0, 8, (1, 1, 16)),),
        ),
        _SuperBlockForm(
            name="IQ4_XS",
            layout=layout(_STEP, ("upper", "u1", 2), ("nibbles", "u1", 4), ("qs", "u1", 128)),
            codes=(Plane("qs", 0, 4, (8, 2, 16)),),
            scales=(Plane("nibbles", 0, 4, (4, 2, 1)), Plane("upper", 4, 2, (2, 4, 1))),
        ),
        _SuperBlockForm(
            name="IQ4_NL",
            layout=layout(_STEP, ("qs", "u1", 16)),
            codes=(Plane("qs", 0, 4, (1, 2, 16)),),
        ),
    ),
)

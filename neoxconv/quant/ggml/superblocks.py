"""ggml's super-blocks: blocks of 16 or 32 weights share float16 steps, each has small integers times these.

    w ~ step * scale * code - floor * least    Q2_K, Q4_K, Q5_K: codes from zero on
    w ~ step * scale * code                    Q3_K, Q6_K: codes around zero
    w ~ step * scale * CURVE[code]             IQ4_XS; IQ4_NL without a scale: sixteen values, close together near zero

Codes and integers lie in planes: a field holds some bits of each, and one of its bytes those of several that are
equally far apart. The searches are in fit_line.py and fit_scale.py; the bytes are ggml's (ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neoxconv.core.encoding import Comparison, Context, Encoding
from neoxconv.dtypes import Bytes, DType, Floats
from neoxconv.quant.ggml.blocks import Blocks, meaning, values_of, whole_blocks
from neoxconv.quant.ggml.planes import Plane, pack, pack_sixes, unpack, unpack_sixes
from neoxconv.quant.ggml.search import find, grid
from neoxconv.quant.ggml.searches import CURVE, SEARCHES, Search, check_columns

if TYPE_CHECKING:
    from neoxconv.quant.ggml.check_kernels import Meaning

_NOTHING = Context()

# How far a block's scale and least weight may be from those that its weights need. Chosen by hand, so wide that neither
# our bytes nor ggml's are called wrong (tests/quant/test_superblocks.py tries both on three kinds of weights).
_MOVED = 0.3  # of the block's range, by a search
_MOVED_BY_CODES = 0.9  # of the distance between two codes, by a search: the more the fewer codes there are


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
    """Super-blocks taken apart: their blocks, and the steps [n] that scales and least weights are multiples of."""

    blocks: Blocks
    step: Floats
    floor: Floats


def _take_apart(form: _SuperBlockForm, stored: Bytes) -> _SuperBlocks:
    """The numbers in super-blocks [n, bytes]. Raises CheckpointError where the bytes are no whole number of them."""
    how = form.search
    supers = whole_blocks(form.name, form.layout, stored).view(form.layout)[:, 0]
    step = supers["step"].astype(np.float32)
    floor = supers["floor"].astype(np.float32) if how.least else np.zeros_like(step)
    if form.scales:
        integers = unpack(supers, form.scales)
    else:
        integers = unpack_sixes(supers["scales"]) if how.least else np.ones((len(supers), 1), np.uint8)
    if how.signed:
        integers = integers.view(np.int8)
    numbers = integers.astype(np.float32) - np.float32(offset(form))
    codes = unpack(supers, form.codes).reshape(-1, how.block)
    with np.errstate(invalid="ignore"):  # 0 * infinity, in a damaged block
        scale = (step[:, None] * numbers[:, : how.subs]).reshape(-1)
        least = (floor[:, None] * numbers[:, how.subs :]).reshape(-1) if how.least else np.zeros_like(scale)
    return _SuperBlocks(Blocks(codes, scale, least), step, floor)


def _unpack(form: _SuperBlockForm, stored: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Codes [n, columns], scales and least weights [n, blocks] of rows of super-blocks [n, bytes]."""
    blocks, rows = _take_apart(form, stored).blocks, len(stored)
    return blocks.codes.reshape(rows, -1), blocks.scale.reshape(rows, -1), blocks.least.reshape(rows, -1)


@cache
def _meaning(form: _SuperBlockForm) -> Meaning:
    """What codes stand for."""
    how = form.search
    return meaning(how.lowest, how.lowest, how.highest, CURVE if how.curve else ())


def decode(form: _SuperBlockForm, stored: Bytes) -> Floats:
    """Super-blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    columns = stored.shape[1] // form.layout.itemsize * form.weights
    return values_of(_take_apart(form, stored).blocks, _meaning(form)).reshape(len(stored), columns)


def compare(form: _SuperBlockForm, rows: Floats, stored: Bytes, weighted: bool = False) -> Comparison:
    """Weights beside super-blocks; wrong are those further away than rounding to the nearest code explains.

    A code at the end of its range may be any distance short of its weight, and a scale of 0 leaves no choice. Where a
    block's range is not about the one that its weights need, it is wrong whole; with an importance matrix (`weighted`)
    it may be any that suits the few weights that matter.
    """
    from neoxconv.quant.ggml.check_kernels import Super, compare_super

    taken, how, meant = _take_apart(form, stored), form.search, _meaning(form)
    blocks, weights = taken.blocks, np.ascontiguousarray(rows, np.float32).reshape(-1, how.block)
    known = Super(
        reach=np.float32(how.highest if how.least else -how.lowest),
        furthest=np.float32(max(-how.lowest, how.highest)),
        levels=np.float32(how.levels),
        moved=np.float32(_MOVED + _MOVED_BY_CODES / (how.highest - how.lowest)),
        alone=how.subs == 1,
        least=how.least,
        weighted=weighted,
    )
    wrong = np.zeros(weights.shape, np.bool_)
    compare_super(weights, blocks.codes, (blocks.scale, blocks.least), (taken.step, taken.floor), known, meant, wrong)
    return Comparison(wrong.reshape(rows.shape), lambda: values_of(blocks, meant).reshape(rows.shape))


def encoding(form: _SuperBlockForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    dtype = DType(form.name, form.weights, form.layout.itemsize, np.dtype(np.uint8))
    encoder = partial(encode, form)
    return Encoding(
        name=form.name,
        dtype=dtype,
        encode=encoder,
        decode=partial(decode, form),
        compare=partial(compare, form),
        search=encoder,
        grid=grid(form.search, partial(_pack, form), partial(_unpack, form)),
    )


def layout(*fields: tuple[Any, ...]) -> np.dtype[Any]:
    """Fields that follow each other without gaps."""
    return np.dtype(list(fields))


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

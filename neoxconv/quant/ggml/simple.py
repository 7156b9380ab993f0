"""ggml's simple blocks: 32 weights share a float16 step (and a least weight), each keeps a code of 4, 5 or 8 bits.

    w ~ step * code            Q8_0, Q4_0, Q5_0: codes around zero, nibbles stored with 8 or 16 added
    w ~ step * code + least    Q4_1, Q5_1: codes from zero on

Nibble j holds weight j in its low and weight j + 16 in its high half; bit j of `fifth` is the fifth bit of weight j.
The bytes are those of llama.cpp's quantize_row_*_ref.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neoxconv.core.encoding import Comparison, Context, Encoding
from neoxconv.dtypes import Bytes, DType, Floats
from neoxconv.quant.ggml.blocks import Blocks, meaning, values_of, whole_blocks
from neoxconv.quant.ggml.search import find, grid
from neoxconv.quant.ggml.searches import SEARCHES, check_columns

if TYPE_CHECKING:
    from neoxconv.quant.ggml.check_kernels import Meaning

_BLOCK = 32

_STEP, _LEAST = ("step", "<f2"), ("least", "<f2")
_FIFTH, _NIBBLES, _CODES = ("fifth", "u1", 4), ("nibbles", "u1", 16), ("codes", "i1", 32)


@dataclass(frozen=True)
class _BlockForm:
    """A block's bytes and what its codes mean.

    The step is the largest |w|, or with `least` the largest less the least w, over `levels`; codes go from `lowest` to
    `highest`.
    """

    name: str
    layout: np.dtype[Any]
    levels: int
    lowest: int
    highest: int

    def has(self, field: str) -> bool:
        """Whether a block has this field."""
        return field in (self.layout.names or ())

    @property
    def fifth(self) -> bool:
        """Codes have five bits."""
        return self.has("fifth")

    @property
    def least(self) -> bool:
        """Codes count from the least weight, which is stored."""
        return self.has("least")


def encode(form: _BlockForm, rows: Floats) -> Bytes:
    """Rows [n, columns] as blocks [n, bytes]. Raises PlanError where 32 does not divide the columns."""
    from neoxconv.quant.ggml import simple_kernels

    check_columns(form.name, _BLOCK, rows)
    count, columns = rows.shape
    weights = np.ascontiguousarray(rows, np.float32).reshape(count * columns // _BLOCK, _BLOCK)
    blocks = np.empty((len(weights), form.layout.itemsize), np.uint8)
    if form.has("codes"):
        simple_kernels.balanced(weights, form.levels, blocks)
    elif form.least:
        simple_kernels.ranged(weights, form.levels, form.fifth, blocks)
    else:
        simple_kernels.signed(weights, form.levels, form.fifth, blocks)
    return blocks.reshape(count, columns // _BLOCK * form.layout.itemsize)


def search(form: _BlockForm, rows: Floats, context: Context) -> Bytes:
    """The same with the scales that err least, found as a super-block's are. Raises PlanError as `encode` does."""
    check_columns(form.name, _BLOCK, rows)
    codes, numbers = find(SEARCHES[form.name], rows, context)
    return _pack(form, codes.reshape(rows.shape), numbers.reshape(len(rows), rows.shape[1] // _BLOCK, 4))


def _pack(form: _BlockForm, codes: Bytes, numbers: Floats) -> Bytes:
    """Rows of blocks [n, bytes] of codes [n, columns] from 0 on and [n, blocks, 4] integers and steps."""
    rows, columns = codes.shape
    codes, numbers = codes.reshape(-1, _BLOCK), numbers.reshape(-1, 4)
    blocks = np.zeros(len(codes), form.layout)
    blocks["step"] = numbers[:, 0] * numbers[:, 2]
    if form.least:
        blocks["least"] = -numbers[:, 1] * numbers[:, 3]
    blocks["nibbles"] = codes[:, :16] & 15 | codes[:, 16:] << 4
    if form.fifth:
        blocks["fifth"] = np.packbits(codes >> 4, axis=1, bitorder="little")
    return blocks.view(np.uint8).reshape(rows, columns // _BLOCK * form.layout.itemsize)


def _unpack(form: _BlockForm, stored: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Codes [n, columns] from 0 on, scales and least weights [n, blocks] of rows of blocks [n, bytes]."""
    taken, rows = _take_apart(form, stored), len(stored)
    return taken.codes.reshape(rows, -1), taken.scale.reshape(rows, -1), taken.least.reshape(rows, -1)


def decode(form: _BlockForm, stored: Bytes) -> Floats:
    """Blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    columns = stored.shape[1] // form.layout.itemsize * _BLOCK
    return values_of(_take_apart(form, stored), _meaning(form)).reshape(len(stored), columns)


def compare(form: _BlockForm, rows: Floats, stored: Bytes, weighted: bool = False) -> Comparison:
    """Weights beside blocks; wrong are those further away than the nearest code and rounding to float16 explain.

    The bound is step / 2 + (|code| + 1) * (rounding of the step) + (rounding of the least weight), but a code at
    the end of its range may be any distance short of its weight. Where the step or the least weight of a block is not
    the one that its weights need, rounded to float16, the whole block is wrong; so too for an infinity or NaN. With an
    importance matrix (`weighted`) the step may be any that suits the few weights that matter, and llama.cpp fits it
    after the codes are chosen: they may be two steps off.
    """
    from neoxconv.quant.ggml.check_kernels import Simple, compare_simple, doubt_bytes, doubt_fives, doubt_nibbles

    doubt = doubt_bytes if form.has("codes") else doubt_fives if form.fifth else doubt_nibbles
    blocks = whole_blocks(form.name, form.layout, stored)
    weights = np.ascontiguousarray(rows, np.float32).reshape(-1, _BLOCK)
    known = Simple(np.float32(form.levels), form.least, weighted)
    wrong, doubtful = np.zeros(weights.shape, np.bool_), np.empty(len(blocks), np.bool_)
    doubt(weights, blocks, known, _meaning(form), doubtful)
    if doubtful.any():
        taken = _take_apart(form, blocks[doubtful])
        found = np.empty(taken.codes.shape, np.bool_)
        compare_simple(weights[doubtful], taken.codes, (taken.scale, taken.least), known, _meaning(form), found)
        wrong[doubtful] = found
    return Comparison(wrong.reshape(rows.shape), partial(decode, form, stored))


@cache
def _meaning(form: _BlockForm) -> Meaning:
    """What codes stand for, as they are stored."""
    return meaning(-128 if form.has("codes") else form.lowest, form.lowest, form.highest)


def _take_apart(form: _BlockForm, stored: Bytes) -> Blocks:
    """The numbers in blocks [n, bytes]. Raises CheckpointError where the bytes are no whole number of blocks."""
    from neoxconv.quant.ggml import simple_kernels

    raw = whole_blocks(form.name, form.layout, stored)
    step, least = np.zeros((2, len(raw)), np.float32)
    simple_kernels.halves(raw, 0, step)
    if form.least:
        simple_kernels.halves(raw, 2, least)
        np.negative(least, out=least)
    codes = np.empty((len(raw), _BLOCK), np.uint8)
    if form.has("codes"):
        simple_kernels.unpack_bytes(raw, codes)
    else:
        simple_kernels.unpack(raw, form.fifth, codes)
    return Blocks(codes, step, least)


def encoding(form: _BlockForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    dtype = DType(form.name, _BLOCK, form.layout.itemsize, np.dtype(np.uint8))
    searched = partial(search, form) if form.name in SEARCHES else None
    return Encoding(
        name=form.name,
        dtype=dtype,
        encode=partial(encode, form),
        decode=partial(decode, form),
        compare=partial(compare, form),
        search=searched,
        grid=grid(SEARCHES[form.name], partial(_pack, form), partial(_unpack, form)) if searched else None,
    )


def layout(*fields: Any) -> np.dtype[Any]:
    """Fields that follow each other without gaps."""
    return np.dtype(list(fields))


Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 = map(
    encoding,
    (
        _BlockForm("Q8_0", layout(_STEP, _CODES), levels=127, lowest=-127, highest=127),
        _BlockForm("Q4_0", layout(_STEP, _NIBBLES), levels=8, lowest=-8, highest=7),
        _BlockForm("Q4_1", layout(_STEP, _LEAST, _NIBBLES), levels=15, lowest=0, highest=15),
        _BlockForm("Q5_0", layout(_STEP, _FIFTH, _NIBBLES), levels=16, lowest=-16, highest=15),
        _BlockForm("Q5_1", layout(_STEP, _LEAST, _FIFTH, _NIBBLES), levels=31, lowest=0, highest=31),
    ),
)

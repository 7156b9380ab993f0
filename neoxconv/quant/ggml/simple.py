"""ggml's simple blocks: 32 weights share a float16 step (and a least weight), each keeps a code of 4, 5 or 8 bits.

    w ~ step * code            Q8_0, Q4_0, Q5_0: codes around zero, nibbles stored with 8 or 16 added
    w ~ step * code + least    Q4_1, Q5_1: codes from zero on

Nibble j holds weight j in its low and weight j + 16 in its high half; bit j of `fifth` is the fifth bit of weight j.
The bytes are those of llama.cpp's quantize_row_*_ref.
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
from neoxconv.quant.ggml.search import find, grid
from neoxconv.quant.ggml.searches import SEARCHES, check_columns

_BLOCK = 32
_ROUNDING = np.float32(1.01 / 2048)  # half a unit in the last place of a float16; 1 % for float32 arithmetic
_SMALLEST = np.float32(1.01 * 2.0**-25)  # the same for subnormals

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


@dataclass(frozen=True)
class _Blocks:
    """Blocks taken apart: step and least [n], codes [n, 32], all float32."""

    step: Floats
    least: Floats
    codes: Floats


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
    codes = (taken.codes - np.float32(form.lowest)).astype(np.uint8)
    return codes.reshape(rows, -1), taken.step.reshape(rows, -1), -taken.least.reshape(rows, -1)


def decode(form: _BlockForm, stored: Bytes) -> Floats:
    """Blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    taken = _take_apart(form, stored)
    values = taken.codes
    with np.errstate(invalid="ignore"):  # 0 * infinity, in a damaged block
        values *= taken.step[:, None]
        if form.least:
            values += taken.least[:, None]
    return values.reshape(len(stored), stored.shape[1] // form.layout.itemsize * _BLOCK)


def wrong(form: _BlockForm, rows: Floats, stored: Bytes, weighted: bool = False) -> npt.NDArray[np.bool_]:
    """True where a weight is further from its stored value than rounding to the nearest code and to float16 explain.

    The bound is step / 2 + (|code| + 1) * (rounding of the step) + (rounding of the least weight), but a code at
    the end of its range may be any distance short of its weight. Where the step or the least weight of a block is not
    the one that its weights need, rounded to float16, the whole block is wrong; so too for an infinity or NaN. With an
    importance matrix (`weighted`) the step may be any that suits the few weights that matter, and llama.cpp fits it
    after the codes are chosen: they may be two steps off.
    """
    from neoxconv.quant.ggml import simple_kernels

    weights = np.ascontiguousarray(rows, np.float32).reshape(-1, _BLOCK)
    taken = _take_apart(form, stored)
    with np.errstate(invalid="ignore", over="ignore"):
        step, least = needed(form, simple_kernels.spans(weights))
        finite = np.isfinite(step)
        if weighted:
            step, least = np.abs(taken.step), taken.least
        slope, slack = _half_ulp(step), _half_ulp(least)
        fits = finite & (np.abs(np.abs(taken.step) - step) <= slope) & (np.abs(taken.least - least) <= slack)
        free = 2 * step + form.levels * _SMALLEST if weighted else step / 2
        limits = np.stack([taken.step, taken.least, slope, free + slope + slack], axis=1)
    result = simple_kernels.outside(weights, taken.codes, limits, (form.lowest, form.highest))
    result |= ~fits[:, None]
    return result.reshape(rows.shape)


def needed(form: _BlockForm, spans: Floats) -> tuple[Floats, Floats]:
    """The size of the step, and the least weight, that blocks need whose smallest and largest weights are `spans`."""
    low, high = spans[:, 0], spans[:, 1]
    if form.least:
        return np.divide(high - low, form.levels, dtype=np.float32), low
    return np.divide(np.maximum(-low, high), form.levels, dtype=np.float32), np.zeros_like(low)


def _half_ulp(values: Floats) -> Floats:
    """How far rounding to float16 may move values."""
    return np.maximum(np.abs(values) * _ROUNDING, _SMALLEST)


def _take_apart(form: _BlockForm, stored: Bytes) -> _Blocks:
    """The numbers in blocks [n, bytes]. Raises CheckpointError where the bytes are no whole number of blocks."""
    from neoxconv.quant.ggml import simple_kernels

    count, row = stored.shape
    if row % form.layout.itemsize:
        raise CheckpointError(
            f"{form.name}: blocks have {form.layout.itemsize} bytes, but a row has {row}. "
            "The file is damaged or its type is another one."
        )
    raw = np.ascontiguousarray(stored).reshape(count * row // form.layout.itemsize, form.layout.itemsize)
    blocks = raw.view(form.layout)[:, 0]
    step = blocks["step"].astype(np.float32)
    least = blocks["least"].astype(np.float32) if form.least else np.zeros_like(step)
    if form.has("codes"):
        return _Blocks(step, least, blocks["codes"].astype(np.float32))
    return _Blocks(step, least, simple_kernels.unpack(raw, -form.lowest, form.fifth))


def encoding(form: _BlockForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    dtype = DType(form.name, _BLOCK, form.layout.itemsize, np.dtype(np.uint8))
    searched = partial(search, form) if form.name in SEARCHES else None
    return Encoding(
        name=form.name,
        dtype=dtype,
        encode=partial(encode, form),
        decode=partial(decode, form),
        wrong=partial(wrong, form),
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

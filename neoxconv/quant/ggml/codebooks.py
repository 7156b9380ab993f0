"""ggml's codebooks: groups of 4 or 8 weights are one of a few hundred entries, which share a super-block's scales.

    w ~ step * (2 * scale + 1) * sign * entry         IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S
    w ~ step * (2 * scale + 1) * (entry +- 1/8)       IQ1_S, IQ1_M: entries of -1, 0 and 1

A super-block is 256 weights with a float16 step. The entries are llama.cpp's, as its package gguf has them. Bytes are
those of ggml-common.h; where each number lies is said in bits. Of the signs of eight weights the last may be missing:
it makes the count of negative ones even.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from neoxconv.core.encoding import Comparison, Context, Encoding
from neoxconv.dtypes import Bytes, DType, Floats
from neoxconv.errors import CheckpointError
from neoxconv.quant.ggml.bit_places import Bits, Places, put, row, take
from neoxconv.quant.ggml.search import importance_in_lanes
from neoxconv.quant.ggml.searches import check_columns, steps

if TYPE_CHECKING:
    from neoxconv.quant.ggml.codebook_checks import Bound, Groups
    from neoxconv.quant.ggml.codebook_search import Book, Form, Found, Tries

_NOTHING = Context()
_SUPER = 256  # weights of a super-block
_KEPT = 16  # entries that the table has for the levels of a group
_SQUARE, _SHARE = 1, 0.6  # how much errors matter without an importance matrix (lanes.weigh)
_STEP = (row(0, 16, 1, 0),)

# What encoders may do, chosen so that no bytes of ours are called wrong (tests/quant/test_codebooks.py), and of ggml's
# few: of 1.8 million weights of each type 18 of IQ2_XXS, 2 of IQ2_S, none of the others.
_SLIPS = 3e-5
_LEAST, _MOST = np.float32(0.1), np.float32(1)  # scales: of the largest weight over the largest, the least level
_MOVED = np.float32(0.04)  # of a scale: ggml makes steps up to 3.3 % larger after scales are found
_APART = 0.5  # scales: ggml searches among 1, 3, 5 where 1, 3.125, 5.375 are read, and 15 where it is 15.5
_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.12, 1.25, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True, kw_only=True)
class CodebookForm:
    """The bytes of a super-block, and how its numbers are found.

    `block` weights share one of `multiples` scales. `unit` is what 1 is in gguf's numbers. Signs, where they are
    stored, are those of seven of eight weights if their count is `even`. `shift`, if any, is added to the entries of as
    many groups as `shifts` say, or taken away. `kept`: ggml keeps entries when it fits the scale to them. `grid` is
    where the search puts a block's largest weight; errors matter as importance * sqrt(w^2 + `spread` of the mean of w^2
    over the super-block). Steps are made larger by `stretch` at last: what errs least is smaller than the weights are
    (with IQ1_S by an eighth), and of all errors only this one is the same everywhere, so that it adds up in a model.
    """

    name: str
    nbytes: int
    block: int
    unit: int
    grid: tuple[float, ...]
    spread: float
    entries: Places
    scales: Places
    signs: Places = ()
    shifts: Places = ()
    step: Places = _STEP
    multiples: int = 16
    even: bool = False
    kept: bool = False
    shift: float = 0.0
    stretch: float = 1.0


@cache
def _gguf_grid(form: CodebookForm) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """What levels stand for [levels], and entries [entries, size], in gguf's numbers."""
    from gguf import quants

    kind = getattr(quants, form.name)
    kind.init_grid()
    return np.array(kind.grid_map, np.int32), kind.grid.reshape(kind.grid_shape).astype(np.int32)


@cache
def points(form: CodebookForm) -> Floats:
    """What entries stand for, [entries, size] in scales."""
    return _gguf_grid(form)[1].astype(np.float32) / np.float32(form.unit)


@cache
def book(form: CodebookForm) -> Book:
    """The codebook as the kernels take it."""
    from neoxconv.quant.ggml.codebook_search import Book, find_near

    values, entries = _gguf_grid(form)
    size, count = entries.shape[1], len(values)
    bits = (count - 1).bit_length()
    places = np.searchsorted(values, entries).astype(np.uint32) << np.arange(size, dtype=np.uint32) * np.uint32(bits)
    words = places.sum(axis=1, dtype=np.uint32) | np.arange(len(entries), dtype=np.uint32) << np.uint32(16)
    near = np.empty((count**size, _KEPT), np.uint32)
    find_near(values, entries, words, near)
    low, gap = values[0], values[1] - values[0]
    low, gap, extra = np.array([low, gap, values[-1] - low - gap * (count - 1)], np.float32) / np.float32(form.unit)
    return Book(size, count, bits, low, gap, extra, near)


def _kernels_form(form: CodebookForm, groups: int) -> Form:
    """What the search must know of blocks of so many groups: with shifts all combinations that can be stored."""
    from neoxconv.quant.ggml.codebook_search import Form

    stored = form.shifts[0].runs[1] * form.block // _SUPER if form.shifts else 0  # of a block
    signs = 1 - 2 * (np.arange(2**stored)[:, None] >> np.arange(groups) * stored // groups & 1)
    shifts = np.float32(form.shift) * signs.astype(np.float32)
    return Form(_SUPER // form.block, form.multiples, bool(form.signs), form.even, shifts)


def _tries(form: CodebookForm, thorough: bool) -> Tries:
    """How long the search is."""
    from neoxconv.quant.ggml.codebook_search import Tries

    trims = np.arange(13, dtype=np.float32) / np.float32(3) if thorough else np.arange(3, dtype=np.float32)
    return Tries(np.array(form.grid, np.float32), trims, 3 if thorough else 1, _KEPT if thorough else 8, _KEPT)


def encode(form: CodebookForm, rows: Floats, context: Context = _NOTHING) -> Bytes:
    """Rows [n, columns] as super-blocks [n, bytes]. Raises PlanError where they do not divide the columns."""
    from neoxconv.quant.ggml.codebook_search import Found, search

    check_columns(form.name, _SUPER, rows)
    taken, blocks = book(form), np.ascontiguousarray(rows, np.float32).reshape(rows.size // form.block, form.block)
    count, groups = len(blocks), form.block // taken.size
    found = Found(
        np.empty((count, groups), np.uint32),
        np.empty((count, groups), np.float32),
        np.empty((count, form.block // 8 if form.signs else 0), np.uint32),
        np.empty(count, np.uint8),
        np.empty(count, np.float32),
    )
    group = _SUPER // form.block
    worth = _SQUARE, _SHARE, *importance_in_lanes(context.importance, blocks, group, form.spread)
    search(blocks, worth, (_kernels_form(form, groups), taken), _tries(form, context.thorough), found)
    return _pack(form, found).reshape(len(rows), rows.shape[1] // _SUPER * form.nbytes)


def _pack(form: CodebookForm, found: Found) -> Bytes:
    """Super-blocks [n, bytes] of what was found."""
    supers = len(found.scales) * form.block // _SUPER
    stored = np.zeros((supers, form.nbytes), np.uint8)
    steps = found.steps[:: _SUPER // form.block, None] * np.float32(form.stretch)
    negative = (found.shifts < 0).reshape(supers, found.shifts.size // max(supers, 1))
    if form.shifts:
        negative = negative[:, :: max(1, negative.shape[1] // form.shifts[0].runs[1])]
    for places, numbers in (
        (form.step, steps.astype(np.float16).view(np.uint16)), (form.entries, found.entries), (form.signs, found.signs),
        (form.scales, found.scales), (form.shifts, negative),
    ):  # fmt: skip
        put(stored, places, np.ascontiguousarray(numbers, np.uint32).reshape(supers, numbers.size // max(supers, 1)))
    return stored


def take_apart(form: CodebookForm, stored: Bytes) -> Groups:
    """The numbers in super-blocks [n, bytes]. Raises CheckpointError where the bytes are no whole number of them."""
    from neoxconv.quant.ggml.codebook_checks import Groups

    if stored.shape[1] % form.nbytes:
        raise CheckpointError(
            f"{form.name}: blocks have {form.nbytes} bytes, but a row has {stored.shape[1]}. "
            "The file is damaged or its type is another one."
        )
    blocks = np.ascontiguousarray(stored).reshape(-1, form.nbytes)
    entries, signs = take(blocks, form.entries), take(blocks, form.signs)
    if form.even:
        signs |= (np.bitwise_count(signs) & 1).astype(np.uint32) << np.uint32(7)
    step = take(blocks, form.step).astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinite steps, in a damaged block
        scale = step * (2 * take(blocks, form.scales) + 1).astype(np.float32)
    shifts = np.float32(form.shift) * (1 - 2 * take(blocks, form.shifts).astype(np.float32))
    return Groups(entries, signs, shifts, scale, step[:, 0])


def decode(form: CodebookForm, stored: Bytes) -> Floats:
    """Super-blocks [n, bytes] as the float32 numbers [n, columns] that ggml reads."""
    from neoxconv.quant.ggml.codebook_checks import read

    taken = take_apart(form, stored)
    values = np.empty((len(taken.step), _SUPER), np.float32)
    read(taken, points(form), values)
    return values.reshape(len(stored), stored.shape[1] // form.nbytes * _SUPER)


def bound(form: CodebookForm) -> Bound:
    """What an encoder's scales and entries may be."""
    from neoxconv.quant.ggml.codebook_checks import Bound

    least, top = np.abs(points(form)).min(), points(form).max()
    factors = np.array(_FACTORS if form.kept else (), np.float32)
    return Bound(
        _LEAST / top, _MOST / max(least, np.float32(form.shift)), _MOVED, np.float32(_APART), factors, form.even
    )


def compare(form: CodebookForm, rows: Floats, stored: Bytes, weighted: bool = False) -> Comparison:
    """Weights beside super-blocks; wrong are those in place of which another entry of the codebook is nearer.

    Which entry errs least depends on what errors matter, which is not known. But where another one is nearer to every
    weight in which the two differ, by more than rounding the scale explains, no encoder can have chosen this one. Nor
    can scales be far from those that a block's largest weight needs.
    """
    from neoxconv.quant.ggml import codebook_checks

    taken = take_apart(form, stored)
    weights = np.ascontiguousarray(rows, np.float32).reshape(-1, _SUPER)
    wrong, values = np.empty(weights.shape, np.bool_), np.empty(weights.shape, np.float32)
    codebook_checks.compare(weights, taken, (points(form), book(form)), bound(form), wrong, values)
    return Comparison(wrong.reshape(rows.shape), lambda: values.reshape(rows.shape))


def encoding(form: CodebookForm) -> Encoding:
    """The row of the table of encodings for `form`."""
    encoder = partial(encode, form)
    return Encoding(
        name=form.name,
        dtype=DType(form.name, _SUPER, form.nbytes, np.dtype(np.uint8)),
        encode=encoder,
        decode=partial(decode, form),
        compare=partial(compare, form),
        search=encoder,
        slips=_SLIPS,
    )


FORMS = (
    CodebookForm(
        name="IQ3_XXS", nbytes=98, block=32, unit=4, grid=steps(9.6, 21.6, 12), spread=2.0, kept=True, even=True,
        entries=(row(2 * 8, 8, 64, 8),),
        signs=(Bits(66 * 8, 7, (8, 4), (32, 7)),), scales=(row(66 * 8 + 28, 4, 8, 32),),
    ),
    CodebookForm(
        name="IQ3_S", nbytes=110, block=32, unit=1, grid=steps(12, 18, 13), spread=2.0, kept=True,
        entries=(row(2 * 8, 8, 64, 8), row(66 * 8, 1, 64, 1, low=8)),
        signs=(row(74 * 8, 8, 32, 8),), scales=(row(106 * 8, 4, 8, 4),),
    ),
    CodebookForm(
        name="IQ2_XXS", nbytes=66, block=32, unit=8, grid=steps(2.8, 8.4, 12), spread=1.0, even=True,
        entries=(Bits(2 * 8, 8, (8, 4), (64, 8)),),
        signs=(Bits(6 * 8, 7, (8, 4), (64, 7)),), scales=(row(6 * 8 + 28, 4, 8, 64),),
    ),
    CodebookForm(
        name="IQ2_XS", nbytes=74, block=16, unit=8, grid=steps(2.8, 8.4, 12), spread=1.0, kept=True, even=True,
        entries=(row(2 * 8, 9, 32, 16),),
        signs=(row(2 * 8 + 9, 7, 32, 16),), scales=(row(66 * 8, 4, 16, 4),),
    ),
    CodebookForm(
        name="IQ2_S", nbytes=82, block=16, unit=8, grid=steps(2.8, 8.4, 12), spread=2.0, kept=True,
        entries=(row(2 * 8, 8, 32, 8), row(66 * 8, 2, 32, 2, low=8)),
        signs=(row(34 * 8, 8, 32, 8),), scales=(row(74 * 8, 4, 16, 4),),
    ),
    CodebookForm(
        name="IQ1_S", nbytes=50, block=32, unit=1, grid=steps(0.7, 2.8, 12), spread=2.0, kept=True, multiples=8,
        entries=(row(2 * 8, 8, 32, 8), Bits(34 * 8, 3, (8, 4), (16, 3), low=8)),
        scales=(row(34 * 8 + 12, 3, 8, 16),), shift=0.125, shifts=(row(34 * 8 + 15, 1, 8, 16),),
        stretch=1.08,
    ),
    CodebookForm(
        name="IQ1_M", nbytes=56, block=16, unit=1, grid=steps(0.7, 2.8, 12), spread=2.0, kept=True, multiples=8,
        entries=(row(0, 8, 32, 8), row(32 * 8, 3, 32, 4, low=8)),
        scales=(Bits(48 * 8, 3, (4, 4), (16, 3)),), shift=0.125, shifts=(row(32 * 8 + 3, 1, 32, 4),),
        stretch=1.08,
        step=tuple(row(48 * 8 + 12 + 16 * i, 4, 1, 0, low=4 * i) for i in range(4)),
    ),
)  # fmt: skip

IQ3_XXS, IQ3_S, IQ2_XXS, IQ2_XS, IQ2_S, IQ1_S, IQ1_M = map(encoding, FORMS)

"""compressed-tensors' pack-quantized: whole numbers of 2 to 8 bits, with a scale for some columns of each row.

    w ~ (code - zero) * scale      scale: the largest |w| / 7.5 (of 4 bits, 2^4 - 1 steps), codes -8 to 7, zero 0
    asymmetric                     scale: (the largest - the least) / 15, zero: -8 - least / scale, rounded

    weight_packed      I32 [rows, columns * bits / 32]   code + 8; of a row's numbers the first in the lowest bits
    weight_scale       F16, BF16 or F32 [rows, groups]   the model's type
    weight_zero_point  I32 [rows * bits / 32, groups]    zero + 8, packed down the columns; asymmetric only
    weight_shape       I64 [2]                           rows, columns
    weight_g_idx       I32 [columns]                     the group of each column; read, never written

The bytes are those of compressed-tensors 0.20 (calculate_qparams in quantization/utils/helpers.py, _quantize in
quantization/lifecycle/forward_helpers.py, compressors/pack_quantized/helpers.py), which computes in the model's type:
scale, zero, w / scale and w / scale + zero are rounded to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from neoxconv.core.encoding import Bound, Part, Scaled, Scales, scale_and_least
from neoxconv.core.tensor import LazyTensor, Misfits, Read
from neoxconv.dtypes import I8, I32, I64, Array, Bools, Bytes, DType, Floats, narrow
from neoxconv.quant.scaled.groups import BlockGroups, RowGroups, TensorGroup, ends, largest
from neoxconv.quant.scaled.rounding import as_native, digits, rounding_to

PACKED, ORDER = "weight_packed", "weight_g_idx"
BITS = range(2, 9)  # that can be read; vLLM takes the same
ROW, TENSOR = 0, -1  # in place of the columns of a group
_WORD = 32  # bits; so many numbers fill whole words, whatever their bits
_TRIED = np.linspace(0.7, 1.1, 17, dtype=np.float32)  # of a group's largest weight, as its size, with a calibration
_FEW = 4  # bits: the search for a scale compares a weight with every middle of two codes


@dataclass(frozen=True)
class PackedForm:
    """How numbers are packed: their bits, the columns of a group (or ROW, TENSOR), with zeros or without; `ordered`: an
    index tells the columns' groups."""

    bits: int
    columns: int
    symmetric: bool = True
    ordered: bool = False

    @property
    def name(self) -> str:
        by = {ROW: "CHANNEL", TENSOR: "TENSOR"}.get(self.columns, f"G{self.columns}")
        return f"W{self.bits}A16_{by}" + "_ASYM" * (not self.symmetric) + "_ORDERED" * self.ordered

    @property
    def top(self) -> int:
        """One more than the largest code."""
        return 1 << (self.bits - 1)

    @property
    def steps(self) -> np.float32:
        """Steps of a scale in the largest weight of a group without a zero."""
        return np.float32(self.top - 0.5)

    def words(self, count: int) -> int:
        """Words that so many numbers take."""
        return -(-count * self.bits // _WORD)

    def groups(self, columns: int) -> int:
        """Groups of so many columns."""
        return columns // self.columns if self.columns > 0 else 1


def parts(form: PackedForm, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    rows, columns = tensor.rows, tensor.columns
    one, groups = form.columns == TENSOR, form.groups(columns)
    zero = Part("weight_zero_point", I8, (1,)) if one else Part("weight_zero_point", I32, (form.words(rows), groups))
    return (
        Part(PACKED, I32, (rows, form.words(columns))),
        Part("weight_scale", tensor.native, (1,) if one else (rows, groups)),
        *(() if form.symmetric else (zero,)),
        Part("weight_shape", I64, (2,)),
        *((Part(ORDER, I32, (columns,)),) if form.ordered else ()),
    )


def measure(form: PackedForm, groups: Floats) -> Floats:
    """The sizes of groups [groups, width]: the largest magnitude, or [groups, 2] the least and the largest of their
    weights and 0."""
    if form.symmetric:
        return largest(groups)
    least, most = ends(groups).T
    return np.stack([np.minimum(least, np.float32(0)), np.maximum(most, np.float32(0))], axis=1)


def numbers(form: PackedForm, sizes: Floats, native: DType) -> tuple[Floats, Floats]:
    """Scales and zeros [groups] of groups by their sizes, as the model's type has them; no scale is 0."""
    if form.symmetric:
        found = as_native(native, sizes / form.steps)
        zeros = np.zeros_like(found)
    else:
        least, most = sizes.T
        found = as_native(native, as_native(native, most - least) / (2 * form.steps))
        with np.errstate(all="ignore"):  # of groups of zeros
            zeros = as_native(native, np.float32(-form.top) - as_native(native, least / found))
        zeros = np.rint(np.clip(np.nan_to_num(zeros, nan=0.0), -form.top, form.top - 1))
    least_scale = np.float32(2.0 ** -digits(native))  # the type's step above 1, which compressed-tensors takes for 0
    return np.where(found == 0, least_scale, found), zeros


def encode(form: PackedForm, rows: Floats, sizes: Floats, native: DType) -> Array:
    """Rows [n, columns] as bytes of packed codes [n, bytes], by the sizes of their groups."""
    from neoxconv.quant.scaled.packed_kernels import encode_rows

    packed = np.empty((len(rows), 4 * form.words(rows.shape[1])), np.uint8)
    scales, zeros = (each.reshape(len(rows), -1) for each in numbers(form, sizes, native))
    encode_rows(np.ascontiguousarray(rows, np.float32), scales, zeros, rounding_to(native), form.bits, packed)
    return packed


def finish(form: PackedForm, tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of scales, zeros and shape."""
    scales, zeros = numbers(form, sizes, tensor.native)
    stored = narrow(scales, tensor.native).tobytes()
    shape = np.array(tensor.shape, "<i8").tobytes()
    if form.symmetric:
        return stored, shape
    codes = (zeros.reshape(tensor.rows, -1).T + np.float32(form.top)).astype(np.uint8)
    words = pack(form, np.ascontiguousarray(codes)).view("<i4")
    return stored, np.ascontiguousarray(words.T).tobytes(), shape


def decode(form: PackedForm, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows; scales of float16 and bfloat16 make the products exact."""
    packed, columns = stored[PACKED], math.prod(shape[1:])

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.packed_kernels import read_rows

        values = np.empty((stop - start, columns), np.float32)
        scales, zeros = _scales_of(form, stored, start, stop), _zeros_of(form, stored, start, stop)
        if form.ordered:  # a group for every column, then
            order = stored[ORDER].read(0, columns)
            scales, zeros = (np.ascontiguousarray(each[:, order]) for each in (scales, zeros))
        codes = np.ascontiguousarray(packed.read(start, stop)).view(np.uint8)
        read_rows(codes, scales, zeros, form.bits, values)
        return values

    return read


def misfits(form: PackedForm, stored: Mapping[str, LazyTensor], native: DType) -> Misfits | None:
    """What judges weights by the scales and zeros that are stored; None where groups are no neighbours."""

    def found(rows: Floats, values: Floats, start: int) -> Bools:
        stop = start + len(rows)
        scales, zeros = _scales_of(form, stored, start, stop), _zeros_of(form, stored, start, stop)
        tops, width = scales.reshape(-1) * np.float32(form.top), rows.shape[1] // scales.shape[1]
        known = tops if form.symmetric else np.stack([tops, (zeros * scales).reshape(-1)], axis=1)
        by = Scales(known, known, np.zeros_like(tops), native)
        return check(form, as_native(native, rows), values, by, width)

    return None if form.ordered else found


def _scales_of(form: PackedForm, stored: Mapping[str, LazyTensor], start: int, stop: int) -> Floats:
    """The scales [n, groups] of rows."""
    scale = stored["weight_scale"]
    if form.columns == TENSOR:
        return np.repeat(scale.floats(0, 1).reshape(1, 1), stop - start, axis=0)
    return np.ascontiguousarray(scale.floats(start, stop))


def _zeros_of(form: PackedForm, stored: Mapping[str, LazyTensor], start: int, stop: int) -> Floats:
    """The zeros [n, groups] of rows."""
    groups = 1 if form.columns == TENSOR else stored["weight_scale"].columns
    if form.symmetric:
        return np.zeros((stop - start, groups), np.float32)
    if form.columns == TENSOR:
        return np.full((stop - start, 1), stored["weight_zero_point"].read(0, 1)[0], np.float32)
    from neoxconv.quant.scaled.packed_kernels import unpack_rows

    first = start // _WORD  # where words begin with a number
    words = stored["weight_zero_point"].read(first * form.bits, form.words(stop))
    codes = np.empty((groups, stop - first * _WORD), np.uint8)
    unpack_rows(np.ascontiguousarray(words.T).view(np.uint8), form.bits, codes)
    return np.ascontiguousarray(codes[:, start - first * _WORD :].T).astype(np.float32) - np.float32(form.top)


def scales(form: PackedForm, sizes: Floats, native: DType) -> Scales:
    """What a code over one more than the largest is a share of, and what a zero takes away."""
    found, zeros = numbers(form, sizes, native)
    tops = found * np.float32(form.top)
    known = tops if form.symmetric else np.stack([tops, zeros * found], axis=1)
    return Scales(known, known, np.zeros_like(tops), native)


def check(form: PackedForm, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.packed_kernels import Numbers, check_rows

    top, contiguous = np.float32(form.top), np.ascontiguousarray
    (encoded, low), (decoded, least) = map(scale_and_least, (scales.encoded, scales.decoded))
    zeros = np.divide(low, encoded, out=np.zeros_like(low), where=encoded != 0) * top
    read_by = contiguous(decoded / top), contiguous(least), contiguous(scales.slack)
    groups = Numbers(contiguous(encoded / top), np.rint(zeros), *read_by, width)
    wrong = np.empty(weights.shape, np.bool_)
    flat, read = (contiguous(each, np.float32).reshape(-1) for each in (weights, values))
    check_rows(flat, read, groups, rounding_to(scales.native), form.bits, wrong.reshape(-1))
    return wrong


def suited(form: PackedForm, rows: Floats, matters: Floats) -> Floats:
    """The size of each group with which its nearest codes err least, of a few; errors are squared and weighted by how
    much their columns matter [columns]."""
    from neoxconv.quant.scaled.kernels import fit_sizes

    blocks, weights = (_groups(form).apart(each) for each in (rows, np.broadcast_to(matters, rows.shape)))
    sizes = largest(blocks)
    fit_sizes(blocks, weights, np.arange(-form.top, form.top, dtype=np.float32) / form.steps, _TRIED, sizes)
    return sizes


def pack(form: PackedForm, places: Bytes) -> Bytes:
    """Bytes of packed codes of their places among all of them."""
    from neoxconv.quant.scaled.packed_kernels import pack_rows

    packed = np.empty((len(places), form.words(places.shape[1]) * 4), np.uint8)
    pack_rows(places, form.bits, packed)
    return packed


def _groups(form: PackedForm) -> BlockGroups | RowGroups | TensorGroup:
    """Which weights share a scale, where columns are a multiple of a group's."""
    if form.columns > 0:
        return BlockGroups(form.columns)
    return RowGroups() if form.columns == ROW else TensorGroup()


def packed(form: PackedForm) -> Scaled:
    """The row of the table of encodings for `form`."""
    return Scaled(
        name=form.name,
        dtype=DType(form.name, _WORD, 4 * form.bits, np.dtype("<f4")),
        groups=_groups(form),
        measure=partial(measure, form),
        parts=partial(parts, form),
        encode=partial(encode, form),
        finish=partial(finish, form),
        decode=partial(decode, form),
        scales=partial(scales, form),
        check=partial(check, form),
        table=np.arange(-form.top, form.top, dtype=np.float32) / np.float32(form.top),
        pack=partial(pack, form),
        suited=partial(suited, form) if form.symmetric and form.bits <= _FEW else None,
        bound=_bound(form),
        rounded=lambda native: native,
        numbers=1 if form.symmetric else 2,
        multiple=max(form.columns, 1),
    )


def _bound(form: PackedForm) -> Bound:
    """Half a step, which is so much of a group's largest weight, or of the range of its weights."""
    of = "row" if form.columns == ROW else "group"
    if form.symmetric:
        return Bound(0.5 / float(form.steps), f"{of}'s largest")
    return Bound(0.5 / (2 * float(form.steps)), f"{of}'s range")


WRITTEN = tuple(
    packed(PackedForm(bits, columns, symmetric))
    for bits in (4, 8)
    for columns in (128, 64, 32, ROW)
    for symmetric in (True, False)
)

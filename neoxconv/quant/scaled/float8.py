"""float8: numbers of one byte, alone, with a scale for each row, or with one scale for the tensor.

    w ~ number * scale      scale: the least power of two by which nothing is beyond the largest number

A power of two is exact in every type, and so is its product with a float8: a model in float16 has the same weights as
one in float32. It costs half a percent more error than scales that use all of the range. E4M3 (as torch's
float8_e4m3fn: no infinity, 448 at most) is off by up to a 16th of a weight, E5M2 (57,344 at most) by up to an 8th.
Rounding is to nearest, ties to even; what is beyond the largest number becomes that number. The names beside scales are
compressed-tensors': weight F8, weight_scale F32 [rows, 1] or [1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from neoxconv import dtypes
from neoxconv.core.encoding import EXACT, Bound, Encoding, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Misfits, Read
from neoxconv.dtypes import F32, Array, Bools, Bytes, DType, Floats
from neoxconv.quant.plain import compare
from neoxconv.quant.scaled.check import checked
from neoxconv.quant.scaled.groups import RowGroups, TensorGroup, largest
from neoxconv.quant.scaled.rounding import as_native, digits

if TYPE_CHECKING:
    from neoxconv.quant.scaled.float8_kernels import Limits

_SMALLEST = -24  # the power of two that is float16's smallest number


@dataclass(frozen=True)
class Float8Form:
    """A form of float8: sign, exponent and mantissa, in this order; subnormals as IEEE 754 has them."""

    dtype: DType
    mantissa: int  # bits
    bias: int
    largest: float

    @property
    def limit(self) -> float:
        """The largest number that is rounded to the largest one of the form. E4M3's is even, so it gets the tie."""
        halfway = self.largest + 2.0 ** (math.frexp(self.largest)[1] - 2 - self.mantissa)
        return halfway if self.largest_code % 2 == 0 else float(np.nextafter(np.float32(halfway), np.float32(0)))

    @property
    def largest_code(self) -> int:
        return int(np.flatnonzero(table(self) == self.largest)[0])

    @property
    def bound(self) -> Bound:
        """How far a normal number is rounded; smaller ones no further than the smallest normal one."""
        return Bound(2.0 ** -(self.mantissa + 1), "weight", f"{self.smallest / 2:.2g}")

    @property
    def scaled_bound(self) -> Bound:
        """The same of what is scaled, by twice the largest weight over the largest number at most."""
        return Bound(self.bound.share, "weight", f"{self.smallest / self.largest:.2g} of the largest")

    @property
    def smallest(self) -> float:
        """The smallest number above 0."""
        return float(2.0 ** (1 - self.bias - self.mantissa))


@cache
def table(form: Float8Form) -> Floats:
    """The values of the 256 codes; above the largest come infinity, where the mantissa is 0, and NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> form.mantissa, code & ((1 << form.mantissa) - 1)
    digits = np.where(exponent > 0, mantissa + (1 << form.mantissa), mantissa).astype(np.float32)
    values = np.ldexp(digits, np.maximum(exponent, 1) - form.bias - form.mantissa)
    values = np.where(values > form.largest, np.where(mantissa == 0, np.float32(np.inf), np.float32(np.nan)), values)
    return np.concatenate([values, -values])


@cache
def limits(form: Float8Form) -> Limits:
    """What the kernels know about `form`."""
    from neoxconv.quant.scaled.float8_kernels import Limits

    unit, first = 1 << form.mantissa, 128 - form.bias  # first: the smallest normal number's exponent, in float32
    over = 127 + math.frexp(form.largest)[1]
    return Limits(
        unit=np.uint32(unit),
        lift=np.uint32(23 - form.mantissa),
        exponent_gap=np.uint32(first * unit),
        normal=np.uint32(first << 23),
        over=np.uint32(over << 23),
        top=np.uint32(form.largest_code),
        infinite=np.uint32(form.largest_code + 1 if np.isinf(table(form)[form.largest_code + 1]) else 0x80),
        spread=np.uint32(1 << (23 - form.mantissa)),
        ahead=np.uint32((254 - form.bias) << 23),
    )


def encode(form: Float8Form, rows: Floats) -> Bytes:
    """The codes of float32 numbers; a NaN becomes 0x7F or 0xFF."""
    from neoxconv.quant.scaled.float8_kernels import narrow

    codes = np.empty(rows.size, np.uint8)
    narrow(np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint32), limits(form), codes)
    return codes.reshape(rows.shape)


def decode(form: Float8Form, codes: Bytes) -> Floats:
    """The values of codes in float32, exact."""
    return _times(form, codes, np.ones(len(codes), np.float32))


def _times(form: Float8Form, codes: Bytes, scales: Floats) -> Floats:
    """The values of rows of codes [n, ...], times the scale [n] of each."""
    from neoxconv.quant.scaled.read_kernels import read_numbers

    rows = np.ascontiguousarray(codes).reshape(len(scales), codes.size // max(1, len(scales)))
    values = np.empty(rows.shape, np.float32)
    read_numbers(rows, scales, limits(form), values)
    return values.reshape(codes.shape)


def weight_scales(form: Float8Form, sizes: Floats) -> Floats:
    """The scales of groups by their largest weights; 1 for groups of zeros, and none that float16 does not have."""
    fraction, power = np.frexp(sizes.astype(np.float64) / form.largest)
    power = np.where(fraction == 0.5, power - 1, power)  # already a power of two
    return np.where(sizes > 0, np.ldexp(np.float32(1), np.maximum(power, _SMALLEST)), np.float32(1)).astype(np.float32)


def scales(form: Float8Form, sizes: Floats, native: DType) -> Scales:
    """What the largest number of the form stands for in each group [groups]: 1 is that number here."""
    tops = weight_scales(form, sizes) * np.float32(form.largest)
    return Scales(tops, tops, np.zeros_like(tops))


def _encode_scaled(form: Float8Form, rows: Floats, sizes: Floats, native: DType) -> Bytes:
    """Rows [n, columns] as codes: sizes [n] or [1]."""
    from neoxconv.quant.scaled.float8_kernels import divide

    codes = np.empty(rows.shape, np.uint8)
    divisors = np.ascontiguousarray(np.broadcast_to(weight_scales(form, sizes), len(rows)))
    divide(np.ascontiguousarray(rows, np.float32), divisors, limits(form), codes)
    return codes


def parts(form: Float8Form, by_row: bool, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    return (
        Part("weight", form.dtype, tensor.shape),
        Part("weight_scale", F32, (tensor.rows, 1) if by_row else (1,)),
    )


def finish(form: Float8Form, tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of the scales."""
    return (weight_scales(form, sizes).tobytes(),)


def _decode_scaled(form: Float8Form, by_row: bool, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows."""
    scale = stored["weight_scale"]

    def read(start: int, stop: int) -> Array:
        found = scale.floats(start, stop) if by_row else scale.floats(0, 1)
        rows = stored["weight"].read(start, stop)
        return _times(form, rows, np.ascontiguousarray(np.broadcast_to(found.reshape(-1), len(rows))))

    return read


def check(form: Float8Form, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.check_kernels import Even

    return checked(Even(np.float32(form.largest), True, limits(form)), weights, values, scales, width)


def misfits(form: Float8Form, stored: Mapping[str, LazyTensor], native: DType) -> Misfits:
    """What judges weights by the scales that are stored, over which they may have been rounded to the model's type."""
    scale, near = stored["weight_scale"], max(EXACT, 0.5 ** digits(native))

    def found(rows: Floats, values: Floats, start: int) -> Bools:
        scales = scale.floats(start, start + len(rows)) if scale.rows > 1 else scale.floats(0, 1)
        tops = np.broadcast_to(scales.reshape(-1), len(rows)) * np.float32(form.largest)
        by = Scales(tops, tops, np.zeros_like(tops), near=near)
        return check(form, as_native(native, rows), values, by, rows.shape[1])

    return found


def finite(form: Float8Form) -> tuple[Floats, Bytes]:
    """The numbers of the form, ascending, and the code of each."""
    values = table(form)
    numbers, codes = np.unique(values[np.isfinite(values)], return_index=True)
    return numbers, np.flatnonzero(np.isfinite(values))[codes].astype(np.uint8)


def _pack(form: Float8Form, places: Bytes) -> Bytes:
    """Codes of their places among the numbers."""
    return finite(form)[1][places]


def encoding(form: Float8Form) -> Encoding:
    """The row of the table of encodings for numbers on their own."""
    encoder, decoder = partial(encode, form), partial(decode, form)
    return Encoding(
        name=form.dtype.name,
        dtype=form.dtype,
        encode=encoder,
        decode=decoder,
        compare=partial(compare, encoder, decoder),
        limit=form.limit,
        bound=form.bound,
    )


def scaled(form: Float8Form, name: str, by_row: bool) -> Scaled:
    """The row for numbers with scales."""
    return Scaled(
        name=name,
        dtype=DType(name, 1, 1, np.dtype("<f4")),
        groups=RowGroups() if by_row else TensorGroup(),
        measure=largest,
        parts=partial(parts, form, by_row),
        encode=partial(_encode_scaled, form),
        finish=partial(finish, form),
        decode=partial(_decode_scaled, form, by_row),
        scales=partial(scales, form),
        check=partial(check, form),
        table=finite(form)[0] / np.float32(form.largest),
        pack=partial(_pack, form),
        bound=form.scaled_bound,
    )


FORM_E4M3 = Float8Form(dtypes.F8_E4M3, mantissa=3, bias=7, largest=448.0)
FORM_E5M2 = Float8Form(dtypes.F8_E5M2, mantissa=2, bias=15, largest=57344.0)
E4M3, E5M2 = encoding(FORM_E4M3), encoding(FORM_E5M2)
E4M3_CHANNEL, E4M3_TENSOR = (scaled(FORM_E4M3, f"E4M3_{by}", by == "CHANNEL") for by in ("CHANNEL", "TENSOR"))
E5M2_CHANNEL, E5M2_TENSOR = (scaled(FORM_E5M2, f"E5M2_{by}", by == "CHANNEL") for by in ("CHANNEL", "TENSOR"))

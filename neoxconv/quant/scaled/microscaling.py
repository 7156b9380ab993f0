"""MLX's types of small floating-point numbers: 16 or 32 of a row share a scale of 8 bits, as OCP's MX formats have it.

    w ~ number * scale

    mxfp4   32 weights of 4 bits (E2M1)   scale: the least power of two (E8M0) by which no weight is beyond 6
    mxfp8   32 weights of 8 bits (E4M3)   scale: the same, beyond 448
    nvfp4   16 weights of 4 bits (E2M1)   scale: E4M3, the largest weight over 6; none for the tensor, as MLX has none

    weight  U32 [rows, columns * bits / 32]     codes, dense, lowest first
    scales  U8 [rows, columns / group]

Quotients are rounded to the model's type, and of two numbers of 4 bits that are as near the smaller is taken. The bytes
are those of MLX 0.32.4 on a CPU (mlx/ops.cpp, fp_quantize). MLX until 0.32.2 had the nearest power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from neoxconv.core.encoding import EXACT, Bound, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import F32, U8, U32, Array, Bools, Bytes, DType, Floats
from neoxconv.quant.scaled import float8
from neoxconv.quant.scaled.affine import SCALES, pack, unpack
from neoxconv.quant.scaled.check import checked
from neoxconv.quant.scaled.float8 import FORM_E4M3
from neoxconv.quant.scaled.groups import BlockGroups, largest
from neoxconv.quant.scaled.rounding import as_native, digits, rounding_to

_E2M1 = np.array([sign * size for sign in (1, -1) for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)  # by code
_ASCENDING = np.unique(_E2M1)  # zero once
_BIAS = 127  # of E8M0: code 127 is 1


@dataclass(frozen=True)
class _FloatForm:
    """Numbers of so many bits, how many share a scale, and whether that is a power of two."""

    kind: str
    bits: int
    group: int
    power: bool
    bound: Bound

    @property
    def name(self) -> str:
        return f"MLX_{self.kind}"

    @property
    def largest(self) -> float:
        """The largest number."""
        return 6.0 if self.bits == 4 else FORM_E4M3.largest


def _codes_of_scales(form: _FloatForm, sizes: Floats, native: DType) -> tuple[Bytes, Floats]:
    """The codes of the scales of groups, by their largest weights [n], and what they stand for."""
    wanted = as_native(native, sizes / np.float32(form.largest))
    if not form.power:
        codes = float8.encode(FORM_E4M3, wanted)
        return codes, float8.decode(FORM_E4M3, codes)
    fraction, exponents = np.frexp(wanted)
    exponents = np.where(wanted > 0, exponents - (fraction == 0.5), 0).clip(-_BIAS, _BIAS)
    return (exponents + _BIAS).astype(np.uint8), np.ldexp(np.float32(1), exponents).astype(np.float32)


def _encode(form: _FloatForm, rows: Floats, sizes: Floats, native: DType) -> Array:
    """Rows [n, columns] as dense codes, uint32."""
    from neoxconv.quant.scaled.float8_kernels import divide
    from neoxconv.quant.scaled.microscaling_kernels import nearest_e2m1

    groups = np.ascontiguousarray(rows, np.float32).reshape(-1, form.group)
    _, scales = _codes_of_scales(form, sizes, native)
    codes = np.empty(groups.shape, np.uint8)
    if form.bits == 8:
        divide(groups, scales, float8.limits(FORM_E4M3), codes)
    else:
        nearest_e2m1(groups, scales, rounding_to(native), codes)
    return pack(form.bits, codes)


def _parts(form: _FloatForm, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    return (
        Part("weight", U32, (tensor.rows, tensor.columns * form.bits // 32)),
        Part(SCALES, U8, (tensor.rows, tensor.columns // form.group)),
    )


def _finish(form: _FloatForm, tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of the scales."""
    return (_codes_of_scales(form, sizes, tensor.native)[0].tobytes(),)


def _numbers(form: _FloatForm) -> Floats:
    """What the codes stand for."""
    return _E2M1 if form.bits == 4 else float8.table(FORM_E4M3)


def _decode(form: _FloatForm, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows."""

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled import microscaling_kernels

        codes = unpack(form.bits, stored["weight"].read(start, stop)).reshape(-1, form.group)
        found = np.ascontiguousarray(stored[SCALES].read(start, stop)).reshape(-1)
        powers = np.ldexp(np.float32(1), found.astype(np.int32) - _BIAS).astype(np.float32)
        values = np.empty(codes.shape, np.float32)
        scales = powers if form.power else float8.decode(FORM_E4M3, found)
        microscaling_kernels.read(codes, scales, _numbers(form), values)
        return values.reshape(stop - start, *shape[1:])

    return read


def _scales(form: _FloatForm, sizes: Floats, native: DType) -> Scales:
    """What 1 stands for in each group: E4M3 is a share of its largest number. Quotients are rounded to the type."""
    scales = _codes_of_scales(form, sizes, native)[1] * np.float32(1 if form.bits == 4 else form.largest)
    near = EXACT if form.power or native is F32 else 2.0 ** -digits(native)
    return Scales(scales, scales, np.zeros_like(scales), near=near)


def _check(form: _FloatForm, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.check_kernels import Sixteen

    if form.bits == 8:
        return float8.check(FORM_E4M3, weights, values, scales, width)
    rising = np.sort(_E2M1)
    return checked(Sixteen(rising, (rising[:-1] + rising[1:]) / np.float32(2)), weights, values, scales, width)


def _table(form: _FloatForm) -> Floats:
    """What codes stand for, ascending, each once."""
    return _ASCENDING if form.bits == 4 else float8.finite(FORM_E4M3)[0] / np.float32(form.largest)


def _pack(form: _FloatForm, places: Bytes) -> Array:
    """Dense codes of places in that table."""
    codes = np.array([np.flatnonzero(n == _E2M1)[0] for n in _ASCENDING], np.uint8)
    return pack(form.bits, (codes if form.bits == 4 else float8.finite(FORM_E4M3)[1])[places])


def _scaled(form: _FloatForm) -> Scaled:
    """The row of the table of encodings for `form`."""
    return Scaled(
        name=form.name,
        dtype=DType(form.name, form.group, form.group * form.bits // 8 + 1, np.dtype("<f4")),
        groups=BlockGroups(form.group),
        measure=largest,
        parts=partial(_parts, form),
        encode=partial(_encode, form),
        finish=partial(_finish, form),
        decode=partial(_decode, form),
        scales=partial(_scales, form),
        check=partial(_check, form),
        table=_table(form),
        pack=partial(_pack, form),
        bound=form.bound,
        rounded=lambda native: native,
        rowwise=True,
        multiple=32,
    )


# Half the widest gap, 1 of numbers up to 6 and 16 of those up to 448, in groups whose largest is just above half of it.
MXFP4, MXFP8, NVFP4 = (
    _scaled(form)
    for form in (
        _FloatForm("MXFP4", 4, 32, power=True, bound=Bound(1 / 3, "group's largest")),
        _FloatForm("MXFP8", 8, 32, power=True, bound=Bound(16 / 224, "group's largest")),
        _FloatForm("NVFP4", 4, 16, power=False, bound=Bound(1 / 3, "group's largest", "all of groups below 0.006")),
    )
)

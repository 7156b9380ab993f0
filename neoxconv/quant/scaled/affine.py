"""MLX's affine types: 2 to 8 bits a weight, with a scale and a bias for every group of 32, 64 or 128 of a row.

    w ~ code * scale + bias      code: 0 to 2^bits - 1

    weight  U32 [rows, columns * bits / 32]     codes, dense: code k begins at bit k * bits of the row, lowest first
    scales  [rows, columns / group]             in the model's type
    biases  [rows, columns / group]             in the model's type

The bias is the group's least weight, or the largest if that is larger in magnitude; the scale is such that 0 has a code
of its own, and is negative where the bias is the largest weight. Codes are chosen for scale and bias in float32, before
they are rounded to the model's type. The bytes are those of MLX 0.32 on a CPU (mlx/backend/cpu/quantized.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from neoxconv.core.encoding import Bound, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import U32, Array, Bools, Bytes, DType, Floats, narrow
from neoxconv.quant.scaled.check import checked
from neoxconv.quant.scaled.groups import BlockGroups, ends
from neoxconv.quant.scaled.rounding import as_native

SCALES, BIASES = "scales", "biases"
_LEAST_SCALE = np.float32(1e-7)


@dataclass(frozen=True)
class _AffineForm:
    """Codes of so many bits, and how many weights share scale and bias."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        return f"MLX_{self.bits}BIT_{self.group}"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


def _lines(form: _AffineForm, sizes: Floats) -> Floats:
    """Scale and negative bias [n, 2] of groups whose least and largest weights are `sizes` [n, 2], in float32."""
    least, largest = sizes[:, 0], sizes[:, 1]
    below = np.abs(least) > np.abs(largest)
    step = np.maximum((largest - least) / np.float32(form.top), _LEAST_SCALE)
    step, edge = np.where(below, step, -step), np.where(below, least, largest)
    count = np.rint(edge / step)  # steps from the edge to 0
    known = count != 0
    scale = np.divide(edge, count, out=step, where=known)
    return np.stack([scale, -np.where(known, edge, np.float32(0))], axis=1)


def encode(form: _AffineForm, rows: Floats, sizes: Floats, native: DType) -> Array:
    """Rows [n, columns] as dense codes, uint32."""
    from neoxconv.quant.scaled.affine_kernels import nearest_steps

    groups = np.ascontiguousarray(rows, np.float32).reshape(-1, form.group)
    codes = np.empty(groups.shape, np.uint8)
    nearest_steps(groups, _lines(form, sizes), np.float32(form.top), codes)
    return pack(form.bits, codes)


def pack(bits: int, codes: Bytes) -> Array:
    """Codes as dense bits, uint32; 32 divides their number."""
    from neoxconv.quant.scaled import dense_kernels

    words = np.empty(codes.size // 32 * bits, np.uint32)
    dense_kernels.pack(np.ascontiguousarray(codes).reshape(-1), bits, words.view(np.uint8))
    return words


def unpack(bits: int, words: Array) -> Bytes:
    """Codes [n] of dense bits."""
    from neoxconv.quant.scaled import dense_kernels

    codes = np.empty(words.size // bits * 32, np.uint8)
    dense_kernels.unpack(np.ascontiguousarray(words).reshape(-1).view(np.uint8), bits, codes)
    return codes


def _parts(form: _AffineForm, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    of_groups = (tensor.rows, tensor.columns // form.group)
    return (
        Part("weight", U32, (tensor.rows, tensor.columns * form.bits // 32)),
        Part(SCALES, tensor.native, of_groups),
        Part(BIASES, tensor.native, of_groups),
    )


def _finish(form: _AffineForm, tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of scales and biases."""
    scale, least = _lines(form, sizes).T
    return narrow(scale, tensor.native).tobytes(), narrow(-least, tensor.native).tobytes()


def _decode(form: _AffineForm, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows: product and sum in float32, which MLX rounds to the model's type."""

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.affine_kernels import read_steps

        codes = unpack(form.bits, stored["weight"].read(start, stop)).reshape(-1, form.group)
        scale, bias = (np.ascontiguousarray(stored[name].floats(start, stop)).reshape(-1) for name in (SCALES, BIASES))
        values = np.empty(codes.shape, np.float32)
        read_steps(codes, scale, bias, values)
        return values.reshape(stop - start, *shape[1:])

    return read


def _scales(form: _AffineForm, sizes: Floats, native: DType) -> Scales:
    """Scale and negative bias before and after they are rounded to the model's type."""
    lines = _lines(form, sizes)
    return Scales(lines, as_native(native, lines), np.zeros(len(lines), np.float32))


def _check(form: _AffineForm, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.check_kernels import Steps

    return checked(Steps(np.float32(form.top)), weights, values, scales, width)


def affine(bits: int, group: int) -> Scaled:
    """The row of the table of encodings for so many bits, and so many weights in a group."""
    form = _AffineForm(bits, group)
    return Scaled(
        name=form.name,
        dtype=DType(form.name, form.group, form.group * form.bits // 8 + 4, np.dtype("<f4")),
        groups=BlockGroups(form.group),
        measure=ends,
        parts=partial(_parts, form),
        encode=partial(encode, form),
        finish=partial(_finish, form),
        decode=partial(_decode, form),
        scales=partial(_scales, form),
        check=partial(_check, form),
        table=np.arange(form.top + 1, dtype=np.float32),
        pack=partial(pack, form.bits),
        bound=Bound(1.0, "group's step"),  # half of one, and at the far end what 0 having a code costs
        rounded=lambda native: native,
        rowwise=True,
        numbers=2,
        multiple=form.group,
    )

"""GPTQ's tensors (AutoGPTQ, GPTQModel), which are those of packed.py turned around: read, not written.

qweight   I32 [columns * bits / 32, rows]   codes, packed down each column from the lowest bits on
qzeros    I32 [groups, rows * bits / 32]    zeros, less 1 where checkpoint_format is not gptq_v2
scales    F16 [groups, rows]                w ~ (code - zero) * scale
g_idx     I32 [columns]                     the group of each column; may be absent
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from neoxconv.core.encoding import Part, Scaled
from neoxconv.core.tensor import LazyTensor, Read, transposed
from neoxconv.dtypes import I32, Array
from neoxconv.quant.scaled.packed import ORDER as PACKED_ORDER
from neoxconv.quant.scaled.packed import PACKED, PackedForm, decode, pack, packed

CODES, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Reading:
    """How a weight is read: `less_one`, its zeros are stored so; `indexed`, it has an index of groups."""

    form: PackedForm
    less_one: bool
    indexed: bool


def parts(reading: Reading, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    form, rows, columns = reading.form, tensor.rows, tensor.columns
    groups = form.groups(columns)
    return (
        Part(CODES, I32, (form.words(columns), rows)),
        Part(ZEROS, I32, (groups, form.words(rows))),
        Part(SCALES, tensor.native, (groups, rows)),
        *((Part(ORDER, I32, (columns,)),) if reading.indexed else ()),
    )


def as_packed(reading: Reading, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under packed.py's names, as it has them."""
    zeros = tensors[ZEROS]
    if reading.less_one:
        zeros = replace(zeros, read=_one_more(reading.form, zeros))
    turned = {PACKED: tensors[CODES], "weight_scale": tensors[SCALES], "weight_zero_point": zeros}
    order = {PACKED_ORDER: tensors[ORDER]} if reading.indexed else {}
    return {name: transposed(tensor) for name, tensor in turned.items()} | order


def _one_more(form: PackedForm, tensor: LazyTensor) -> Read:
    """A reader of packed numbers, each one more; after the largest comes 0, as in GPTQModel's kernels."""

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.packed_kernels import unpack_rows

        words = np.ascontiguousarray(tensor.read(start, stop))
        codes = np.empty((stop - start, tensor.columns * 32 // form.bits), np.uint8)
        unpack_rows(words.view(np.uint8), form.bits, codes)
        return pack(form, (codes + np.uint8(1)) & np.uint8(2 * form.top - 1)).view("<i4")

    return read


def encoding(reading: Reading) -> Scaled:
    """What such a weight is read by; its codes are judged as those of packed.py."""

    def read_by(stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
        return decode(reading.form, as_packed(reading, stored), shape)

    return replace(packed(reading.form), parts=partial(parts, reading), decode=read_by)

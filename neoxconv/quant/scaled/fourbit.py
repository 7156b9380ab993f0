"""bitsandbytes' NF4 and FP4: 64 numbers of a tensor, whatever its rows, share a scale; each keeps a code of 4 bits.

    w ~ absmax * table[code]      absmax: the largest |w| of the block, float32

    weight        U8 [n / 2, 1]      two codes in a byte, the first in the upper half
    weight.absmax F32 [n / 64]       with double quantization U8, absmax ~ nested_absmax * nested_quant_map[code] + mean
    weight.nested_absmax             F32 [n / 64 / 256]: the largest |absmax - mean| of 256 blocks
    weight.quant_map, weight.nested_quant_map      the tables, F32 [16] and [256]
    weight.quant_state.bitsandbytes__nf4           JSON as bytes: type, block sizes, shape, dtype, the mean

The bytes are those of bitsandbytes 0.50 on one thread of an x86 CPU (backends/default/ops.py, csrc/cpu_ops.cpp).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neoxconv.core.encoding import Bound, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import F32, TORCH_NAMES, U8, Array, Bools, Bytes, DType, Floats
from neoxconv.quant.scaled.check import checked
from neoxconv.quant.scaled.groups import BlockGroups, largest, whole_blocks
from neoxconv.quant.scaled.nested import NESTED, WIDEST, nest, nested_table, unnest

BLOCK = 64
_GROUPS = BlockGroups(BLOCK)
STATE = "weight.quant_state.bitsandbytes__"  # and the kind
_LONGEST = 24  # characters of a float32 in JSON
_TRIED = np.linspace(0.7, 1.1, 17, dtype=np.float32)  # of a block's largest weight, as its scale


@dataclass(frozen=True)
class _FourBitForm:
    """A table of 16 numbers from -1 to 1, with or without double quantization of the blocks' scales."""

    kind: str
    table: tuple[float, ...]
    double: bool

    @property
    def name(self) -> str:
        return f"{self.kind.upper()}_DQ" if self.double else self.kind.upper()

    @property
    def values(self) -> Floats:
        return np.array(self.table, np.float32)

    @property
    def order(self) -> Bytes:
        """The codes in the order of what they stand for."""
        return np.argsort(self.values, kind="stable").astype(np.uint8)

    @property
    def middles(self) -> Floats:
        """The numbers halfway between neighbours."""
        rising = self.values[self.order]
        return (rising[:-1] + rising[1:]) / np.float32(2)

    @property
    def distinct(self) -> tuple[Floats, Bytes]:
        """The numbers of the table, ascending, each once, and the code of each."""
        numbers, codes = np.unique(self.values, return_index=True)
        return numbers, codes.astype(np.uint8)

    @property
    def bound(self) -> Bound:
        """Half the widest gap in the table; double quantization rounds the block's largest, too."""
        widest = float(np.diff(self.values[self.order]).max())
        return Bound(widest / 2, "block's largest", "more where that is rounded" if self.double else "")

    @property
    def state(self) -> str:
        """The name of the part that holds the quantization's state."""
        return STATE + self.kind


def encode(form: _FourBitForm, rows: Floats, sizes: Floats, native: DType) -> Bytes:
    """Rows [n, columns] as bytes of two codes, flat; sizes [blocks] are the largest |w| of each block."""
    from neoxconv.quant.scaled.kernels import nearest_codes

    blocks = whole_blocks(rows, BLOCK)
    packed = np.empty((len(blocks), BLOCK // 2), np.uint8)
    nearest_codes(blocks, sizes, form.middles, form.order, packed)
    if left := rows.size % BLOCK:  # bitsandbytes divides a last, shorter block, and multiplies the others
        last = blocks[-1:] / np.maximum(sizes[-1], np.float32(1e-38))
        nearest_codes(last, np.ones(1, np.float32), form.middles, form.order, packed[-1:])
        return packed.reshape(-1)[: packed.size - (BLOCK - left) // 2]
    return packed.reshape(-1)


def parts(form: _FourBitForm, tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    count = math.prod(tensor.shape)
    blocks = -(-count // BLOCK)
    text = len(state(form, tensor, 0.0)) + (_LONGEST if form.double else 0)
    nested = (
        Part("weight.nested_absmax", F32, (-(-blocks // NESTED),)),
        Part("weight.nested_quant_map", F32, (len(nested_table()),)),
    )
    return (
        Part("weight", U8, (-(-count // 2), 1)),
        Part("weight.absmax", U8 if form.double else F32, (blocks,)),
        Part("weight.quant_map", F32, (len(form.table),)),
        *(nested if form.double else ()),
        Part(form.state, U8, (text,), late=form.double),
    )


def state(form: _FourBitForm, tensor: LazyTensor, mean: float) -> bytes:
    """What bitsandbytes keeps besides the tensors, as it spells it."""
    facts: dict[str, Any] = {
        "quant_type": form.kind,
        "blocksize": BLOCK,
        "dtype": TORCH_NAMES[tensor.native.name],
        "shape": list(tensor.shape),
    }
    if form.double:
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": mean}
    return json.dumps(facts).encode()


def finish(form: _FourBitForm, tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of all parts but the codes."""
    if math.prod(tensor.shape) % BLOCK:
        sizes = np.concatenate([sizes[:-1], np.maximum(sizes[-1:], np.float32(1e-38))])
    table = form.values.tobytes()
    if not form.double:
        return sizes.tobytes(), table, state(form, tensor, 0.0)
    found = nest(sizes)
    last = state(form, tensor, float(found.mean))
    return found.codes.tobytes(), table, found.sizes.tobytes(), nested_table().tobytes(), last


def decode(form: _FourBitForm, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows; bitsandbytes rounds them to the state's dtype when it is done."""
    columns, count = math.prod(shape[1:]), math.prod(shape)
    absmax = _absmax_of(form, stored)

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.read_kernels import read_pairs

        touched = _GROUPS.groups_of(start, stop, columns)
        first, last = touched.start * BLOCK, min(touched.stop * BLOCK, count)
        codes = np.ascontiguousarray(stored["weight"].read(first // 2, -(-last // 2))).reshape(-1)
        values = np.empty(2 * codes.size, np.float32)
        table = stored["weight.quant_map"].floats(0, 16)
        pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1).view(np.uint64)  # of each byte
        read_pairs(codes, pairs.reshape(-1), np.ascontiguousarray(absmax(touched.start, touched.stop)), values)
        return values[start * columns - first : stop * columns - first].reshape(stop - start, *shape[1:])

    return read


def _absmax_of(form: _FourBitForm, stored: Mapping[str, LazyTensor]) -> Read:
    """A reader of the blocks' scales, float32."""
    absmax = stored["weight.absmax"]
    if not form.double:
        return absmax.floats
    mean = np.float32(read_state(stored[form.state])["nested_offset"])

    def read(start: int, stop: int) -> Array:
        nested = stored["weight.nested_absmax"].floats(start // NESTED, -(-stop // NESTED))
        skipped = start % NESTED
        sizes = np.repeat(nested, NESTED)[skipped : skipped + stop - start]
        return unnest(absmax.read(start, stop), stored["weight.nested_quant_map"].floats(0, 256), sizes, mean)

    return read


def read_state(part: LazyTensor) -> Any:
    """The JSON in a quantization's state. Raises ValueError where it is none."""
    return json.loads(part.read(0, part.rows).tobytes().decode())


def scales(form: _FourBitForm, sizes: Floats, native: DType) -> Scales:
    """The sizes before and after double quantization, which may be off by a step of the nested table: a mean that is
    summed in another order decides."""
    if not form.double:
        return Scales(sizes, sizes, np.zeros_like(sizes))
    found = nest(sizes)
    return Scales(sizes, found.scales, np.repeat(found.sizes, NESTED)[: len(sizes)] * np.float32(WIDEST))


def check(form: _FourBitForm, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.check_kernels import Sixteen

    return checked(Sixteen(form.values[form.order], form.middles), weights, values, scales, width)


def suited(form: _FourBitForm, rows: Floats, matters: Floats) -> Floats:
    """The scale [blocks] with which the blocks' nearest codes err least, of a few for each; errors are squared and
    weighted by how much their columns matter [columns]."""
    from neoxconv.quant.scaled.kernels import fit_sizes

    blocks = whole_blocks(rows, BLOCK)
    sizes = largest(blocks)
    fit_sizes(blocks, whole_blocks(np.broadcast_to(matters, rows.shape), BLOCK), form.distinct[0], _TRIED, sizes)
    return sizes


def pack(form: _FourBitForm, places: Bytes) -> Bytes:
    """Bytes of two codes, flat, of places [n, columns] in the ascending table."""
    numbers, order = form.distinct
    codes = order[places].reshape(-1)
    codes = np.append(codes, order[numbers == 0][: codes.size % 2])  # as bitsandbytes fills a last byte up
    return np.asarray(codes[::2] << 4 | codes[1::2], np.uint8)


def scaled(form: _FourBitForm) -> Scaled:
    """The row of the table of encodings for `form`."""
    return Scaled(
        name=form.name,
        dtype=DType(form.name, BLOCK, 33 if form.double else 36, np.dtype("<f4")),
        groups=_GROUPS,
        measure=largest,
        parts=partial(parts, form),
        encode=partial(encode, form),
        finish=partial(finish, form),
        decode=partial(decode, form),
        scales=partial(scales, form),
        check=partial(check, form),
        table=form.distinct[0],
        suited=partial(suited, form),
        pack=partial(pack, form),
        bound=form.bound,
        rounded=lambda native: native,
        nested=form.double,
    )


NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TABLE = tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))

NF4, NF4_DQ, FP4, FP4_DQ = (
    scaled(_FourBitForm(kind, table, double))
    for kind, table in (("nf4", NF4_TABLE), ("fp4", FP4_TABLE))
    for double in (False, True)
)

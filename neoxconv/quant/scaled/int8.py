"""bitsandbytes' LLM.int8: a row of a matrix has a scale, each weight a code of 8 bits.

    w ~ code * SCB / 127

    weight         I8 [rows, columns]
    SCB            F32 [rows]      the largest |w| of each row
    weight_format  U8 []           0: codes lie row by row

The bytes are those of bitsandbytes 0.50 (backends/default/ops.py), which rounds weights to float16 first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from neoxconv.core.encoding import Bound, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import F16, F32, I8, U8, Array, Bools, Bytes, DType, Floats
from neoxconv.quant.scaled.check import checked
from neoxconv.quant.scaled.groups import RowGroups, largest

_LEVELS = 127
FORMAT = "weight_format"


def parts(tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    return Part("weight", I8, tensor.shape), Part("SCB", F32, (tensor.rows,)), Part(FORMAT, U8, ())


def encode(rows: Floats, sizes: Floats, native: DType) -> Array:
    """Rows [n, columns] as codes, with the largest |w| of each."""
    from neoxconv.quant.scaled.kernels import whole_steps

    codes, factors = np.empty(rows.shape, np.int8), np.zeros_like(sizes)  # rows of zeros are zeros
    with np.errstate(over="ignore"):
        np.divide(np.float32(1), sizes, out=factors, where=sizes > 0)  # torch: 127 / x is (1 / x) * 127
        factors *= np.float32(_LEVELS)
    whole_steps(np.ascontiguousarray(rows, np.float32), factors, codes)
    return codes


def finish(tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of SCB and of weight_format."""
    return sizes.tobytes(), b"\0"


def decode(stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows. The product is rounded once, so that a code of 127 gives the row's largest weight."""

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.read_kernels import read_steps

        steps = stored["SCB"].floats(start, stop).astype(np.float64) / _LEVELS
        codes = np.ascontiguousarray(stored["weight"].read(start, stop))
        values = np.empty(codes.shape, np.float32)
        read_steps(codes, steps, values)
        return values

    return read


def scales(sizes: Floats, native: DType) -> Scales:
    """A code of 127 stands for the largest weight."""
    return Scales(sizes, sizes, np.zeros_like(sizes))


def check(weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights cannot have become the values that are read of them."""
    from neoxconv.quant.scaled.check_kernels import whole_numbers

    return checked(whole_numbers(np.float32(_LEVELS)), weights, values, scales, width)


def _pack(places: Bytes) -> Array:
    """Codes of their places among all of them."""
    return (places.astype(np.int16) - _LEVELS).astype(np.int8)


INT8 = Scaled(
    name="INT8",
    dtype=DType("INT8", 1, 1, np.dtype("<f4")),
    groups=RowGroups(),
    measure=largest,
    parts=parts,
    encode=encode,
    finish=finish,
    decode=decode,
    scales=scales,
    check=check,
    table=np.arange(-_LEVELS, _LEVELS + 1, dtype=np.float32) / np.float32(_LEVELS),
    pack=_pack,
    bound=Bound(0.5 / _LEVELS, "row's largest"),
    rounded=lambda native: F16,
)

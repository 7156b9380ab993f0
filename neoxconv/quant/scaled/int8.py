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
from neoxconv.dtypes import F16, F32, I8, U8, Array, Bytes, DType, Floats
from neoxconv.quant.scaled.groups import RowGroups

_LEVELS = 127
FORMAT = "weight_format"


def parts(tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    return Part("weight", I8, tensor.shape), Part("SCB", F32, (tensor.rows,)), Part(FORMAT, U8, ())


def encode(rows: Floats, sizes: Floats) -> Array:
    """Rows [n, columns] as codes, with the largest |w| of each."""
    from neoxconv.quant.scaled.kernels import whole_steps

    codes = np.empty(rows.shape, np.int8)
    whole_steps(np.ascontiguousarray(rows, np.float32), sizes, codes)
    return codes


def finish(tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of SCB and of weight_format."""
    return sizes.tobytes(), b"\0"


def decode(stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows. The product is rounded once, so that a code of 127 gives the row's largest weight."""

    def read(start: int, stop: int) -> Array:
        steps = stored["SCB"].floats(start, stop).astype(np.float64) / _LEVELS
        return (stored["weight"].read(start, stop) * steps[:, None]).astype(np.float32)

    return read


def _nearest(shares: Floats) -> Floats:
    """The nearest multiples of a 127th."""
    return np.asarray(np.rint(shares * np.float32(_LEVELS)) / np.float32(_LEVELS), np.float32)


def scales(sizes: Floats) -> Scales:
    """A code of 127 stands for the largest weight."""
    return Scales(sizes, sizes, np.zeros_like(sizes))


def _pack(places: Bytes) -> Array:
    """Codes of their places among all of them."""
    return (places.astype(np.int16) - _LEVELS).astype(np.int8)


INT8 = Scaled(
    name="INT8",
    dtype=DType("INT8", 1, 1, np.dtype("<f4")),
    groups=RowGroups(),
    parts=parts,
    encode=encode,
    finish=finish,
    decode=decode,
    nearest=_nearest,
    scales=scales,
    table=np.arange(-_LEVELS, _LEVELS + 1, dtype=np.float32) / np.float32(_LEVELS),
    pack=_pack,
    bound=Bound(0.5 / _LEVELS, "row's largest"),
    rounded=lambda native: F16,
)

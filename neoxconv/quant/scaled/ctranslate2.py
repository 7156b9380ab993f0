"""CTranslate2's int8: a row of a matrix has a scale, each weight a code of 8 bits.

    w ~ code / weight_scale

    weight         I8 [rows, columns]
    weight_scale   F32 [rows]      127 over the largest |w| of the row, 1 for a row of zeros

The bytes are those of ctranslate2 4.8.5 (specs/model_spec.py, `_quantize`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from neoxconv.core.encoding import Bound, Part, Scaled, Scales
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import F32, I8, Array, DType, Floats
from neoxconv.quant.scaled import int8
from neoxconv.quant.scaled.groups import RowGroups, largest

_LEVELS = np.float32(127)
_LEAST = _LEVELS / np.finfo(np.float32).max  # of a row's largest weight, whose scale is finite
CODES, SCALE = "weight", "weight_scale"


def parts(tensor: LazyTensor) -> tuple[Part, ...]:
    """The stored tensors of a weight."""
    return Part(CODES, I8, tensor.shape), Part(SCALE, F32, (tensor.rows,))


def factors(sizes: Floats) -> Floats:
    """What rows are multiplied with, by the largest |w| of each."""
    return np.asarray(_LEVELS / np.maximum(np.where(sizes == 0, _LEVELS, sizes), _LEAST), np.float32)


def encode(rows: Floats, sizes: Floats, native: DType) -> Array:
    """Rows [n, columns] as codes, with the largest |w| of each."""
    from neoxconv.quant.scaled.kernels import whole_steps

    codes = np.empty(rows.shape, np.int8)
    whole_steps(np.ascontiguousarray(rows, np.float32), factors(sizes), codes)
    return codes


def finish(tensor: LazyTensor, sizes: Floats) -> tuple[bytes, ...]:
    """The bytes of weight_scale."""
    return (factors(sizes).tobytes(),)


def decode(stored: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> Read:
    """A reader of float32 rows; the quotient is rounded once."""

    def read(start: int, stop: int) -> Array:
        from neoxconv.quant.scaled.read_kernels import read_steps

        with np.errstate(divide="ignore"):  # a damaged scale gives no number, and is found as such
            steps = 1 / stored[SCALE].floats(start, stop).astype(np.float64)
        codes = np.ascontiguousarray(stored[CODES].read(start, stop))
        values = np.empty(codes.shape, np.float32)
        read_steps(codes, steps, values)
        return values

    return read


def scales(sizes: Floats, native: DType) -> Scales:
    """A code of 127 stands for the largest weight, as far as its scale is rounded."""
    read = _LEVELS / factors(sizes)
    return Scales(read, np.asarray(np.where(sizes == 0, 0, read), np.float32), np.zeros_like(sizes))


CT2_INT8 = Scaled(
    name="CT2_INT8",
    dtype=DType("CT2_INT8", 1, 1, np.dtype("<f4")),
    groups=RowGroups(),
    measure=largest,
    parts=parts,
    encode=encode,
    finish=finish,
    decode=decode,
    scales=scales,
    check=int8.check,
    table=int8.INT8.table,
    pack=int8.INT8.pack,
    bound=Bound(0.5 / float(_LEVELS), "row's largest"),
    rowwise=True,
)

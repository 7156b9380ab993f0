"""How rows of weights become stored bytes: one row of `ENCODINGS` or `SCALED` for each type that neoxconv writes."""

from __future__ import annotations

from functools import partial

import numpy as np

from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.tensor import LazyTensor, computed
from neoxconv.dtypes import PLAIN, Array, Bytes, DType, Floats, widen
from neoxconv.errors import CheckpointError
from neoxconv.quant.ggml.codebooks import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from neoxconv.quant.ggml.read_only import READERS
from neoxconv.quant.ggml.simple import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from neoxconv.quant.ggml.small_floats import MXFP4, NVFP4
from neoxconv.quant.ggml.superblocks import IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from neoxconv.quant.plain import BF16, F16, F32
from neoxconv.quant.scaled.ctranslate2 import CT2_INT8
from neoxconv.quant.scaled.float8 import E4M3, E4M3_CHANNEL, E4M3_TENSOR, E5M2, E5M2_CHANNEL, E5M2_TENSOR
from neoxconv.quant.scaled.fourbit import FP4, FP4_DQ, NF4, NF4_DQ
from neoxconv.quant.scaled.int8 import INT8
from neoxconv.quant.scaled.mlx import MLX
from neoxconv.quant.scaled.packed import WRITTEN

ENCODINGS: dict[str, Encoding] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "Q8_0": Q8_0,
    "Q4_0": Q4_0,
    "Q4_1": Q4_1,
    "Q5_0": Q5_0,
    "Q5_1": Q5_1,
    **{row.name: row for row in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS, IQ4_NL)},
    **{row.name: row for row in (IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S, MXFP4, NVFP4)},
    **{row.name: row for row in (E4M3, E5M2)},
}
SCALED: dict[str, Scaled] = {
    row.name: row
    for row in (
        *(INT8, NF4, NF4_DQ, FP4, FP4_DQ, CT2_INT8),
        *(E4M3_CHANNEL, E4M3_TENSOR, E5M2_CHANNEL, E5M2_TENSOR),
        *WRITTEN,
        *MLX.values(),
    )
}


def floats(rows: Array, dtype: DType) -> Floats:
    """The float32 values [n, columns] of rows as a tensor of this type reads them, be it plain or quantized."""
    if dtype.scaled:  # whoever reads them has their scales at hand, and decodes them
        return rows
    if dtype.name in ENCODINGS:
        return ENCODINGS[dtype.name].decode(rows)
    if dtype.name in PLAIN:
        return widen(rows, dtype)
    return decode_any(dtype.name, rows)


def decoded(tensor: LazyTensor) -> LazyTensor:
    """A quantized tensor as numbers, whose columns can be taken apart; another one as it is."""
    if not tensor.dtype.quantized:
        return tensor
    return computed(tensor, lambda start, stop: floats(tensor.read(start, stop), tensor.dtype))


def decode_any(name: str, rows: Bytes) -> Floats:
    """The float32 values [n, columns] of rows [n, row bytes] of the ggml type `name`, written here or only read.

    Raises CheckpointError for a type that gguf cannot read, and for rows that are no whole number of its blocks.
    """
    if name in ENCODINGS:
        return ENCODINGS[name].decode(rows.view(ENCODINGS[name].dtype.numpy))
    from gguf import GGMLQuantizationType, quants

    try:
        with np.errstate(over="ignore", invalid="ignore"):
            known = READERS.get(name) or partial(quants.dequantize, qtype=GGMLQuantizationType[name])
            values: Floats = known(rows)
    except (KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{name}: neoxconv cannot read weights of this type. Convert another file.") from error
    except ValueError as error:
        raise CheckpointError(f"{name}: rows of {rows.shape[1]} bytes are damaged or not {name} ({error}).") from error
    return values

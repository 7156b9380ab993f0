"""F32, F16 and BF16: each number on its own, rounded to nearest, ties to even."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from neoxconv import dtypes
from neoxconv.core.encoding import Bound, Encoding
from neoxconv.dtypes import Array, DType, Floats, narrow, widen

_WORTH_A_KERNEL = 1 << 16  # numbers: below that numpy is done before numba is loaded


def _unchanged(rows: Floats) -> Floats:
    """The rows themselves: float32 is stored as it is."""
    return np.asarray(rows, np.float32)


def _encode_f16(rows: Floats) -> Array:
    """float16 as numpy rounds it, too large becomes infinite; ten times faster than astype where it is much."""
    if rows.size < _WORTH_A_KERNEL:
        return narrow(rows, dtypes.F16)
    from neoxconv.quant import kernels

    halves = np.empty(rows.size, np.uint16)
    kernels.narrow_f16(np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint32), halves)
    return halves.view(np.float16).reshape(rows.shape)


def _decode_f16(stored: Array) -> Floats:
    """The same values in float32; seven times faster than astype."""
    from neoxconv.quant import kernels

    bits = np.empty(stored.size, np.uint32)
    kernels.widen_f16(np.ascontiguousarray(stored, np.float16).reshape(-1).view(np.uint16), bits)
    return bits.view(np.float32).reshape(stored.shape)


def _encode_bf16(rows: Floats) -> Array:
    """bfloat16 bits as uint16; a NaN becomes quiet."""
    from neoxconv.quant import kernels

    halves = np.empty(rows.size, np.uint16)
    kernels.narrow_bf16(np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint32), halves)
    return halves.reshape(rows.shape)


def _decode_bf16(stored: Array) -> Floats:
    """The values of bfloat16 bits in float32."""
    return widen(stored, dtypes.BF16)


def wrong(dtype: DType, rows: Floats, stored: Array, weighted: bool = False) -> npt.NDArray[np.bool_]:
    """True where the stored bits are not those of the correctly rounded number; any NaN stands for any other."""
    unsigned = f"<u{dtype.nbytes}"
    differs = np.asarray(narrow(rows, dtype).view(unsigned) != stored.view(unsigned))
    if differs.any():
        differs &= ~(np.isnan(rows) & np.isnan(widen(stored, dtype)))
    return differs


F32 = Encoding(
    name="F32",
    dtype=dtypes.F32,
    encode=_unchanged,
    decode=_unchanged,
    wrong=partial(wrong, dtypes.F32),
    bound=Bound(0, "weight"),
)
F16 = Encoding(
    name="F16",
    dtype=dtypes.F16,
    encode=_encode_f16,
    decode=_decode_f16,
    wrong=partial(wrong, dtypes.F16),
    bound=Bound(2.0**-11, "weight", "3e-08"),
)
BF16 = Encoding(
    name="BF16",
    dtype=dtypes.BF16,
    encode=_encode_bf16,
    decode=_decode_bf16,
    wrong=partial(wrong, dtypes.BF16),
    bound=Bound(2.0**-8, "weight"),
)

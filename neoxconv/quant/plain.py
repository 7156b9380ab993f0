"""F32, F16 and BF16: each number on its own, rounded to nearest, ties to even."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from neoxconv import dtypes
from neoxconv.core.encoding import Bound, Comparison, Encoding
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


_Encode = Callable[[Floats], Array]
_Decode = Callable[[Array], Floats]


def compare(
    encode: Callable[[Floats], Array],
    decode: Callable[[Array], Floats],
    rows: Floats,
    stored: Array,
    weighted: bool = False,
) -> Comparison:
    """Weights beside numbers of their own: wrong are bits of another than the correctly rounded one; NaNs are alike."""
    unsigned = f"<u{stored.itemsize}"
    wrong = np.asarray(encode(rows).view(unsigned) != stored.view(unsigned))
    if wrong.any():
        wrong &= ~(np.isnan(rows) & np.isnan(decode(stored)))
    return Comparison(wrong, partial(decode, stored))


def _row(dtype: DType, encode: _Encode, decode: _Decode, bound: Bound) -> Encoding:
    """The row of the table of encodings for a plain type."""
    how = partial(compare, encode, decode)
    return Encoding(name=dtype.name, dtype=dtype, encode=encode, decode=decode, compare=how, bound=bound)


F32 = _row(dtypes.F32, _unchanged, _unchanged, Bound(0, "weight"))
F16 = _row(dtypes.F16, _encode_f16, _decode_f16, Bound(2.0**-11, "weight", "3e-08"))
BF16 = _row(dtypes.BF16, _encode_bf16, _decode_bf16, Bound(2.0**-8, "weight"))

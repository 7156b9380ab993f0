"""Number types: how a row of weights lies in bytes, and the exact ways between the plain ones.

A plain type stores one number in 1 to 8 bytes. A block type (made in `quant/` and `formats/gguf/read.py`) stores
`block` weights in `nbytes` bytes; its rows are arrays of uint8. numpy has no bfloat16: its bits travel as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DType:
    """How numbers are stored: `block` of them take `nbytes` bytes, which are read as arrays of `numpy`.

    Of types whose scales lie beside them (`Scaled`), `numpy` is float32: whoever reads them decodes them.
    """

    name: str
    block: int
    nbytes: int
    numpy: np.dtype[Any]

    @property
    def quantized(self) -> bool:
        """Whether it holds less than a number was trained with: block types, and those of 8 bits."""
        return self.name not in PLAIN

    @property
    def scaled(self) -> bool:
        """Whether scales lie beside its codes."""
        return self.quantized and self.numpy == np.float32

    def size(self, columns: int) -> int:
        """Bytes of a row of `columns` numbers; `columns` must be a multiple of `block`."""
        return columns // self.block * self.nbytes


def plain(name: str, numpy: str) -> DType:
    """A type that stores each number on its own, in the type that numpy calls `numpy`."""
    return DType(name, 1, np.dtype(numpy).itemsize, np.dtype(numpy))


F64, F32, F16, BF16 = plain("F64", "<f8"), plain("F32", "<f4"), plain("F16", "<f2"), plain("BF16", "<u2")
I64, I32, I16, I8 = plain("I64", "<i8"), plain("I32", "<i4"), plain("I16", "<i2"), plain("I8", "i1")
U32, U8, BOOL = plain("U32", "<u4"), plain("U8", "u1"), plain("BOOL", "?")

PLAIN = {dtype.name: dtype for dtype in (F64, F32, F16, BF16, I64, I32, I16, I8, U32, U8, BOOL)}
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
F8_E4M3, F8_E5M2 = plain("F8_E4M3", "u1"), plain("F8_E5M2", "u1")  # their bits travel as bytes


def widen(rows: Array, dtype: DType) -> Floats:
    """The values of `rows`, stored as the plain type `dtype`, in float32 (exact but for F64, which is rounded)."""
    if dtype is BF16:
        return np.left_shift(rows, 16, dtype=np.uint32).view(np.float32)
    return rows.astype(np.float32, copy=False)


def narrow(rows: Floats, dtype: DType) -> Array:
    """float32 values rounded to nearest, ties to even, in the stored form of `dtype`; too large becomes infinite."""
    if dtype is BF16:
        bits = np.ascontiguousarray(rows).view(np.uint32)
        odd = (bits >> 16) & 1  # the last bit that is kept
        rounded = (bits + (odd + np.uint32(0x7FFF))) >> 16
        rounded = np.where(np.isnan(rows), (bits >> 16) | 0x40, rounded)  # a NaN stays one, and quiet
        return rounded.astype(np.uint16)
    with np.errstate(over="ignore"):
        return rows.astype(dtype.numpy, copy=False)


# The bits of a number as unsigned, and which of them are the exponent: all set in infinities and NaN, nowhere else.
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0 << 48)}


def nonfinite(rows: Array, dtype: DType) -> int:
    """How many numbers, stored as a plain type, are infinite or NaN; 0 for types that have none."""
    if dtype.name not in _EXPONENT:
        return 0
    bits, mask = _EXPONENT[dtype.name]
    exponents = np.ascontiguousarray(rows).view(bits) & np.array(mask, bits)
    return int((exponents == mask).sum()) if exponents.size and exponents.max() == mask else 0

"""The type that a model is in: numbers rounded to it, and what kernels must know to do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neoxconv.dtypes import BF16, F16, F32, DType, Floats, narrow, widen

if TYPE_CHECKING:
    from neoxconv.quant.scaled.rounding_kernels import Rounding

_DIGITS = {BF16.name: 7, F16.name: 10, F32.name: 23}  # bits after the point


def digits(native: DType) -> int:
    """The bits that a type has after the point; float64 is rounded to float32 before."""
    return _DIGITS.get(native.name, _DIGITS[F32.name])


def as_native(native: DType, values: Floats) -> Floats:
    """Values rounded to a type."""
    return widen(narrow(np.asarray(values, np.float32), native), native) if native.name in _DIGITS else values


def rounding_to(native: DType) -> Rounding:
    """How kernels round to a type."""
    from neoxconv.quant.scaled.rounding_kernels import Rounding

    lost = _DIGITS[F32.name] - digits(native)
    return Rounding(*map(np.uint32, ((1 << lost) - 1, (1 << lost >> 1) - (lost > 0), lost > 0, lost)))

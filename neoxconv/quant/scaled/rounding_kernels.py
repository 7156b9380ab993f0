"""float32 rounded to the type that a model is in, within kernels (rounding.py)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neoxconv.quant.kernels import as_bits, as_float, kernel, u32


class Rounding(NamedTuple):
    """To a type whose exponents are float32's, or enough of them: the last bits that it lacks, and half of them.

    float16: 13 bits, bfloat16: 16, float32: none. What float16 rounds further, below 2**-14, is no code but 0; what is
    infinite in it is beyond every code.
    """

    lost: np.uint32  # the bits that it lacks, set
    half: np.uint32  # less than half of them
    odd: np.uint32  # the last bit that it has; 0 for float32
    shift: np.uint32  # how far that is from the end


@kernel
def rounded(value: np.float32, to: Rounding) -> np.float32:
    """The number of a type nearest to a float32, ties to even."""
    bits = as_bits(value)
    return as_float(u32(u32(bits + to.half) + u32(u32(bits >> to.shift) & to.odd)) & u32(~to.lost))

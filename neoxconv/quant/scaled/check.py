"""Weights beside the values that are read of them where scales lie apart: which cannot be right (check_kernels.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neoxconv.core.encoding import Scales
from neoxconv.dtypes import Bools, Floats

if TYPE_CHECKING:
    from neoxconv.quant.scaled.check_kernels import Even, Sixteen, Steps


def checked(numbers: Even | Sixteen | Steps, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights [n, columns] cannot have become their values, in groups of `width` with these scales [groups]."""
    from neoxconv.quant.scaled.check_kernels import Even, Group, Steps, check, check_sixteen, check_steps

    wrong = np.zeros(weights.shape, np.bool_)
    flat, read = (np.ascontiguousarray(each, np.float32).reshape(-1) for each in (weights, values))
    encoded, decoded, slack = map(np.ascontiguousarray, (scales.encoded, scales.decoded, scales.slack))
    group = Group(encoded, decoded, slack, width, np.float32(scales.near))
    if isinstance(numbers, Even):
        check(flat, read, group, numbers, wrong.reshape(-1))
    elif isinstance(numbers, Steps):
        check_steps(flat, read, group, numbers, wrong.reshape(-1))
    else:
        check_sixteen(flat, read, group, numbers, wrong.reshape(-1))
    return wrong

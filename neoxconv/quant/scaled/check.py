"""Weights beside the values that are read of them where scales lie apart: which cannot be right (check_kernels.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neoxconv.core.encoding import Scales
from neoxconv.dtypes import Bools, Floats

if TYPE_CHECKING:
    from neoxconv.quant.scaled.check_kernels import Even, Sixteen


def checked(numbers: Even | Sixteen, weights: Floats, values: Floats, scales: Scales, width: int) -> Bools:
    """Which weights [n, columns] cannot have become their values, in groups of `width` with these scales [groups]."""
    from neoxconv.quant.scaled.check_kernels import Even, Group, check, check_sixteen

    wrong = np.zeros(weights.shape, np.bool_)
    flat, read = (np.ascontiguousarray(each, np.float32).reshape(-1) for each in (weights, values))
    encoded, decoded, slack = map(np.ascontiguousarray, (scales.encoded, scales.decoded, scales.slack))
    group = Group(encoded, decoded, slack, width)
    if isinstance(numbers, Even):
        check(flat, read, group, numbers, wrong.reshape(-1))
    else:
        check_sixteen(flat, read, group, numbers, wrong.reshape(-1))
    return wrong

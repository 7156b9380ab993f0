"""A head's bias moved into its weight and the norm before it, for families whose head has none.

With x the normalised stream, g and b the final norm's gain and bias, the head computes E (g x + b) + c. As x sums to
zero, adding u 1^T diag(1 / g) to E changes nothing of its product with g x and adds u sum(b / g) to its product with b.
So for any b' (and a g' that is g but where that is too small to divide by)

    E' = E diag(g / g') + u 1^T diag(1 / g'),    u = (E (b - (g / g') b') + c) / sum(b' / g')

computes E' (g' x + b') = E (g x + b) + c. b' = b + s g' with a mean of b' / g' that is well away from zero.
"""

from __future__ import annotations

import numpy as np

from neoxconv.arch.fold import as_stored, away_from_zero, known, row_sums
from neoxconv.core.tensor import LazyTensor, computed
from neoxconv.dtypes import Doubles, Floats

_LEVER = 0.25  # the mean of b' / g': of 0.05 to 2 the one with the least error in F16, Q6_K and Q4_0, by measurement


def without_head_bias(
    head: LazyTensor, head_bias: LazyTensor, gain: LazyTensor, bias: LazyTensor
) -> tuple[LazyTensor, LazyTensor, LazyTensor]:
    """The head's weight [rows, hidden] and the final norm's gain and bias with which no bias of the head is needed.

    A bias of zeros changes nothing. Gain and bias are rounded to the type that the source has them in.
    """
    c = _doubles(head_bias)
    if not c.any():
        return head, gain, bias
    g, b = _doubles(gain), _doubles(bias)
    new_gain = as_stored(away_from_zero(g), gain)
    shift = _LEVER - row_sums((b / new_gain)[None])[0] / len(b)
    new_bias = as_stored(b + shift * new_gain, bias)
    ratio, lever = g / new_gain, row_sums((new_bias / new_gain)[None])[0]

    def read(start: int, stop: int) -> Floats:
        rows = head.floats(start, stop)
        u = (row_sums(rows * (b - ratio * new_bias)) + c[start:stop]) / lever
        moved: Doubles = rows * ratio + u[:, None] / new_gain
        return moved.astype(np.float32)

    return computed(head, read), known(gain, new_gain), known(bias, new_bias)


def _doubles(vector: LazyTensor) -> Doubles:
    return vector.floats(0, vector.rows).astype(np.float64)

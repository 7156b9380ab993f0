"""The inner loops of feedback. Every number is a sum in a written order, so the same on every processor.

Rows of weights are independent of each other, so nothing depends on how a tensor is cut into bands of rows. Products of
matrices add up one term after the other; what runs in vector registers are neighbouring results, not terms of a sum.
"""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bools, Bytes, Doubles, Floats
from neoxconv.quant.kernels import HALF, ZERO, f32, kernel, u8

_AT_ONCE = 8  # terms added in a pass over the results; their operands stay in the registers and the first cache
_PANEL = 64  # rows of the factor that are made before the rest is brought up to date


@kernel
def add_product(result: Floats, left: Floats, right: Floats) -> None:
    """result [m, g] += left [m, k] times right [k, g]; the terms of each sum in the order of k."""
    whole = left.shape[1] // _AT_ONCE * _AT_ONCE
    for i in range(0, whole, _AT_ONCE):
        for r in range(left.shape[0]):
            a0, a1, a2, a3 = left[r, i], left[r, i + 1], left[r, i + 2], left[r, i + 3]
            a4, a5, a6, a7 = left[r, i + 4], left[r, i + 5], left[r, i + 6], left[r, i + 7]
            for c in range(result.shape[1]):
                s = result[r, c] + a0 * right[i, c]
                s = s + a1 * right[i + 1, c]
                s = s + a2 * right[i + 2, c]
                s = s + a3 * right[i + 3, c]
                s = s + a4 * right[i + 4, c]
                s = s + a5 * right[i + 5, c]
                s = s + a6 * right[i + 6, c]
                result[r, c] = s + a7 * right[i + 7, c]
    for i in range(whole, left.shape[1]):
        for r in range(left.shape[0]):
            for c in range(result.shape[1]):
                result[r, c] += left[r, i] * right[i, c]


@kernel
def _nearest(value: np.float32, table: Floats) -> int:
    """The index of the number of an ascending table that is nearest to a value; of two the lower."""
    low, high = 0, table.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if table[middle] <= value:
            low = middle
        else:
            high = middle
    return high if value > (table[low] + table[high]) * HALF else low


@kernel
def feed(
    asked: Floats,
    weights: Floats,
    scales: Floats,
    least: Floats,
    table: Floats,
    ahead: Floats,
    codes: Bytes,
    errors: Floats,
) -> None:
    """Codes [m, g] for columns that belong together, one after the other, each asked to make up for those before it.

    `asked` [m, g] are the weights with what earlier columns got wrong added, and is brought up to date; `weights` the
    true ones; a code stands for table[code] * scale - least, both [m, g / block]; `ahead` [g, g] says how much of
    column j's error column k makes up for. `errors` [m, g] become what the codes get wrong of the weights.
    """
    columns = asked.shape[1]
    block = columns // scales.shape[1]
    for r in range(asked.shape[0]):
        for j in range(columns):
            scale, lowest = scales[r, j // block], least[r, j // block]
            wanted = (asked[r, j] + lowest) / scale if scale != ZERO else ZERO
            code = _nearest(f32(wanted), table)
            codes[r, j] = u8(code)
            error = weights[r, j] - (table[code] * scale - lowest)
            errors[r, j] = error
            for k in range(j + 1, columns):
                asked[r, k] += error * ahead[j, k]


@kernel
def descend(
    moments: Floats,
    scales: Floats,
    table: Floats,
    codes: Bytes,
    slopes: Floats,
    moving: Bools,
    start: int,
    stop: int,
) -> None:
    """One pass over columns `start` to `stop` of rows [m, n]: every code becomes the best one given all the others.

    `slopes` [m, n] are the rows' errors times `moments` [n, n], and are brought up to date. Only rows that are `moving`
    [m, 2] in its first column are looked at; those in which a code changed are noted in its second.
    """
    columns = slopes.shape[1]
    block = columns // scales.shape[1]
    for r in range(slopes.shape[0]):
        if not moving[r, 0]:
            continue
        for j in range(start, stop):
            scale = scales[r, j // block]
            if scale == ZERO:
                continue
            old = codes[r, j]
            code = _nearest(f32(table[old] + slopes[r, j] / (moments[j, j] * scale)), table)
            if code != old:
                change = (table[code] - table[old]) * scale
                codes[r, j] = u8(code)
                moving[r, 1] = True
                for k in range(columns):
                    slopes[r, k] -= change * moments[j, k]


@kernel
def descend_rows(
    pulls: Floats, moments: Floats, scales: Floats, table: Floats, codes: Bytes, slopes: Floats, changes: Floats
) -> None:
    """One pass over rows [b, n] that belong together, one after the other.

    `slopes` [b, n] are those of `descend` with what all other rows get wrong in them: `pulls` [b, b], of diagonal 1,
    says how much of a change of row k's own slopes comes to row i's. `changes` [b, n] become those own changes, zero
    for a row none of whose codes changed.
    """
    moving = np.ones((1, 2), np.bool_)
    for r in range(slopes.shape[0]):
        before = slopes[r].copy()
        moving[0, 1] = False
        descend(moments, scales[r : r + 1], table, codes[r : r + 1], slopes[r : r + 1], moving, 0, slopes.shape[1])
        for c in range(slopes.shape[1]):
            changes[r, c] = slopes[r, c] - before[c]
        if moving[0, 1]:
            for i in range(slopes.shape[0]):
                if i != r:
                    for c in range(slopes.shape[1]):
                        slopes[i, c] += pulls[i, r] * changes[r, c]


@kernel
def factor(matrix: Doubles) -> int:
    """The upper triangle of a symmetric matrix [n, n] becomes V with V^T V = matrix; returns n, or where it fails.

    Row after row in panels: a panel is finished, then taken from the rows below it, the terms in the order of its rows.
    """
    n = matrix.shape[0]
    for first in range(0, n, _PANEL):
        last = min(first + _PANEL, n)
        for i in range(first, last):
            if not matrix[i, i] > 0.0:
                return int(i)
            root = np.sqrt(matrix[i, i])
            for c in range(i, n):
                matrix[i, c] = matrix[i, c] / root
            for r in range(i + 1, last):
                a = matrix[i, r]
                for c in range(r, n):
                    matrix[r, c] -= a * matrix[i, c]
        if last == n:
            break
        for i in range(first, last, _AT_ONCE):
            for r in range(last, n):
                a0, a1, a2, a3 = matrix[i, r], matrix[i + 1, r], matrix[i + 2, r], matrix[i + 3, r]
                a4, a5, a6, a7 = matrix[i + 4, r], matrix[i + 5, r], matrix[i + 6, r], matrix[i + 7, r]
                for c in range(r, n):
                    s = matrix[r, c] - a0 * matrix[i, c]
                    s = s - a1 * matrix[i + 1, c]
                    s = s - a2 * matrix[i + 2, c]
                    s = s - a3 * matrix[i + 3, c]
                    s = s - a4 * matrix[i + 4, c]
                    s = s - a5 * matrix[i + 5, c]
                    s = s - a6 * matrix[i + 6, c]
                    matrix[r, c] = s - a7 * matrix[i + 7, c]
    return int(n)


@kernel
def ahead_of(triangle: Doubles, ahead: Floats) -> None:
    """Fill ahead[j, k], j < k, with R[j, k] / R[k, k] of R R^T = H, where `triangle` is V of the reversed H.

    R is V^T with rows and columns reversed: R[j, k] = V[n - 1 - k, n - 1 - j].
    """
    n = triangle.shape[0]
    for j in range(n):
        for k in range(n):
            if k > j:
                ahead[j, k] = f32(triangle[n - 1 - k, n - 1 - j] / triangle[n - 1 - k, n - 1 - k])
            else:
                ahead[j, k] = ZERO

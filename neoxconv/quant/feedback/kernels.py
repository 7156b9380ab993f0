"""The inner loops of feedback. Every number is a sum in a written order, so the same on every processor.

Rows of weights are independent of each other, so nothing depends on how a tensor is cut into bands of rows. Products of
matrices add up one term after the other; what runs in vector registers are neighbouring results, not terms of a sum.
"""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bools, Bytes, Floats
from neoxconv.quant.kernels import HALF, INFINITY, ZERO, f32, kernel, part, u8

_AT_ONCE = 8  # terms added in a pass over the results; their operands stay in the registers and the first cache
_PANEL = 256  # rows of the factor that are made before the rest is brought up to date
_TILE = 256  # rows and columns of a part of a matrix that stays in the second cache, with what is taken from it
_RUN = 64  # columns that are passed over at once where no code changes
_TURNED = 32  # the same of a matrix that is turned over

Span = tuple[int, int]  # of rows or columns: the first, and the one after the last


@part
def _plus_eight(
    s: np.float32,
    a0: np.float32,
    a1: np.float32,
    a2: np.float32,
    a3: np.float32,
    a4: np.float32,
    a5: np.float32,
    a6: np.float32,
    a7: np.float32,
    right: Floats,
    i: int,
    c: int,
) -> np.float32:
    """s with eight terms added in turn: each a times a number of column c, from row i on."""
    s = s + a0 * right[i, c]
    s = s + a1 * right[i + 1, c]
    s = s + a2 * right[i + 2, c]
    s = s + a3 * right[i + 3, c]
    s = s + a4 * right[i + 4, c]
    s = s + a5 * right[i + 5, c]
    s = s + a6 * right[i + 6, c]
    return f32(s + a7 * right[i + 7, c])


@kernel
def add_product(result: Floats, left: Floats, right: Floats) -> None:
    """result [m, g] += left [m, k] times right [k, g]; the terms of each sum in the order of k.

    Two rows at a time, so that what is fetched of `right` serves both.
    """
    rows, pairs = left.shape[0], left.shape[0] // 2 * 2
    whole = left.shape[1] // _AT_ONCE * _AT_ONCE
    for i in range(0, whole, _AT_ONCE):
        for r in range(0, pairs, 2):
            a0, a1, a2, a3 = left[r, i], left[r, i + 1], left[r, i + 2], left[r, i + 3]
            a4, a5, a6, a7 = left[r, i + 4], left[r, i + 5], left[r, i + 6], left[r, i + 7]
            q = r + 1
            b0, b1, b2, b3 = left[q, i], left[q, i + 1], left[q, i + 2], left[q, i + 3]
            b4, b5, b6, b7 = left[q, i + 4], left[q, i + 5], left[q, i + 6], left[q, i + 7]
            for c in range(result.shape[1]):
                s = _plus_eight(result[r, c], a0, a1, a2, a3, a4, a5, a6, a7, right, i, c)
                t = _plus_eight(result[q, c], b0, b1, b2, b3, b4, b5, b6, b7, right, i, c)
                result[r, c], result[q, c] = s, t
        for r in range(pairs, rows):
            a0, a1, a2, a3 = left[r, i], left[r, i + 1], left[r, i + 2], left[r, i + 3]
            a4, a5, a6, a7 = left[r, i + 4], left[r, i + 5], left[r, i + 6], left[r, i + 7]
            for c in range(result.shape[1]):
                result[r, c] = _plus_eight(result[r, c], a0, a1, a2, a3, a4, a5, a6, a7, right, i, c)
    for i in range(whole, left.shape[1]):
        for r in range(rows):
            for c in range(result.shape[1]):
                result[r, c] += left[r, i] * right[i, c]


@part
def _nearest(value: np.float32, table: Floats) -> int:
    """The index of the number of an ascending table that is nearest to a value; of two the lower."""
    code = 0
    for i in range(1, table.size):
        code += value > (table[i - 1] + table[i]) * HALF
    return code


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
        for first in range(0, columns, _AT_ONCE):
            last = min(first + _AT_ONCE, columns)
            for j in range(first, last):
                scale, lowest = scales[r, j // block], least[r, j // block]
                wanted = (asked[r, j] + lowest) / scale if scale != ZERO else ZERO
                code = _nearest(f32(wanted), table)
                codes[r, j] = u8(code)
                error = weights[r, j] - (table[code] * scale - lowest)
                errors[r, j] = error
                for k in range(j + 1, last):
                    asked[r, k] += error * ahead[j, k]
            if last < columns:
                i = first
                a0, a1, a2, a3 = errors[r, i], errors[r, i + 1], errors[r, i + 2], errors[r, i + 3]
                a4, a5, a6, a7 = errors[r, i + 4], errors[r, i + 5], errors[r, i + 6], errors[r, i + 7]
                for c in range(last, columns):
                    asked[r, c] = _plus_eight(asked[r, c], a0, a1, a2, a3, a4, a5, a6, a7, ahead, i, c)


@part
def _room(code: int, table: Floats, unit: np.float32) -> tuple[np.float32, np.float32]:
    """Between which slopes a code stays; `unit` is its scale times the moment of its column."""
    if unit == ZERO:
        return -INFINITY, INFINITY
    more = (table[code + 1] - table[code]) * HALF * unit if code + 1 < table.size else unit * INFINITY
    less = (table[code - 1] - table[code]) * HALF * unit if code > 0 else -unit * INFINITY
    return min(more, less), max(more, less)


@kernel
def find_room(moments: Floats, scales: Floats, table: Floats, codes: Bytes, low: Floats, high: Floats) -> None:
    """Fill `low` and `high` [m, n]: between which slopes the codes of rows [m, n] stay as they are."""
    block = codes.shape[1] // scales.shape[1]
    for r in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            low[r, j], high[r, j] = _room(codes[r, j], table, moments[j, j] * scales[r, j // block])


@kernel
def descend(
    moments: Floats,
    scales: Floats,
    table: Floats,
    codes: Bytes,
    slopes: Floats,
    low: Floats,
    high: Floats,
    moving: Bools,
    start: int,
    stop: int,
) -> None:
    """One pass over columns `start` to `stop` of rows [m, n]: every code becomes the best one given all the others.

    `slopes` [m, n] are the rows' errors times `moments` [n, n], and are brought up to date, as are `low` and `high`.
    Only rows that are `moving` [m, 2] in its first column are looked at; those in which a code changed are noted in its
    second. Most codes stay: a run of columns in which all do is passed over at once.
    """
    columns = slopes.shape[1]
    block = columns // scales.shape[1]
    for r in range(slopes.shape[0]):
        if not moving[r, 0]:
            continue
        for first in range(start, stop, _RUN):
            last = min(first + _RUN, stop)
            leave = 0
            for j in range(first, last):
                leave += (slopes[r, j] > high[r, j]) | (slopes[r, j] < low[r, j])
            if leave == 0:
                continue
            for j in range(first, last):
                if low[r, j] <= slopes[r, j] <= high[r, j]:
                    continue
                scale, old = scales[r, j // block], codes[r, j]
                unit = moments[j, j] * scale
                code = _nearest(f32(table[old] + slopes[r, j] / unit), table)
                if code != old:
                    change = (table[code] - table[old]) * scale
                    codes[r, j] = u8(code)
                    low[r, j], high[r, j] = _room(code, table, unit)
                    moving[r, 1] = True
                    for k in range(columns):
                        slopes[r, k] -= change * moments[j, k]


@kernel
def descend_rows(
    pulls: Floats,
    moments: Floats,
    scales: Floats,
    table: Floats,
    codes: Bytes,
    slopes: Floats,
    low: Floats,
    high: Floats,
    changes: Floats,
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
        s, one = slopes.shape[1], slice(r, r + 1)
        descend(moments, scales[one], table, codes[one], slopes[one], low[one], high[one], moving, 0, s)
        for c in range(slopes.shape[1]):
            changes[r, c] = slopes[r, c] - before[c]
        if moving[0, 1]:
            for i in range(slopes.shape[0]):
                if i != r:
                    for c in range(slopes.shape[1]):
                        slopes[i, c] += pulls[i, r] * changes[r, c]


@part
def _finish_rows(rows: Floats, corner: Floats) -> None:
    """Columns [p, g] of a panel become those of the factor, from the last row up; `corner` [p, p] is made already."""
    for k in range(len(rows) - 1, -1, -1):
        for c in range(rows.shape[1]):
            rows[k, c] /= corner[k, k]
        for r in range(k):
            a = corner[k, r]
            for c in range(rows.shape[1]):
                rows[r, c] -= a * rows[k, c]


@part
def _finish_corner(corner: Floats) -> int:
    """The lower triangle of a panel's own columns [p, p] becomes the factor's; returns how many rows were made."""
    p = len(corner)
    for k in range(p - 1, -1, -1):
        if not corner[k, k] > ZERO:
            return int(p - 1 - k)
        root = f32(np.sqrt(corner[k, k]))
        corner[k, k] = root
        for c in range(k):
            corner[k, c] /= root
        for r in range(k):
            a = corner[k, r]
            for c in range(r + 1):
                corner[r, c] -= a * corner[k, c]
    return int(p)


@part
def _taken(matrix: Floats, rows: Span, columns: Span) -> Floats:
    """A copy of a tile. It is written as loops, here and below: numba compiles slices of slices for seconds."""
    tile = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
    for r in range(tile.shape[0]):
        for c in range(tile.shape[1]):
            tile[r, c] = matrix[rows[0] + r, columns[0] + c]
    return tile


@part
def _put(matrix: Floats, row: int, column: int, tile: Floats) -> None:
    """A tile back in its place."""
    for r in range(tile.shape[0]):
        for c in range(tile.shape[1]):
            matrix[row + r, column + c] = tile[r, c]


@part
def _upside_down(rows: Floats) -> Floats:
    """Rows in reverse order."""
    turned = np.empty(rows.shape, np.float32)
    for r in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            turned[r, c] = rows[rows.shape[0] - 1 - r, c]
    return turned


@kernel
def factor(matrix: Floats) -> int:
    """The lower triangle of a symmetric matrix [n, n] becomes L with L^T L = matrix; what is above it is lost.

    Returns how many rows were made, from the last row on: n, or fewer where the matrix is not positive. A panel of rows
    is finished, then taken from the rows above it, tile after tile; the terms of a sum are in the order of its rows.
    """
    n = matrix.shape[0]
    for last in range(n, 0, -_PANEL):
        first = max(0, last - _PANEL)
        panel = (first, last)
        corner = _taken(matrix, panel, panel)
        made = _finish_corner(corner)
        if made < last - first:
            return int(n - last + made)
        _put(matrix, first, first, corner)
        left = np.empty((first, last - first), np.float32)  # minus the panel's columns, its last row first
        for start in range(0, first, _TILE):
            stop = min(start + _TILE, first)
            rows = _taken(matrix, panel, (start, stop))
            _finish_rows(rows, corner)
            _put(matrix, first, start, rows)
            for c in range(start, stop):
                for r in range(last - first):
                    left[c, r] = -rows[last - first - 1 - r, c - start]
        for start in range(0, first, _TILE):
            stop = min(start + _TILE, first)
            right = _upside_down(_taken(matrix, panel, (start, stop)))
            for r in range(start, first, _TILE):
                s = min(r + _TILE, first)
                tile = _taken(matrix, (r, s), (start, stop))
                add_product(tile, left[r:s], right)
                _put(matrix, r, start, tile)
    return int(n)


@kernel
def ahead_of(triangle: Floats) -> None:
    """What is above the diagonal of a factor L [n, n] becomes A[j, k] = R[j, k] / R[k, k], where R = L^T, R R^T = H."""
    n = triangle.shape[0]
    for rows in range(0, n, _TURNED):
        for columns in range(rows, n, _TURNED):
            for j in range(rows, min(rows + _TURNED, n)):
                for k in range(max(columns, j + 1), min(columns + _TURNED, n)):
                    triangle[j, k] = triangle[k, j] / triangle[k, k]

"""Codes that were chosen together: they are not the nearest to their weights, so another proof is needed.

With the second moments H of the inputs, every code is the best one given all the others: no single change lowers
tr(E H E^T), E = W - Q, or with the moments O of gradients too tr(O E H E^T). That is exact where the encoder's descent
has come to its end. A code that was moved, a scale that was doubled, rows that were exchanged are then not the best.
Without them there are bounds only, wider than what was seen (docs/verification.md, "Thresholds").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neoxconv.core.encoding import Comparison, Grid
from neoxconv.dtypes import Array, Bools, Bytes, Floats
from neoxconv.quant.feedback.encode import slopes_of, values_of
from neoxconv.quant.feedback.rows import slopes_of_matrix

# Of the distance between two codes, the mean one where codes are closer: what the encoder's sums, brought up to date
# many times, are off.
_NEAR = 0.01
_FAR = 8.0  # distances of neighbouring codes: the root mean square error of a block
_OTHER_ROW = 1.2  # a row's error, as a part of the row: of two rows that have nothing in common it is 1.4


@dataclass(frozen=True)
class Stored:
    """Rows as they are stored: `codes` [n, columns], places in an ascending table, and what they stand for.

    `values`, `scale` and `least` [n, columns]: a weight's value is its table[code] times its scale, less its block's
    least weight, if not zero. Every `block` columns have a scale of their own; it may be off the one that was wanted by
    its `slack` [n, columns].
    """

    table: Floats
    codes: Bytes
    values: Floats
    scale: Floats
    least: Floats
    block: int
    slack: Floats


def compare(grid: Grid, rows: Floats, stored: Array, moments: Floats | None, outputs: Floats | None) -> Comparison:
    """Rows [n, columns] beside the stored rows of a type of blocks; with `outputs` they are all of a matrix.

    The moments are the damped ones by which codes were chosen; None: they are not at hand.
    """
    taken = taken_apart(grid, stored)
    return Comparison(not_chosen(taken, rows, moments, outputs), lambda: taken.values)


def not_chosen(stored: Stored, rows: Floats, moments: Floats | None, outputs: Floats | None = None) -> Bools:
    """True where codes are not the best by the moments that are known, or are too far away, as far as can be told."""
    wrong = too_far(stored, rows)
    return wrong if moments is None else wrong | not_the_best(stored, rows, moments, outputs)


def taken_apart(grid: Grid, stored: Array) -> Stored:
    """Stored rows of a type of blocks."""
    codes, scale, least = grid.unpack(stored)
    values = values_of(grid.table, codes, scale, least)
    wide, low = (np.repeat(each, grid.block, axis=1) for each in (scale, least))
    return Stored(grid.table, codes, values, wide, low, grid.block, np.zeros_like(wide))


def not_the_best(stored: Stored, weights: Floats, moments: Floats, outputs: Floats | None = None) -> Bools:
    """True where another code would make the error of rows [n, columns] smaller, given all other codes.

    `moments` [columns, columns] are the damped ones, as the encoder had them. With `outputs` [n, n], the damped moments
    of gradients, the rows are all of a matrix, and their error is that of both sides, tr(O E H E^T).
    """
    table, codes, scale = stored.table, stored.codes, stored.scale
    errors = weights - stored.values
    slopes = slopes_of(errors, moments) if outputs is None else slopes_of_matrix(errors, moments, outputs)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(scale != 0, slopes / (np.diag(moments) * scale), np.float32(0))
    gaps = np.diff(table)
    middle = gaps / np.float32(2) + np.float32(_NEAR) * np.maximum(gaps, gaps.mean(dtype=np.float32))
    above, below = np.append(middle, np.float32(np.inf))[codes], np.insert(middle, 0, np.float32(np.inf))[codes]
    return np.asarray(~((distance <= above) & (distance >= -below)) & (scale != 0))


def too_far(stored: Stored, weights: Floats) -> Bools:
    """True where a block of rows [n, columns], or a whole row, is further from its weights than choosing explains."""
    errors = weights - stored.values
    gaps = np.diff(stored.table)
    widest = np.maximum(np.append(gaps, np.float32(0)), np.insert(gaps, 0, np.float32(0)))
    steps = (np.abs(stored.scale) + _FAR * stored.slack) * np.maximum(widest, gaps.mean(dtype=np.float32))[stored.codes]
    parts = np.divide(errors, steps, out=np.zeros_like(errors), where=steps > 0)
    blocks = np.square(parts).reshape(len(errors), -1, stored.block).mean(axis=2) > _FAR**2
    allowed = _OTHER_ROW**2 * np.square(weights) + np.square(stored.slack)
    rows = np.square(errors).sum(axis=1) > allowed.sum(axis=1)
    return np.asarray(np.repeat(blocks, stored.block, axis=1) | rows[:, None] | ~np.isfinite(errors))

"""Codes that were chosen together: they are not the nearest to their weights, so another proof is needed.

With the second moments H of the inputs, every code is the best one given all the others: no single change lowers
tr(E H E^T), E = W - Q (with moments O of gradients too, none lowers tr(O E H E^T)). That is exact where the encoder's
descent has come to its end. A code that was moved, a scale
that was doubled, rows that were exchanged are then not the best. Without them there are bounds only, chosen by hand
three times as wide as what was seen (docs/verification.md, "Codes chosen together").
"""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import Grid
from neoxconv.dtypes import Array, Bools, Floats
from neoxconv.quant.feedback.encode import slopes_of, values_of
from neoxconv.quant.feedback.rows import slopes_of_matrix

_NEAR = 0.01  # of the distance between two codes: what the encoder's sums, brought up to date many times, are off
_FAR = 4.0  # steps: the root mean square error of a block
_OTHER_ROW = 1.0  # a row's error, as a part of the row: of two rows that have nothing in common it is 1.4


def not_the_best(grid: Grid, weights: Floats, stored: Array, moments: Floats, outputs: Floats | None = None) -> Bools:
    """True where another code would make the error of rows [n, columns] smaller, given all other codes.

    `moments` [columns, columns] are the damped ones, as the encoder had them. With `outputs` [n, n], the damped moments
    of gradients, the rows are all of a matrix, and their error is that of both sides, tr(O E H E^T).
    """
    codes, scale, least = grid.unpack(stored)
    errors = weights - values_of(grid, codes, scale, least)
    slopes = slopes_of(errors, moments) if outputs is None else slopes_of_matrix(errors, moments, outputs)
    scales = np.repeat(scale, grid.block, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = grid.table[codes] + np.where(scales != 0, slopes / (np.diag(moments) * scales), np.float32(0))
    gaps = np.diff(grid.table)
    above = np.append(gaps * np.float32(0.5 + _NEAR), np.float32(np.inf))[codes]
    below = np.insert(gaps * np.float32(0.5 + _NEAR), 0, np.float32(np.inf))[codes]
    distance = wanted - grid.table[codes]
    return np.asarray(~((distance <= above) & (distance >= -below)) & (scales != 0))


def too_far(grid: Grid, weights: Floats, stored: Array) -> Bools:
    """True where a block of rows [n, columns], or a whole row, is further from its weights than choosing explains."""
    codes, scale, least = grid.unpack(stored)
    errors = weights - values_of(grid, codes, scale, least)
    steps = np.abs(scale) * np.diff(grid.table).mean(dtype=np.float32)
    squares = np.square(errors).reshape(*scale.shape, grid.block).mean(axis=2)
    blocks = (squares > np.square(_FAR * steps)) & (steps > 0)
    rows = np.square(errors).sum(axis=1) > _OTHER_ROW**2 * np.square(weights).sum(axis=1)
    return np.asarray(np.repeat(blocks, grid.block, axis=1) | rows[:, None] | ~np.isfinite(errors))

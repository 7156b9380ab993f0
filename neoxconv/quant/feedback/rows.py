"""A matrix in the grid of a type, all its codes chosen together: those of a row, and rows among each other.

g is the gradient of -log p at what the matrix puts out, and O = E[g g^T]. Rounding W to Q costs about
1/2 tr(O E H E^T) nats, E = W - Q. With O = R R^T and A[i, r] = R[i, r] / R[r, r], as for columns, row r is asked for

    W_r + sum over i < r of A[i, r] E_i

and encoded as any row is (LDLQ of both sides: YAQA, arXiv 2505.22988). Rows come in batches; within one, each takes
those before it for perfect. Afterwards every code in turn becomes the best one given all the others of the matrix.
"""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import Grid
from neoxconv.dtypes import Array, Bytes, Floats
from neoxconv.quant.feedback.encode import Factors, descended, fed, finite, scales, slopes_of, values_of

_FED = 4  # rows that are asked at a time: 1 is no better, 16 is worse for q and k (docs/calibration.md)
_BATCH = 16  # rows of the descent: fewer would fetch the matrix from memory too often
_PASSES = 2000  # of the descent at most; 154 were seen on a real model, and `verify` asks that it came to its end


def encode_matrix(grid: Grid, rows: Floats, inputs: Factors, outputs: Factors) -> Array:
    """All rows [rows, columns] of a matrix as stored rows of the grid's type."""
    weights = finite(rows)
    codes, numbers = _fed_by_rows(grid, weights, inputs, outputs.ahead)
    _descended_by_rows(grid, weights, codes, numbers, inputs.moments, outputs.moments)
    return grid.pack(codes, numbers)


def _fed_by_rows(grid: Grid, weights: Floats, inputs: Factors, ahead: Floats) -> tuple[Bytes, Floats]:
    """Codes [rows, columns] and numbers [rows, blocks, 4]; each batch makes up for those before it."""
    codes = np.empty(weights.shape, np.uint8)
    numbers = np.empty((len(weights), weights.shape[1] // grid.block, 4), np.float32)
    errors = np.empty(weights.shape, np.float32)
    for start in range(0, len(weights), _FED):
        batch = slice(start, start + _FED)
        asked = weights[batch] + _owed(ahead, errors, start)
        codes[batch], numbers[batch] = fed(grid, asked, inputs)
        known = scales(numbers[batch])
        descended(grid.table, asked, codes[batch], known, inputs.moments)
        errors[batch] = weights[batch] - values_of(grid.table, codes[batch], *known)
    return codes, numbers


def _owed(ahead: Floats, errors: Floats, start: int) -> Floats:
    """What the rows of the batch that begins at `start` are to make up for, of the rows before the batch.

    A row takes those before it in the batch for perfect: they make up for what they owe.
    """
    from neoxconv.quant.feedback.kernels import add_product

    stop = min(start + _FED, len(errors))
    owed = np.zeros((stop - start, errors.shape[1]), np.float32)
    add_product(owed, np.ascontiguousarray(ahead[:start, start:stop].T), errors[:start])
    inside = np.ascontiguousarray(-ahead[start:stop, start:stop].T)
    for row in range(1, len(owed)):
        add_product(owed[row : row + 1], inside[row : row + 1, :row], owed[:row])
    return owed


def _descended_by_rows(
    grid: Grid, weights: Floats, codes: Bytes, numbers: Floats, moments: Floats, outputs: Floats
) -> None:
    """Bring the codes to where no single change lowers the error, or near it."""
    from neoxconv.quant.feedback.kernels import add_product, descend_rows, find_room

    scale, least = scales(numbers)
    slopes = slopes_of_matrix(weights - values_of(grid.table, codes, scale, least), moments, outputs)
    low, high = np.empty_like(slopes), np.empty_like(slopes)
    find_room(moments, scale, grid.table, codes, low, high)
    for _ in range(_PASSES):
        moving = False
        for start in range(0, len(weights), _BATCH):
            stop = min(start + _BATCH, len(weights))
            batch, changes = slice(start, stop), np.empty((stop - start, weights.shape[1]), np.float32)
            pulls = np.ascontiguousarray(outputs[:, batch] / np.diag(outputs)[:, None])
            room = low[batch], high[batch]
            descend_rows(pulls[batch], moments, scale[batch], grid.table, codes[batch], slopes[batch], *room, changes)
            moved = changes.any(axis=1)  # in later passes few are
            if moved.any():
                moving = True
                pulls, changes = np.ascontiguousarray(pulls[:, moved]), changes[moved]
                add_product(slopes[:start], pulls[:start], changes)
                add_product(slopes[stop:], pulls[stop:], changes)
        if not moving:
            break


def slopes_of_matrix(errors: Floats, moments: Floats, outputs: Floats) -> Floats:
    """O E H [rows, columns] of errors E, each row over its own number of O's diagonal: as if O were 1 for that row."""
    from neoxconv.quant.feedback.kernels import add_product

    own = slopes_of(errors, moments)
    slopes = np.zeros_like(own)
    for start in range(0, len(own), _BATCH):
        batch = slice(start, start + _BATCH)
        add_product(slopes[batch], outputs[batch] / np.diag(outputs)[batch, None], own)
    return slopes

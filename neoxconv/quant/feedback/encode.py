"""Rows in the grid of a type, their codes chosen together.

With H = R R^T, R upper, and A[j, k] = R[j, k] / R[k, k] for j < k, rounding column after column to

    Q_k = the nearest to W_k + sum over j < k of (W_j - Q_j) A[j, k]

is GPTQ (arXiv 2210.17323) without its inverse; it is LDLQ of QuIP (arXiv 2307.13304), there proved equal. The scales
of block types are found on the weights as they are asked for by then, group of columns after group; those that lie
beside the codes are known before. Afterwards every code in turn becomes the best one given all the others, which lowers
tr(E H E^T) until no change does, or for `_PASSES` passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from neoxconv.core.encoding import Grid, Moments
from neoxconv.dtypes import Array, Bytes, Floats
from neoxconv.errors import CheckpointError

# Added to the diagonal of H, as a part of its mean: 0.05 was better than 0.01 in 15 of 16 matrices of a real model by
# held-out loss (docs/calibration.md).
DAMPING = 0.05
_PASSES = 2000  # of the descent at most; 20 to 40 end it (benchmarks/feedback.py)
_GROUP = 64  # columns at a time where scales are known before
_BAND = 256  # columns of a product at a time, so that the operands stay in a cache
# Scales and least weights of columns from one number to another, given what is asked for of these; each [n, blocks].
_Find = Callable[[Floats, int, int], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Factors:
    """What feedback needs of the inputs of a matrix with n columns.

    `moments` [n, n] float32: H, damped, its mean diagonal 1; `ahead` [n, n] float32: A above its diagonal, elsewhere
    what it was made of; `importance` [n] float32: H's diagonal before damping, of mean 1.
    """

    moments: Floats
    ahead: Floats
    importance: Floats


def damped_moments(moments: Moments, name: str, damping: float = DAMPING) -> Floats:
    """H [columns, columns], its mean diagonal 1 before it was damped.

    Raises CheckpointError where the moments are none.
    """
    found = moments.read()
    mean = np.diag(found).mean(dtype=np.float64)
    if not np.isfinite(found).all() or not mean > 0:
        raise CheckpointError(f"{name}: its calibration holds no finite second moments; calibrate again.")
    found /= np.float32(mean)
    found[np.diag_indices(len(found))] += np.float32(damping)
    return found


def factors_of(moments: Moments, name: str, damping: float = DAMPING) -> Factors:
    """The factors of second moments. Raises CheckpointError where there can be none; `name` is the tensor's."""
    from neoxconv.quant.feedback.kernels import ahead_of, factor

    damped = damped_moments(moments, name, damping)
    triangle = damped.copy()
    if factor(triangle) < len(triangle):
        raise CheckpointError(f"{name}: its second moments are not positive; calibrate again, with more tokens.")
    ahead_of(triangle)
    return Factors(damped, triangle, np.diag(damped) - np.float32(damping))


def encode(grid: Grid, rows: Floats, factors: Factors) -> Array:
    """Rows [n, columns] as stored rows of the grid's type."""
    weights = finite(rows)
    codes, numbers = fed(grid, weights, factors)
    scale, least = scales(numbers)
    descended(grid.table, weights, codes, (scale, least), factors.moments)
    return grid.pack(codes, numbers)


def matters(moments: Floats) -> Floats:
    """How much errors in each column [columns] matter to scales that are found before codes, from damped moments.

    It is the root of H's diagonal. The diagonal itself, and all alike, are worse (docs/calibration.md).
    """
    return np.asarray(np.sqrt(np.diag(moments)), np.float32)


def choose(table: Floats, rows: Floats, scales: tuple[Floats, Floats], factors: Factors) -> Bytes:
    """Codes [n, columns], places in an ascending table, of rows whose scale and least are known for every weight, each
    [n, columns]."""
    weights = finite(rows)
    known = np.ascontiguousarray(scales[0]), np.ascontiguousarray(scales[1])

    def find(asked: Floats, start: int, stop: int) -> tuple[Floats, Floats]:
        own, least = (np.ascontiguousarray(each[:, start:stop]) for each in known)
        return own, least

    codes = _chosen(table, weights, factors, _GROUP, find)
    descended(table, weights, codes, known, factors.moments)
    return codes


def finite(rows: Floats) -> Floats:
    """Rows with zeros for what is no number."""
    return np.where(np.isfinite(rows), rows, np.float32(0)).astype(np.float32)


def scales(numbers: Floats) -> tuple[Floats, Floats]:
    """Scale and least weight of blocks, each in the shape of `numbers` but for its last axis."""
    return numbers[..., 0] * numbers[..., 2], numbers[..., 1] * numbers[..., 3]


def fed(grid: Grid, weights: Floats, factors: Factors) -> tuple[Bytes, Floats]:
    """Codes [n, columns] by feedback, and numbers [n, blocks, 4], found as the columns' turn comes."""
    numbers = np.empty((len(weights), weights.shape[1] // grid.block, 4), np.float32)

    def find(asked: Floats, start: int, stop: int) -> tuple[Floats, Floats]:
        blocks = slice(start // grid.block, stop // grid.block)
        numbers[:, blocks] = grid.find(asked, factors.importance[start:stop])
        return scales(numbers[:, blocks])

    return _chosen(grid.table, weights, factors, grid.group, find), numbers


def _chosen(table: Floats, weights: Floats, factors: Factors, group: int, find: _Find) -> Bytes:
    """Codes [n, columns] by feedback, `group` columns at a time."""
    from neoxconv.quant.feedback.kernels import add_product, feed

    columns = weights.shape[1]
    codes, errors = np.empty(weights.shape, np.uint8), np.empty(weights.shape, np.float32)
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        own = np.ascontiguousarray(weights[:, start:stop])
        asked, chosen, wrong = own.copy(), np.empty(own.shape, np.uint8), np.empty_like(own)
        add_product(asked, errors[:, :start], np.ascontiguousarray(factors.ahead[:start, start:stop]))
        scale, least = find(asked, start, stop)
        feed(asked, own, scale, least, table, factors.ahead[start:stop, start:stop].copy(), chosen, wrong)
        codes[:, start:stop], errors[:, start:stop] = chosen, wrong
    return codes


def descended(table: Floats, weights: Floats, codes: Bytes, scales: tuple[Floats, Floats], moments: Floats) -> None:
    """Bring the codes to where no single change lowers the error, or near it; `scales` are scales and least weights."""
    from neoxconv.quant.feedback.kernels import descend, find_room

    scale, least = scales
    slopes = slopes_of(weights - values_of(table, codes, scale, least), moments)
    low, high = np.empty_like(slopes), np.empty_like(slopes)
    find_room(moments, scale, table, codes, low, high)
    moving = np.ones((len(weights), 2), np.bool_)
    for _ in range(_PASSES):
        moving[:, 1] = False
        for start in range(0, weights.shape[1], _BAND):
            stop = min(start + _BAND, weights.shape[1])
            descend(moments, scale, table, codes, slopes, low, high, moving, start, stop)
        moving[:, 0] = moving[:, 1]
        if not moving.any():
            break


def values_of(table: Floats, codes: Bytes, scale: Floats, least: Floats) -> Floats:
    """What codes [n, columns] stand for, with the scales and least weights [n, blocks]."""
    values = table[codes].reshape(*scale.shape, -1) * scale[..., None] - least[..., None]
    return np.asarray(values, np.float32).reshape(codes.shape)


def slopes_of(errors: Floats, moments: Floats) -> Floats:
    """Errors [n, columns] times the moments [columns, columns]: half the slope of tr(E H E^T) by each weight."""
    from neoxconv.quant.feedback.kernels import add_product

    slopes = np.empty(errors.shape, np.float32)
    for start in range(0, errors.shape[1], _BAND):
        band = np.ascontiguousarray(moments[:, start : start + _BAND])
        found = np.zeros((len(errors), band.shape[1]), np.float32)
        add_product(found, errors, band)
        slopes[:, start : start + _BAND] = found
    return slopes

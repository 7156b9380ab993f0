"""Kernels that read codes whose scales lie beside them, and tell which weights cannot have been stored as they are.

All run over weights in their order: each `width` of them, the last maybe fewer, are a group, with scales e when it is
encoded, d when it is read back, and the slack s of d, all in the weight's unit. With nearest(x) the number of the
type's table nearest to x, a share of the scale, a weight w may be stored as v where

    v stands for a code     |v - found * d| <= EXACT * |v| + s, v finite    found = nearest(v / d)
    none is nearer          |asked - found| <= |asked - nearest(asked)| + near * |asked|        asked = w / e

The second is not asked where |d| <= s: the scale is lost in its own rounding, and no code can be told. Where groups
have a least weight l besides, a code stands for found * d - l, and asked is (w + l) / e.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.core.encoding import EXACT
from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.kernels import INFINITY, ZERO, f32, i32, kernel, part, u32
from neoxconv.quant.scaled.float8_kernels import Limits, rounded
from neoxconv.quant.scaled.kernels import ROUNDER

_EXACT = f32(EXACT)


class Group(NamedTuple):
    """The scales of weights, each [groups] or for `Steps` [groups, 2], how many weights share them, and the `near`
    above."""

    encoded: Floats
    decoded: Floats
    slack: Floats
    width: int
    near: np.float32


_Few = tuple[np.float32, ...]


@part
def _is_wrong(weight: np.float32, value: np.float32, shares: _Few, scales: _Few) -> bool:
    """The rule above; shares are asked, nearest(asked) and found, scales are d, s and near."""
    (asked, best, found), (decoded, slack, near) = shares, scales
    no_code = not (abs(value - found * decoded) <= abs(value) * _EXACT + slack) & (abs(value) < INFINITY)
    further = not abs(asked - found) <= abs(asked - best) + abs(asked) * near
    both_nan = (weight != weight) & (value != value)
    return bool((no_code | (further & (abs(decoded) > slack))) & (not both_nan))


class Even(NamedTuple):
    """Whole numbers over `top`; or, where `eight` is true, those of a form of float8 over its largest, `top`."""

    top: np.float32
    eight: bool
    limits: Limits


def whole_numbers(top: np.float32) -> Even:
    """Whole numbers over `top`, up to 1."""
    return Even(top, False, Limits(*[u32(0)] * 6))


@part
def _nearest(share: np.float32, numbers: Even) -> np.float32:
    """The number nearest to a share."""
    scaled = f32(share * numbers.top)
    if numbers.eight:
        return rounded(scaled, numbers.limits, numbers.top) / numbers.top
    return f32(f32(scaled + ROUNDER) - ROUNDER) / numbers.top


@kernel
def check(weights: Floats, values: Floats, group: Group, numbers: Even, wrong: Bools) -> None:
    """Fill `wrong`: it, weights and the values that are read are flat, of one length."""
    for g in range(group.encoded.size):
        start, stop = g * group.width, (g + 1) * group.width
        row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
        encoded, scales = group.encoded[g], (group.decoded[g], group.slack[g], group.near)
        for i in range(row.size):
            asked = f32(row[i] / encoded) if encoded > ZERO else ZERO
            found = _nearest(f32(read[i] / scales[0]) if scales[0] != ZERO else ZERO, numbers)
            out[i] = _is_wrong(row[i], read[i], (asked, _nearest(asked, numbers), found), scales)


class Steps(NamedTuple):
    """Whole numbers from 0 to `top`, of groups that have a least weight."""

    top: np.float32


@kernel
def _whole(share: np.float32, numbers: Steps) -> np.float32:
    """The number nearest to a share."""
    within = min(max(share, ZERO), numbers.top)
    return f32(f32(within + ROUNDER) - ROUNDER)


@kernel
def check_steps(weights: Floats, values: Floats, group: Group, numbers: Steps, wrong: Bools) -> None:
    """The same for codes that begin at a least weight."""
    for g in range(group.slack.size):
        start, stop = g * group.width, (g + 1) * group.width
        row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
        encoded, low, decoded, least = (
            group.encoded[g, 0],
            group.encoded[g, 1],
            group.decoded[g, 0],
            group.decoded[g, 1],
        )
        slack, near = group.slack[g], group.near
        for i in range(row.size):
            asked = f32(f32(row[i] + low) / encoded) if encoded != ZERO else ZERO
            found = _whole(f32(f32(read[i] + least) / decoded) if decoded != ZERO else ZERO, numbers)
            room = (abs(read[i]) + abs(least)) * _EXACT + slack
            no_code = not (abs(read[i] - f32(found * decoded - least)) <= room) & (abs(read[i]) < INFINITY)
            further = not abs(asked - found) <= abs(asked - _whole(asked, numbers)) + abs(asked) * near
            both_nan = (row[i] != row[i]) & (read[i] != read[i])
            out[i] = (no_code | (further & (abs(decoded) > slack))) & (not both_nan)


class Sixteen(NamedTuple):
    """Sixteen numbers, ascending, and the fifteen halfway between them."""

    rising: Floats
    middles: Floats


@part
def _find(shares: Floats, numbers: Sixteen, ranks: npt.NDArray[np.uint32], found: Floats) -> None:
    """Fill `found` with the numbers nearest to shares; `ranks`, above how many middles they lie, is scratch."""
    for i in range(shares.size):
        rank = u32(0)
        for k in range(15):
            rank += u32(not shares[i] <= numbers.middles[k])
        ranks[i] = rank
    for i in range(found.size):
        found[i] = numbers.rising[ranks[i]]


@part
def _are_nearest(read: Floats, best: Floats, decoded: np.float32) -> bool:
    """Whether all that is read is what the nearest numbers stand for: nothing is wrong then, whatever the slack."""
    misses = i32(0)
    for i in range(read.size):
        close = abs(read[i] - best[i] * decoded) <= abs(read[i]) * _EXACT
        misses += i32(not (close & (abs(read[i]) < INFINITY)))
    return bool(misses == 0)


@kernel
def check_sixteen(weights: Floats, values: Floats, group: Group, numbers: Sixteen, wrong: Bools) -> None:
    """The same for NF4 and FP4, `width` weights at a time."""
    scratch, ranks = np.empty((3, group.width), np.float32), np.empty(group.width, np.uint32)
    asked, best, found = scratch[0], scratch[1], scratch[2]
    for g in range(group.encoded.size):
        start, stop = g * group.width, (g + 1) * group.width
        row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
        encoded, decoded, slack = group.encoded[g], group.decoded[g], group.slack[g]
        for i in range(row.size):
            asked[i] = f32(row[i] / encoded) if encoded > ZERO else ZERO
        _find(asked, numbers, ranks, best)
        nearest = _are_nearest(read, best, decoded)
        for i in range(out.size):
            out[i] = not nearest
        if not nearest:
            for i in range(row.size):
                found[i] = f32(read[i] / decoded) if decoded != ZERO else ZERO
            _find(found, numbers, ranks, found)
            for i in range(row.size):
                out[i] = _is_wrong(row[i], read[i], (asked[i], best[i], found[i]), (decoded, slack, group.near))

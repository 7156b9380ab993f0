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

from neoxconv.core.encoding import EXACT
from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.kernels import HALF, INFINITY, NAN, ONE, ZERO, f32, i32, kernel, part, u32
from neoxconv.quant.scaled.float8_kernels import Limits, rounded
from neoxconv.quant.scaled.kernels import ROUNDER

_EXACT = f32(EXACT)
_SMALLEST = f32(1e-30)  # scales whose parts are no subnormal numbers
_AT_ONCE = 256  # weights, of which one may ask for a closer look


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


@kernel
def _is_close(value: np.float32, expected: np.float32) -> bool:
    """Whether a value is finite and what was expected of it; half of what arithmetic may cost is left for the rest."""
    return bool((abs(value - expected) <= abs(value) * (_EXACT * HALF)) & (abs(value) < INFINITY))


class Even(NamedTuple):
    """Whole numbers over `top`; or, where `eight` is true, those of a form of float8 over its largest, `top`."""

    top: np.float32
    eight: bool
    limits: Limits


def whole_numbers(top: np.float32) -> Even:
    """Whole numbers over `top`, up to 1."""
    return Even(top, False, Limits(*[u32(0)] * len(Limits._fields)))


@kernel
def _whole(scaled: np.float32, numbers: Even) -> np.float32:
    """The number nearest to a share of `top`, times that."""
    if numbers.eight:
        return rounded(scaled, numbers.limits, numbers.top)
    return f32(f32(scaled + ROUNDER) - ROUNDER)


@part
def _nearest(share: np.float32, numbers: Even) -> np.float32:
    """The number nearest to a share."""
    return _whole(f32(share * numbers.top), numbers) / numbers.top


@kernel
def _are_nearest(row: Floats, read: Floats, scales: _Few, numbers: Even) -> bool:
    """Whether all that is read is what the nearest numbers stand for: nothing is wrong then, whatever the slack.

    That is a quick look, which neither divides nor writes. Scales are e and d.
    """
    encoded, decoded = scales
    inverse = f32(numbers.top / encoded) if encoded > ZERO else ZERO
    unit, misses = f32(decoded / numbers.top) if abs(decoded) > _SMALLEST else NAN, i32(0)
    for i in range(row.size):
        best = _whole(f32(row[i] * inverse), numbers)
        misses = i32(misses + i32(not _is_close(read[i], best * unit)))
    return bool(misses == 0)


@kernel
def check(weights: Floats, values: Floats, group: Group, numbers: Even, wrong: Bools) -> None:
    """Set `wrong`: it, weights and the values that are read are flat, of one length."""
    for g in range(group.encoded.size):
        encoded, scales = group.encoded[g], (group.decoded[g], group.slack[g], group.near)
        end = min((g + 1) * group.width, weights.size)
        for start in range(g * group.width, end, _AT_ONCE):
            stop = min(start + _AT_ONCE, end)
            row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
            if _are_nearest(row, read, (encoded, scales[0]), numbers):
                continue
            for i in range(row.size):
                asked = f32(row[i] / encoded) if encoded > ZERO else ZERO
                found = _nearest(f32(read[i] / scales[0]) if scales[0] != ZERO else ZERO, numbers)
                out[i] = _is_wrong(row[i], read[i], (asked, _nearest(asked, numbers), found), scales)


class Steps(NamedTuple):
    """Whole numbers from 0 to `top`, of groups that have a least weight."""

    top: np.float32


@kernel
def _step(share: np.float32, numbers: Steps) -> np.float32:
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
            found = _step(f32(f32(read[i] + least) / decoded) if decoded != ZERO else ZERO, numbers)
            room = (abs(read[i]) + abs(least)) * _EXACT + slack
            no_code = not (abs(read[i] - f32(found * decoded - least)) <= room) & (abs(read[i]) < INFINITY)
            further = not abs(asked - found) <= abs(asked - _step(asked, numbers)) + abs(asked) * near
            both_nan = (row[i] != row[i]) & (read[i] != read[i])
            out[i] = (no_code | (further & (abs(decoded) > slack))) & (not both_nan)


class Sixteen(NamedTuple):
    """Sixteen numbers, ascending, and the fifteen halfway between them."""

    rising: Floats
    middles: Floats


@kernel
def _find(share: np.float32, numbers: Sixteen) -> np.float32:
    """The number nearest to a share."""
    found = numbers.rising[0]
    for k in range(15):
        above = numbers.rising[k + 1]  # read in any case, which lets LLVM make vectors
        found = found if share <= numbers.middles[k] else above
    return f32(found)


@kernel
def _are_nearest_of_sixteen(row: Floats, read: Floats, scales: _Few, numbers: Sixteen) -> bool:
    """The same quick look for NF4 and FP4."""
    encoded, decoded = scales
    inverse, misses = f32(ONE / encoded) if encoded > ZERO else ZERO, i32(0)
    for i in range(row.size):
        best = _find(f32(row[i] * inverse), numbers)
        misses = i32(misses + i32(not _is_close(read[i], best * decoded)))
    return bool(misses == 0)


@kernel
def check_sixteen(weights: Floats, values: Floats, group: Group, numbers: Sixteen, wrong: Bools) -> None:
    """The same for NF4 and FP4, `width` weights at a time."""
    for g in range(group.encoded.size):
        start, stop = g * group.width, (g + 1) * group.width
        row, read, out = weights[start:stop], values[start:stop], wrong[start:stop]
        encoded, scales = group.encoded[g], (group.decoded[g], group.slack[g], group.near)
        if _are_nearest_of_sixteen(row, read, (encoded, scales[0]), numbers):
            continue
        for i in range(row.size):
            asked = f32(row[i] / encoded) if encoded > ZERO else ZERO
            found = _find(f32(read[i] / scales[0]) if scales[0] != ZERO else ZERO, numbers)
            out[i] = _is_wrong(row[i], read[i], (asked, _find(asked, numbers), found), scales)

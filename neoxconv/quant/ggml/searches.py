"""How each type of ggml's searches its scales: data only, without numba."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError

ABOVE, SQUARE = 0, 1  # lanes.weigh


@dataclass(frozen=True)
class Search:
    """`block` weights share a scale, and `subs` blocks the step that their scales are integer multiples of.

    The integers go from -levels to levels - 1, with a least weight (`lowest` is 0) from 0 to `levels`. `grid` is where
    the search first puts a block's largest weight (with a least weight: over how many steps it lays the block's range);
    `wide` is the same for a thorough search. `kind` and `share` say how much an error matters (lanes.weigh); with an
    importance matrix it is importance * sqrt(w^2 + `spread` of the mean of w^2 over the super-block, or the row), as in
    ggml's quantize_row_*_impl.
    """

    block: int
    subs: int
    lowest: int
    highest: int
    levels: int
    grid: tuple[float, ...]
    wide: tuple[float, ...]
    kind: int
    share: float
    spread: float
    over_row: bool = False

    @property
    def least(self) -> bool:
        return self.lowest == 0

    @property
    def curved(self) -> bool:
        """The codes stand for IQ4's sixteen values."""
        return self.lowest == -127

    def trims(self, thorough: bool) -> Floats:
        """[n, 2] what the largest integers fall short of `levels`: a little larger steps may fit the others better."""
        if self.subs == 1:
            return np.zeros((1, 2), np.float32)
        half = 1.0 if self.levels > 64 else 0.5
        if thorough and self.least:
            return np.array(list(product(np.arange(5) * half, repeat=2)), np.float32)
        trims = np.arange(13) * half / 2 if thorough else np.arange(3) * half
        return np.stack([trims, trims], axis=1, dtype=np.float32)


def steps(first: float, last: float, count: int) -> tuple[float, ...]:
    """Numbers at equal distances."""
    return tuple(np.linspace(first, last, count).tolist())


CURVE = (*steps(-134, -119, 6), 113.0, 120.0, 127.0)
SEARCHES = {
    #               blocks  codes  integers  places of the largest weight    what matters
    "Q2_K": Search(16, 16, 0, 3, 15, steps(2.7, 3.6, 3), steps(2.1, 3.9, 13), ABOVE, 0.0, 1.0),
    "Q3_K": Search(16, 16, -4, 3, 32, (-4.1, -3.4), steps(-6.5, -3.1, 13), SQUARE, 0.6, 2.0),
    "Q4_K": Search(32, 8, 0, 15, 63, steps(14, 15.5, 5), steps(13, 16, 13), ABOVE, 1.0, 2.0),
    "Q5_K": Search(32, 8, 0, 31, 63, steps(30.5, 32, 4), steps(29, 32, 10), ABOVE, 1.0, 2.0),
    "Q6_K": Search(16, 16, -32, 31, 128, (-32.0, -31.05), steps(-36, -31, 8), SQUARE, 0.3, 0.0),
    "IQ4_XS": Search(32, 8, -127, 113, 32, CURVE, CURVE, SQUARE, 0.6, 2.0),
    "IQ4_NL": Search(32, 1, -127, 113, 2, CURVE, CURVE, SQUARE, 0.6, 2.0),
    # Types that need no search by themselves: quick is never asked for.
    "Q4_0": Search(32, 1, -8, 7, 2, (), steps(-10, -7, 13), SQUARE, 0.6, 1.0, over_row=True),
    "Q4_1": Search(32, 1, 0, 15, 1, (), steps(12, 16, 21), ABOVE, 1.0, 1.0, over_row=True),
    "Q5_0": Search(32, 1, -16, 15, 2, (), steps(-18, -15, 13), SQUARE, 0.6, 1.0, over_row=True),
    "Q5_1": Search(32, 1, 0, 31, 1, (), steps(28, 32, 13), ABOVE, 1.0, 1.0, over_row=True),
}  # fmt: skip


def check_columns(name: str, block: int, rows: Floats) -> None:
    """Raise PlanError where `block` weights that the type `name` stores together do not divide the columns."""
    if rows.shape[1] % block:
        raise PlanError(
            f"{name} stores {block} weights together, but a row has {rows.shape[1]}. Store this tensor as F16."
        )

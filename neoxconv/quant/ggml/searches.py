"""How each type of ggml's searches its scales: data only, without numba."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError

ABOVE, _SQUARE = 0, 1  # lanes.weigh


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which codes and integers a type has, and how those of a block are found.

    `block` weights share a scale, and `subs` blocks the step that their scales are integer multiples of. Codes go from
    `lowest` to `highest`, or with `curve` stand for `CURVE`, whose ends these are. The integers go from -levels to
    levels - 1, stored with `levels` added or, if `signed`, as they are; with a least weight (`lowest` is 0) from 0 to
    `levels`. `grid` is where the search first puts a block's largest weight (with a least weight: over how many steps
    it lays the block's range); `wide` is the same for a thorough search. `kind` and `share` say how much an error
    matters (lanes.weigh); with an importance matrix it is importance * sqrt(w^2 + `spread` of the mean of w^2 over the
    super-block, or the row), or importance alone where `spread` is 0.
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
    curve: bool = False
    signed: bool = False

    @property
    def least(self) -> bool:
        """Weights are counted from a least one, which is stored too."""
        return self.lowest == 0

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


CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h: kvalues_iq4nl
_IQ4_GRID = (*steps(-134, -119, 6), 113.0, 120.0, 127.0)  # the latter: the largest weight at the curve's other end

# Blocks and levels are those of ggml-common.h; `spread` that of quantize_row_*_impl in ggml-quants.c (sigma2; llama.cpp
# of llama-cpp-python 0.3.36) but for Q2_K, `kind` that of quantize_row_*_ref there. Grids and shares were chosen by
# hand: `python -m benchmarks.encoders` measures the speed and the errors that they give.

# With ggml's 1 the least error makes the weights 4 % too small. That adds up from layer to layer, and a matrix made
# Q2_K worse than none (docs/numerics.md, "Importance matrices").
_Q2_K_SPREAD = 0.1

SEARCHES = {
    "Q2_K": Search(
        block=16, subs=16, lowest=0, highest=3, levels=15,
        grid=steps(2.7, 3.6, 3), wide=steps(2.1, 3.9, 13), kind=ABOVE, share=0.0, spread=_Q2_K_SPREAD,
    ),
    "Q3_K": Search(
        block=16, subs=16, lowest=-4, highest=3, levels=32,
        grid=(-4.1, -3.4), wide=steps(-6.5, -3.1, 13), kind=_SQUARE, share=0.6, spread=2.0,
    ),
    "Q4_K": Search(
        block=32, subs=8, lowest=0, highest=15, levels=63,
        grid=steps(14, 15.5, 5), wide=steps(13, 16, 13), kind=ABOVE, share=1.0, spread=2.0,
    ),
    "Q5_K": Search(
        block=32, subs=8, lowest=0, highest=31, levels=63,
        grid=steps(30.5, 32, 4), wide=steps(29, 32, 10), kind=ABOVE, share=1.0, spread=2.0,
    ),
    "Q6_K": Search(
        block=16, subs=16, lowest=-32, highest=31, levels=128, signed=True,
        grid=(-32.0, -31.05), wide=steps(-36, -31, 8), kind=_SQUARE, share=0.3, spread=0.0,
    ),
    "IQ4_XS": Search(
        block=32, subs=8, lowest=CURVE[0], highest=CURVE[-1], levels=32, curve=True,
        grid=_IQ4_GRID, wide=_IQ4_GRID, kind=_SQUARE, share=0.6, spread=2.0,
    ),
    "IQ4_NL": Search(
        block=32, subs=1, lowest=CURVE[0], highest=CURVE[-1], levels=2, curve=True,
        grid=_IQ4_GRID, wide=_IQ4_GRID, kind=_SQUARE, share=0.6, spread=2.0,
    ),
    # Types that need no search by themselves: quick is never asked for.
    "Q4_0": Search(
        block=32, subs=1, lowest=-8, highest=7, levels=2,
        grid=(), wide=steps(-10, -7, 13), kind=_SQUARE, share=0.6, spread=1.0, over_row=True,
    ),
    "Q4_1": Search(
        block=32, subs=1, lowest=0, highest=15, levels=1,
        grid=(), wide=steps(12, 16, 21), kind=ABOVE, share=1.0, spread=1.0, over_row=True,
    ),
    "Q5_0": Search(
        block=32, subs=1, lowest=-16, highest=15, levels=2,
        grid=(), wide=steps(-18, -15, 13), kind=_SQUARE, share=0.6, spread=1.0, over_row=True,
    ),
    "Q5_1": Search(
        block=32, subs=1, lowest=0, highest=31, levels=1,
        grid=(), wide=steps(28, 32, 13), kind=ABOVE, share=1.0, spread=1.0, over_row=True,
    ),
}  # fmt: skip


def check_columns(name: str, block: int, rows: Floats) -> None:
    """Raise PlanError where `block` weights that the type `name` stores together do not divide the columns."""
    if rows.shape[1] % block:
        raise PlanError(
            f"{name} stores {block} weights together, but a row has {rows.shape[1]}. Store this tensor as F16."
        )

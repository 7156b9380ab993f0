"""What is searched for in blocks of weights: codes, and the scale (and least weight) that they are read with.

The kernels are in fit_line.py and fit_scale.py; this file says what each type asks of them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import numpy as np

from neoxconv.core.encoding import Context, Grid
from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml.searches import CURVE, Search


def find(search: Search, rows: Floats, context: Context) -> tuple[Bytes, Floats]:
    """The codes [blocks, block] of rows [n, columns], and [blocks, 4] integers and steps of scale and least weight.

    Thorough where the context says so or gives an importance of the columns, for which the quick search is not made.
    """
    from neoxconv.quant.ggml.fit_line import lines
    from neoxconv.quant.ggml.fit_scale import scales

    blocks = np.ascontiguousarray(rows, np.float32).reshape(rows.size // search.block, search.block)
    codes, numbers = np.empty(blocks.shape, np.uint8), np.empty((len(blocks), 4), np.float32)
    thorough = context.thorough or context.importance is not None
    candidates = np.array(search.wide if thorough else search.grid, np.float32), search.trims(thorough)
    found = codes.view(np.uint32), numbers
    worth = search.kind, search.share, *_importance_of(search, blocks, rows.shape[1], context.importance)
    if search.least:
        lines(blocks, worth, (search.subs, search.highest, search.levels), candidates, found)
    else:
        kind = (search.lowest, search.highest, search.curve)
        scales(blocks, worth, (search.subs, search.levels, kind), candidates, found)
    return codes, numbers


def grid(
    search: Search,
    pack: Callable[[Bytes, Floats], Bytes],
    unpack: Callable[[Bytes], tuple[Bytes, Floats, Floats]],
) -> Grid:
    """A type's codes for feedback; `pack` and `unpack` as a Grid has them."""
    group = search.block * search.subs

    def found(rows: Floats, importance: Floats) -> Floats:
        return find(search, rows, Context(importance, True))[1].reshape(len(rows), search.subs, 4)

    values = CURVE if search.curve else range(search.lowest, search.highest + 1)
    return Grid(search.block, group, np.array(values, np.float32), found, pack, unpack)


def _importance_of(search: Search, blocks: Floats, columns: int, importance: Floats | None) -> tuple[Floats, Floats]:
    """What the kernels take for an importance of the columns."""
    group = columns // search.block if search.over_row else search.subs
    return importance_in_lanes(importance, blocks, group, search.spread)


def importance_in_lanes(importance: Floats | None, blocks: Floats, group: int, share: float) -> tuple[Floats, Floats]:
    """What the kernels take for an importance of the columns: it in lanes [m, block, LANES], and blocks' spreads.

    The spread of blocks [n, block] is `share` of the mean square of the `group` blocks that they are among. Both are
    empty without an importance, the spreads without a share.
    """
    from neoxconv.quant.ggml.lanes import LANES, mean_squares

    block, nothing = blocks.shape[1], np.empty(0, np.float32)
    if importance is None:
        return np.empty((0, block, LANES), np.float32), nothing
    repeated = np.tile(importance, LANES // gcd(len(importance) // block, LANES))
    lanes = np.ascontiguousarray(repeated.reshape(-1, LANES, block).transpose(0, 2, 1))
    if not share:
        return lanes, nothing
    means = np.empty(len(blocks) // group, np.float32)
    mean_squares(blocks.reshape(len(means), group * block), share, means)
    return lanes, np.concatenate([np.repeat(means, group), np.zeros(-len(blocks) % LANES, np.float32)])

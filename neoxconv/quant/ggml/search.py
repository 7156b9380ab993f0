"""What is searched for in blocks of weights: codes, and the scale (and least weight) that they are read with.

The kernels are in fit_line.py and fit_scale.py; this file says what each type asks of them.
"""

from __future__ import annotations

from collections.abc import Callable

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
    worth = search.kind, search.share, *_importance_of(search, blocks, rows.shape[1], context.importance)
    if search.least:
        lines(blocks, worth, (search.subs, search.highest, search.levels), candidates, codes, numbers)
    else:
        kind = (search.lowest, search.highest, search.curve)
        scales(blocks, worth, (search.subs, search.levels, kind), candidates, codes, numbers)
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
    """What the kernels take for an importance of the columns: [column blocks, block], and for each block the spread."""
    from neoxconv.quant.ggml.lanes import mean_squares

    if importance is None:
        return np.empty((0, search.block), np.float32), np.empty(0, np.float32)
    spread = np.empty(len(blocks) if search.spread else 0, np.float32)
    if search.spread:
        group = columns // search.block if search.over_row else search.subs
        mean_squares(blocks, group, search.spread, spread)
    return importance.reshape(-1, search.block), spread

"""Which weights share a scale: blocks of a tensor's numbers in their order, its rows, or all of them."""

from __future__ import annotations

import math

import numpy as np

from neoxconv.core.encoding import Grain
from neoxconv.dtypes import Floats


def sizes(groups: Floats) -> Floats:
    """The largest magnitude of every row of [n, k]; a NaN is larger than anything."""
    from neoxconv.quant.scaled.kernels import largest

    found = np.empty(len(groups), np.float32)
    largest(np.ascontiguousarray(groups, np.float32).view(np.uint32), found.view(np.uint32))
    return found


def whole_blocks(values: Floats, block: int) -> Floats:
    """Numbers as blocks [n, block], the last filled up with zeros."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if missing := -flat.size % block:
        flat = np.concatenate([flat, np.zeros(missing, np.float32)])
    return flat.reshape(-1, block)


def blocks(block: int) -> Grain:
    """Every `block` numbers of the tensor in their order, whatever its rows; the last may have less."""
    return Grain(
        lambda columns: block // math.gcd(block, columns),
        lambda rows: sizes(whole_blocks(rows, block)),
        lambda start, stop, columns: slice(start * columns // block, -(-stop * columns // block)),
        lambda groups, shape: np.repeat(groups, block)[: math.prod(shape)].reshape(shape),
    )


def by_row(groups: Floats, shape: tuple[int, ...]) -> Floats:
    """A number for each row, or one for all."""
    return np.broadcast_to(groups[:, None], shape)


ROWS = Grain(lambda columns: 1, sizes, lambda start, stop, columns: slice(start, stop), by_row)
TENSOR = Grain(
    lambda columns: 1, lambda rows: sizes(rows.reshape(1, -1)), lambda start, stop, columns: slice(None), by_row
)

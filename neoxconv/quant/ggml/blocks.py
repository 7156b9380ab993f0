"""Blocks of all of ggml's types as numbers: codes of a byte each, a scale, and a least weight that is taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neoxconv.dtypes import Bytes, Floats
from neoxconv.errors import CheckpointError

if TYPE_CHECKING:
    from neoxconv.quant.ggml.check_kernels import Meaning


@dataclass(frozen=True)
class Blocks:
    """Blocks taken apart: codes uint8 [n, block], scales and least weights float32 [n].

    A code that stands for v is read as v * scale - least.
    """

    codes: Bytes
    scale: Floats
    least: Floats


def whole_blocks(name: str, layout: np.dtype[Any], stored: Bytes) -> Bytes:
    """Rows of blocks as blocks [n, bytes of a block]. Raises CheckpointError where they are no whole number of them."""
    if stored.shape[1] % layout.itemsize:
        raise CheckpointError(
            f"{name}: blocks have {layout.itemsize} bytes, but a row has {stored.shape[1]}. "
            "The file is damaged or its type is another one."
        )
    return np.ascontiguousarray(stored).reshape(stored.size // layout.itemsize, layout.itemsize)


def meaning(zero: int, lowest: int, highest: int, curve: tuple[int, ...] = ()) -> Meaning:
    """What codes stand for: their distance to the code that is stored as -`zero`, or the values of a curve."""
    from neoxconv.quant.ggml.check_kernels import Meaning

    values = np.array(curve, np.float32)
    half = np.diff(values) / 2
    end = np.full(min(1, len(values)), np.inf, np.float32)
    table = np.stack([values, np.concatenate([half, end]), np.concatenate([end, half])])
    return Meaning(np.float32(zero), np.float32(lowest), np.float32(highest), table)


def values_of(blocks: Blocks, meant: Meaning) -> Floats:
    """The numbers [n, block] that are read of blocks."""
    from neoxconv.quant.ggml import check_kernels

    values = np.empty(blocks.codes.shape, np.float32)
    check_kernels.read(blocks.codes, blocks.scale, blocks.least, meant, values)
    return values

"""Numbers of a few bits anywhere in blocks of bytes: where they lie, as data, and both ways between them and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from neoxconv.dtypes import Bytes

if TYPE_CHECKING:
    from neoxconv.quant.ggml.codebook_search import Words


class Bits(NamedTuple):
    """Where `bits` bits from bit `low` on of each number lie, counted from a block's lowest bit.

    Number i of run o, `runs` of so many each, begins at bit at + o * apart[0] + i * apart[1].
    """

    at: int
    bits: int
    runs: tuple[int, int]
    apart: tuple[int, int]
    low: int = 0


Places = tuple[Bits, ...]


def row(at: int, bits: int, count: int, apart: int, low: int = 0) -> Bits:
    """Numbers in a single run."""
    return Bits(at, bits, (1, count), (0, apart), low)


def put(blocks: Bytes, places: Places, numbers: Words) -> None:
    """Add numbers [n, count] to blocks [n, bytes] that are zero in their places."""
    from neoxconv.quant.ggml.bit_kernels import put_bits

    for bits in places:
        put_bits(blocks, bits, numbers)


def take(blocks: Bytes, places: Places) -> Words:
    """The numbers [n, count] in these places of blocks [n, bytes]; none where there are no places."""
    from neoxconv.quant.ggml.bit_kernels import take_bits

    count = places[0].runs[0] * places[0].runs[1] if places else 0
    numbers = np.zeros((len(blocks), count), np.uint32)
    for bits in places:
        take_bits(blocks, bits, numbers)
    return numbers

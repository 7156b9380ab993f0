"""Kernels that put numbers of a few bits into blocks of bytes, and take them out (bit_places.py)."""

from __future__ import annotations

from neoxconv.dtypes import Bytes
from neoxconv.quant.ggml.codebook_search import Words
from neoxconv.quant.kernels import kernel, u8, u32

Run = tuple[int, int, tuple[int, int], tuple[int, int], int]  # the fields of Bits, bit_places.py


@kernel
def put_bits(blocks: Bytes, bits: Run, numbers: Words) -> None:
    """Add the bits of numbers [n, count] to blocks [n, bytes]."""
    at, width, runs, apart, low = bits
    mask = u32((1 << width) - 1)
    for b in range(blocks.shape[0]):
        for o in range(runs[0]):
            for i in range(runs[1]):
                place = at + o * apart[0] + i * apart[1]
                field = u32(((numbers[b, o * runs[1] + i] >> u32(low)) & mask) << u32(place & 7))
                byte = place >> 3
                while field != u32(0):
                    blocks[b, byte] |= u8(field & u32(255))
                    field = u32(field >> u32(8))
                    byte += 1


@kernel
def take_bits(blocks: Bytes, bits: Run, numbers: Words) -> None:
    """Add the bits that lie in blocks [n, bytes] to numbers [n, count] that are zero there."""
    at, width, runs, apart, low = bits
    mask = u32((1 << width) - 1)
    for b in range(blocks.shape[0]):
        for o in range(runs[0]):
            for i in range(runs[1]):
                place = at + o * apart[0] + i * apart[1]
                field = u32(0)
                for byte in range(place >> 3, ((place + width - 1) >> 3) + 1):
                    field |= u32(u32(blocks[b, byte]) << u32((byte - (place >> 3)) * 8))
                numbers[b, o * runs[1] + i] |= u32(((field >> u32(place & 7)) & mask) << u32(low))

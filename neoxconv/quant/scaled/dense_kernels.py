"""Numbers of 2 to 8 bits without gaps between them, as compressed-tensors and MLX store them.

Number i begins at bit i * bits, the lowest bit of a byte first; 32 numbers take `bits` words of 32 bits. Eight numbers
are `bits` whole bytes, which is how they are packed here.
"""

from __future__ import annotations

import numpy as np

from neoxconv.dtypes import Bytes
from neoxconv.quant.kernels import kernel, u8, u16, u64

EIGHT = 8


@kernel
def copy(source: Bytes, target: Bytes) -> None:
    """As much as both hold; faster than numba's own way."""
    for i in range(min(source.size, target.size)):
        target[i] = source[i]


@kernel
def pack(codes: Bytes, bits: int, packed: Bytes) -> None:
    """Codes [8 n] as bytes [n bits]; of 4 and 8 bits, which are written, faster than as all others."""
    if bits == 8:
        copy(codes, packed)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for j in range(pairs.size):
            packed[j] = u8(pairs[j] | u16(pairs[j] >> u16(4)))
    else:
        for j in range(codes.size // EIGHT):
            word = u64(0)
            for k in range(EIGHT):
                word |= u64(codes[EIGHT * j + k]) << u64(k * bits)
            for k in range(bits):
                packed[j * bits + k] = u8(word >> u64(8 * k))


@kernel
def unpack(packed: Bytes, bits: int, codes: Bytes) -> None:
    """The way back."""
    if bits == 8:
        copy(packed, codes)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for j in range(pairs.size):
            pairs[j] = u16(packed[j] | u16(u16(packed[j]) << u16(4))) & u16(0x0F0F)
    else:
        mask = u64((1 << bits) - 1)
        for j in range(codes.size // EIGHT):
            word = u64(0)
            for k in range(bits):
                word |= u64(packed[j * bits + k]) << u64(8 * k)
            for k in range(EIGHT):
                codes[EIGHT * j + k] = u8(u64(word >> u64(k * bits)) & mask)

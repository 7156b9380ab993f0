"""Numbers of a few bits in bytes: planes of codes, and ggml's twelve bytes of sixteen integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neoxconv.dtypes import Array, Bytes


@dataclass(frozen=True)
class Plane:
    """Where `bits` bits from bit `low` on of every code lie in `field`.

    The codes in order fill [outer, count, inner]; a byte of the field holds the bits of `count` of them, lowest first.
    """

    field: str
    low: int
    bits: int
    shape: tuple[int, int, int]

    def pack(self, codes: Bytes) -> Bytes:
        """The field's bytes [n, outer * inner] of codes [n, outer * count * inner]."""
        from neoxconv.quant.ggml.lanes import pack_plane

        outer, count, inner = self.shape
        stored = np.zeros((len(codes), outer * inner), np.uint8)
        if inner % 8:
            fields, places = codes.reshape(-1, outer, count, inner), stored.reshape(-1, outer, inner)
            low, mask = np.uint8(self.low), np.uint8((1 << self.bits) - 1)
            for k in range(count):
                places |= (fields[:, :, k] >> low & mask) << np.uint8(k * self.bits)
        else:
            eights, packed = np.ascontiguousarray(codes).view(np.uint64), stored.view(np.uint64)
            pack_plane(eights, np.uint64(self.low), np.uint64(self.bits), (outer, count, inner // 8), packed)
        return stored

    def unpack(self, stored: Bytes, codes: Bytes) -> None:
        """Add the bits of every code to `codes`, at their place in it."""
        from neoxconv.quant.ggml.lanes import unpack_plane

        unpack_plane(stored, self.low, self.bits, self.shape, codes)


def pack(stored: Array, planes: tuple[Plane, ...], values: Bytes) -> None:
    """Fill the fields of planes."""
    for plane in planes:
        stored[plane.field] = plane.pack(values)


def unpack(stored: Array, planes: tuple[Plane, ...]) -> Bytes:
    """The values that the planes' fields hold together."""
    outer, count, inner = planes[0].shape
    values = np.zeros((len(stored), outer * count * inner), np.uint8)
    for plane in planes:
        plane.unpack(np.ascontiguousarray(stored[plane.field]), values)
    return values


def pack_sixes(integers: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits each in twelve bytes: the last four's upper bits over the others."""
    first, last = integers.reshape(-1, 2, 2, 4)[:, :, 0], integers.reshape(-1, 2, 2, 4)[:, :, 1]
    upper = (first | last >> 4 << 6).reshape(-1, 8)
    return np.concatenate([upper, last[:, 0] & 15 | last[:, 1] << 4], axis=1)


def unpack_sixes(stored: Bytes) -> Bytes:
    """The sixteen integers in twelve bytes."""
    upper = stored[:, :8].reshape(-1, 2, 4)
    lower = np.stack([stored[:, 8:] & 15, stored[:, 8:] >> 4], axis=1)
    return np.stack([upper & 63, lower | upper >> 6 << 4], axis=2).reshape(-1, 16)

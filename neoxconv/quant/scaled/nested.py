"""bitsandbytes' double quantization: the scales of a tensor's blocks, less their mean, in 8 bits.

    scale ~ size * table[code] + mean      size: the largest |scale - mean| of 256 blocks, float32

The bytes are those of bitsandbytes 0.50 on one thread of an x86 CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.scaled.groups import largest, whole_blocks

NESTED = 256  # scales that share a size
_CHUNK = 4096 * NESTED  # scales that are nested at a time
_STEPS = 65536  # bitsandbytes looks the nearest number of a nested table up on a grid of so many points
WIDEST = 0.0142  # the largest distance of two neighbours in the nested table: a step that rounding may decide


@cache
def nested_table() -> Floats:
    """bitsandbytes' dynamic map: 0, 1, and the middles of 2^k equal parts of [10^(k - 7), 10^(k - 6)], k = 0 to 6."""
    found = [0.0, 1.0]
    for power in range(7):
        count = 1 << power
        parts = linspace(0.1, 1.0, count + 1)
        middles = (parts[:-1] + parts[1:]) / np.float32(2)
        for sign in (1, -1):
            found += (np.float32(sign * 10.0 ** (power - 6)) * middles).tolist()
    return np.sort(np.array(found, np.float32))


def linspace(start: float, stop: float, count: int) -> Floats:
    """`count` numbers in equal steps as torch has them: a float32 step, from both ends, each number rounded once."""
    first, last = float(np.float32(start)), float(np.float32(stop))
    step = float(np.float32(last - first) / np.float32(count - 1))
    at = np.arange(count)
    return np.where(at < count // 2, first + step * at, last - step * (count - 1 - at)).astype(np.float32)


@cache
def _nested_codes() -> Bytes:
    """The code of the table's number that is nearest to each point of the grid; the lower where two are as near."""
    table = nested_table()
    points = np.arange(_STEPS, dtype=np.float32) * np.float32(2) / np.float32(_STEPS - 1) - np.float32(1)
    above = np.clip(np.searchsorted(table, points), 1, len(table) - 1)
    nearer = np.abs(table[above] - points) < np.abs(points - table[above - 1])
    return np.where(nearer, above, above - 1).astype(np.uint8)


@dataclass(frozen=True)
class Nested:
    """Scales quantized: codes [n], the largest of every 256 after the mean is taken away, and the mean."""

    codes: Bytes
    sizes: Floats
    mean: np.float32

    @property
    def scales(self) -> Floats:
        """The scales [n] as they are read back."""
        return unnest(self.codes, nested_table(), np.repeat(self.sizes, NESTED)[: len(self.codes)], self.mean)


def nest(scales: Floats) -> Nested:
    """The scales of a tensor's blocks, quantized to 8 bits."""
    from neoxconv.quant.scaled.kernels import mean

    codes, sizes = np.empty(len(scales), np.uint8), np.empty(-(-len(scales) // NESTED), np.float32)
    with np.errstate(all="ignore"):  # what is not finite is refused when all is written, unless it is wanted
        middle = np.float32(mean(scales))
        for start in range(0, len(scales), _CHUNK):
            nested = whole_blocks(scales[start : start + _CHUNK] - middle, NESTED)
            found = largest(nested)
            inverse = np.divide(np.float32(1), found, out=np.zeros_like(found), where=found > 0)
            points = np.nan_to_num(np.clip(nested * inverse[:, None], -1, 1)) + np.float32(1)
            nearest = _nested_codes()[(points * np.float32((_STEPS - 1) / 2) + np.float32(0.5)).astype(np.int32)]
            nearest[found == 0] = 0
            codes[start : start + _CHUNK] = nearest.reshape(-1)[: len(scales) - start]
            sizes[start // NESTED : start // NESTED + len(found)] = found
    return Nested(codes, sizes, middle)


def unnest(codes: Bytes, table: Floats, sizes: Floats, mean: np.float32) -> Floats:
    """Scales [n] of codes [n] of a table [256] with the size of each one's group [n]."""
    return np.asarray(table[codes] * sizes + mean, np.float32)

"""What weights whose scales lie beside them may have become: the sizes of their groups in the source tell."""

from __future__ import annotations

from neoxconv.core.encoding import Scaled, Scales
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.bands import rounded, sizes_of


class ScaledCheck:
    """How the weights of one tensor are held against what is read of the target.

    The source is read once more beforehand where a scale follows from more than the size of its group: where all of the
    tensor is one, or scales are quantized together.
    """

    def __init__(self, encoding: Scaled, source: LazyTensor, slab: int) -> None:
        self.encoding, self.source = encoding, source
        beforehand = encoding.nested or encoding.groups.whole
        self.scales = encoding.scales(sizes_of(encoding, source, slab)) if beforehand else None

    @property
    def unit(self) -> int:
        """Rows that are whole groups."""
        return self.encoding.groups.rows_per_whole_group(self.source.columns)

    def wrong(self, weights: Floats, values: Floats, start: int) -> Bools:
        """Which weights [n, columns] of rows from `start` on cannot have become `values`: no code stands for them, or
        another one is nearer (quant/scaled/check_kernels.py)."""
        rows = rounded(self.encoding, self.source, weights)
        return self.encoding.check(rows, values, self._scales_of(rows, start), self.encoding.groups.width(rows.shape))

    def _scales_of(self, rows: Floats, start: int) -> Scales:
        """The scales of the groups in rows from `start` on."""
        if self.scales is None:
            return self.encoding.scales(self.encoding.groups.largest(rows))
        touched = self.encoding.groups.groups_of(start, start + len(rows), self.source.columns)
        numbers = self.scales.encoded, self.scales.decoded, self.scales.slack
        return Scales(*(each[touched] for each in numbers))

"""What weights whose scales lie beside them may have become: the sizes of their groups in the source tell."""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import EXACT, Scaled, Scales, scale_and_least
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Bools, Floats
from neoxconv.engine.memory import SLAB
from neoxconv.quant.bands import rounded, sizes_of
from neoxconv.quant.feedback.encode import matters
from neoxconv.verify.together import Stored

_REACH = 1.1001  # the largest scale that an encoder tries, over its group's largest weight, and rounding


class ScaledCheck:
    """How the weights of one tensor are held against what the target stores.

    The source is read once more beforehand where a scale follows from more than the size of its group: where all of the
    tensor is one, scales are quantized together, or codes were chosen `together`.
    """

    def __init__(
        self, encoding: Scaled, source: LazyTensor, *, together: bool = False, moments: Floats | None = None
    ) -> None:
        """`moments` [columns, columns]: the damped ones by which codes were chosen, where they are at hand."""
        self.encoding, self.source = encoding, source
        self.known = encoding.suited is None or moments is not None  # whether scales are what the encoder's must be
        self.scales: Scales | None = None
        if together or encoding.nested or encoding.groups.whole:
            sizes = sizes_of(encoding, source, SLAB, None if moments is None else matters(moments))
            self.scales = encoding.scales(sizes, source.native)

    @property
    def unit(self) -> int:
        """Rows that are whole groups."""
        return self.encoding.groups.rows_per_whole_group(self.source.columns)

    def wrong(self, weights: Floats, values: Floats, start: int) -> Bools:
        """Which weights [n, columns] of rows from `start` on cannot have become `values`: no code stands for them, or
        another one is nearer (quant/scaled/check_kernels.py)."""
        rows = rounded(self.encoding, self.source, weights)
        scales = self._scales_from(start, len(rows)) if self.scales else self._scales_of(rows)
        return self.encoding.check(rows, values, scales, self.encoding.groups.width(rows.shape))

    def _scales_of(self, rows: Floats) -> Scales:
        """The scales of the groups in rows, by what these tell."""
        return self.encoding.scales(self.encoding.sizes(rows), self.source.native)

    def _scales_from(self, start: int, count: int) -> Scales:
        """The known scales of the groups in `count` rows from `start` on."""
        assert self.scales
        return self.scales.of(self.encoding.groups.groups_of(start, start + count, self.source.columns))

    def stored(self, values: Floats, start: int) -> Stored:
        """Rows from `start` on as codes that were chosen together."""
        table, known = self.encoding.table, self._scales_from(start, len(values))
        numbers = (*scale_and_least(known.decoded), known.slack)
        scale, least, slack = (self._per_weight(each, values.shape) for each in numbers)
        shares = np.divide(values + least, scale, out=np.zeros_like(values), where=scale != 0)
        codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), shares).astype(np.uint8)
        return Stored(table, codes, values, scale, least, self._alike, slack)

    def no_code(self, stored: Stored, start: int) -> Bools:
        """True where a value of rows from `start` on is not what a code stands for, with the scale that the encoder
        takes; where that is not known, what no scale that it tries can give."""
        if self.known:
            expected = stored.table[stored.codes] * stored.scale - stored.least
            reach = np.abs(stored.values) + np.abs(stored.least)
            return np.asarray(~(np.abs(stored.values - expected) <= EXACT * reach))
        largest = self._per_weight(self._scales_from(start, len(stored.values)).encoded, stored.values.shape)
        return np.asarray(~(np.abs(stored.values) <= _REACH * (largest + stored.slack)))

    @property
    def _alike(self) -> int:
        """Columns of a row that share a scale: all of them where groups run over the ends of rows."""
        columns = self.source.columns
        return columns // self.encoding.groups.groups_of(0, 1, columns).stop if self.unit == 1 else columns

    def _per_weight(self, each: Floats, shape: tuple[int, ...]) -> Floats:
        """A number of each group for every weight."""
        return np.ascontiguousarray(self.encoding.groups.per_weight(each, shape))

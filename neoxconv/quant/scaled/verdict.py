"""What weights whose scales lie beside them may have become: the sizes of their groups in the source tell."""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import EXACT, Comparison, Scaled, Scales, scale_and_least
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.bands import sizes_of
from neoxconv.quant.feedback.encode import matters
from neoxconv.quant.feedback.verdict import Stored, not_chosen

_REACH = 1.1001  # the largest scale that an encoder tries, over its group's largest weight, and rounding


def scales_for(
    encoding: Scaled, source: LazyTensor, slab: int, *, together: bool, moments: Floats | None
) -> Scales | None:
    """The scales of all groups where one follows from more than its own: for them the source is read once more.

    That is so where all of the tensor is a group, scales are quantized together, or codes were chosen `together`, by
    damped `moments` [columns, columns] where these are at hand. None elsewhere.
    """
    if not (together or encoding.nested or encoding.groups.whole):
        return None
    sizes = sizes_of(encoding, source, slab, None if moments is None else matters(moments))
    return encoding.scales(sizes, source.native)


class ScaledCheck:
    """How the weights of one tensor are held against what is stored of them."""

    def __init__(
        self,
        encoding: Scaled,
        source: LazyTensor,
        scales: Scales | None,
        *,
        together: bool = False,
        moments: Floats | None = None,
    ) -> None:
        """`scales`: those of all groups; None: each follows from the weights of its group. `together`: codes were
        chosen together, by damped `moments` [columns, columns] where these are at hand."""
        self.encoding, self.source, self.scales = encoding, source, scales
        self.together, self.moments = together, moments
        self.known = encoding.suited is None or moments is not None  # whether scales are what the encoder's must be

    @property
    def unit(self) -> int:
        """Rows that are whole groups."""
        return self.encoding.groups.rows_per_whole_group(self.source.columns)

    def compare(self, rows: Floats, values: Floats, start: int) -> Comparison:
        """Rows [n, columns] from `start` on, rounded as the encoding takes them, beside the values read of them.

        Wrong is what no code stands for, and where another code is nearer (quant/scaled/check_kernels.py); codes that
        were chosen together are not the nearest (quant/feedback/verdict.py).
        """
        if self.together:
            taken = self._taken_apart(values, start)
            return Comparison(self._no_code(taken, start) | not_chosen(taken, rows, self.moments), lambda: values)
        scales = self._scales_from(start, len(rows)) if self.scales else self._scales_of(rows)
        wrong = self.encoding.check(rows, values, scales, self.encoding.groups.width(rows.shape))
        return Comparison(wrong, lambda: values)

    def _scales_of(self, rows: Floats) -> Scales:
        """The scales of the groups in rows, by what these tell."""
        return self.encoding.scales(self.encoding.sizes(rows), self.source.native)

    def _scales_from(self, start: int, count: int) -> Scales:
        """The known scales of the groups in `count` rows from `start` on."""
        assert self.scales
        return self.scales.of(self.encoding.groups.groups_of(start, start + count, self.source.columns))

    def _taken_apart(self, values: Floats, start: int) -> Stored:
        """Rows from `start` on as codes that were chosen together."""
        table, known = self.encoding.table, self._scales_from(start, len(values))
        numbers = (*scale_and_least(known.decoded), known.slack)
        scale, least, slack = (self._per_weight(each, values.shape) for each in numbers)
        shares = np.divide(values + least, scale, out=np.zeros_like(values), where=scale != 0)
        codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), shares).astype(np.uint8)
        return Stored(table, codes, values, scale, least, self._alike, slack)

    def _no_code(self, stored: Stored, start: int) -> Bools:
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

"""What weights whose scales lie beside them may have become: each group's size is known from all of the source."""

from __future__ import annotations

import numpy as np

from neoxconv.core.encoding import Scaled
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Bools, Floats
from neoxconv.quant.bands import rounded, sizes_of
from neoxconv.quant.feedback.encode import matters
from neoxconv.verify.together import Stored

SLAB = 4 << 20
_REACH = 1.1001  # the largest scale that an encoder tries, over its group's largest weight, and rounding
_EXACT = 1e-5  # what float32 arithmetic in another order may cost, as a part of a number


class ScaledCheck:
    """How the weights of one tensor are held against what the target stores."""

    def __init__(self, encoding: Scaled, source: LazyTensor, moments: Floats | None = None) -> None:
        """`moments` [columns, columns]: the damped ones by which codes were chosen together, where they are at hand."""
        self.encoding, self.source = encoding, source
        self.known = encoding.suited is None or moments is not None  # whether scales are what the encoder's must be
        self.scales = encoding.scales(sizes_of(encoding, source, SLAB, None if moments is None else matters(moments)))

    @property
    def unit(self) -> int:
        """Rows that are whole groups."""
        return self.encoding.groups.rows_per_whole_group(self.source.columns)

    def wrong(self, weights: Floats, values: Floats, start: int) -> Bools:
        """True where a value of rows from `start` on is not what a code stands for, or another code is nearer.

        With the scales e (encoded), d (decoded) and the slack s of a weight's group, all in the weight's own unit, and
        nearest(x) the number of the code's table nearest to x (without a unit), a weight w may be stored as v where

            v stands for a code     |v - found * d| <= EXACT * |v| + s              found = nearest(v / d)
            none is nearer          |asked - found| <= |asked - nearest(asked)| + EXACT * |asked|       asked = w / e

        The second is not asked where |d| <= s: the scale is lost in its own rounding, and no code can be told.
        """
        nearest = self.encoding.nearest
        numbers = self.scales.encoded, self.scales.decoded, self.scales.slack
        encoded, decoded, slack = (self._per_weight(each, start, weights.shape) for each in numbers)
        weights = rounded(self.encoding, self.source, weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            asked = np.where(encoded > 0, weights / encoded, 0)
            found = nearest(np.where(decoded != 0, values / decoded, 0))
        no_code = ~(np.abs(values - found * decoded) <= _EXACT * np.abs(values) + slack)
        further = ~(np.abs(asked - found) <= np.abs(asked - nearest(asked)) + _EXACT * np.abs(asked))
        further &= np.abs(decoded) > slack
        return np.asarray((no_code | further) & ~(np.isnan(weights) & np.isnan(values)))

    def stored(self, values: Floats, start: int) -> Stored:
        """Rows from `start` on as codes that were chosen together."""
        table, found = self.encoding.table, (self.scales.decoded, self.scales.slack)
        scale, slack = (self._per_weight(each, start, values.shape) for each in found)
        shares = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
        codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), shares).astype(np.uint8)
        return Stored(table, codes, values, scale, self._alike, slack)

    def no_code(self, stored: Stored, start: int) -> Bools:
        """True where a value of rows from `start` on is not what a code stands for, with the scale that the encoder
        takes; where that is not known, what no scale that it tries can give."""
        if self.known:
            expected = stored.table[stored.codes] * stored.scale
            return np.asarray(~(np.abs(stored.values - expected) <= _EXACT * np.abs(stored.values)))
        largest = self._per_weight(self.scales.encoded, start, stored.values.shape)
        return np.asarray(~(np.abs(stored.values) <= _REACH * (largest + stored.slack)))

    @property
    def _alike(self) -> int:
        """Columns of a row that share a scale: all of them where groups run over the ends of rows."""
        columns = self.source.columns
        return columns // self.encoding.groups.groups_of(0, 1, columns).stop if self.unit == 1 else columns

    def _per_weight(self, each: Floats, start: int, shape: tuple[int, ...]) -> Floats:
        """A number of each group for every weight of rows from `start` on."""
        groups = self.encoding.groups
        touched = groups.groups_of(start, start + shape[0], self.source.columns)
        return np.ascontiguousarray(groups.per_weight(each[touched], shape))

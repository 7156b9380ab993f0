"""What was just encoded, decoded again and held against its weights: verification in the same pass.

Codes whose scales lie beside them are read with these, as files will hold them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from neoxconv.core.encoding import Encoding, Part, Scaled
from neoxconv.core.layout import Entry
from neoxconv.core.tensor import LazyTensor, band
from neoxconv.dtypes import Array, Bools, Bytes, Floats
from neoxconv.quant.feedback import verdict as chosen
from neoxconv.quant.feedback.encode import damped_moments
from neoxconv.quant.feedback.shared import SHARED
from neoxconv.quant.scaled.verdict import ScaledCheck

Verdict = Callable[[Floats, Array], Bools]  # of weights [n, columns] and what is stored of them: which are wrong


def verdict_on(entry: Entry, encoding: Encoding) -> Verdict:
    """What tells which weights of an entry no correct encoder could have stored so."""
    context, grid = entry.context, entry.grid
    if context is None or context.moments is None or grid is None:
        weighted = context is not None
        return lambda rows, stored: encoding.compare(rows, stored, weighted).wrong
    moments = SHARED.of(context.moments, entry.name).moments
    outputs = damped_moments(context.outputs, entry.name, damping=0) if context.outputs else None
    return lambda rows, stored: chosen.compare(grid, rows, stored, moments, outputs).wrong


class ReadBack:
    """Reads codes of a tensor back, band after band."""

    def __init__(
        self, encoding: Scaled, tensor: LazyTensor, sizes: Floats | None, moments: Floats | None = None
    ) -> None:
        """`sizes` of all groups where they are known before the codes; `moments` [columns, columns]: the damped ones by
        which codes are chosen together."""
        self.encoding, self.tensor, self.moments = encoding, tensor, moments
        self.whole = None if sizes is None else _Sized(encoding, tensor, sizes, moments)

    def wrong(self, rows: Floats, codes: Bytes, start: int, sizes: Floats) -> Bools:
        """Which of the rows [n, columns] from `start` on cannot have become the codes, whose groups have these sizes.

        The rows are rounded as the encoding takes them. Where only their own sizes are known they are read as a tensor
        of their own.
        """
        if self.whole:
            return self.whole.wrong(rows, codes, start)
        alone = band(self.tensor, start, start + len(rows))
        return _Sized(self.encoding, alone, sizes, self.moments).wrong(rows, codes, 0)


class _Sized:
    """A tensor all of whose scales are known."""

    def __init__(self, encoding: Scaled, tensor: LazyTensor, sizes: Floats, moments: Floats | None) -> None:
        self.encoding, self.tensor = encoding, tensor
        self.codes, *others = encoding.parts(tensor)
        finished = zip(others, encoding.finish(tensor, sizes), strict=True)
        self.others = {part.name: _held(part, np.frombuffer(data, np.uint8), 0) for part, data in finished}
        together, scales = moments is not None, encoding.scales(sizes, tensor.native)
        self.check = ScaledCheck(encoding, tensor, scales, together=together, moments=moments)

    def wrong(self, rows: Floats, codes: Bytes, start: int) -> Bools:
        """Which of the rows from `start` on cannot have become the codes."""
        first = start * self.codes.shape[0] // self.tensor.rows
        stored = {self.codes.name: _held(self.codes, codes, first), **self.others}
        values = self.encoding.decode(stored, self.tensor.shape)(start, start + len(rows))
        return self.check.compare(rows, values, start).wrong


def _held(part: Part, data: Bytes, first: int) -> LazyTensor:
    """The rows from `first` on of a part of which these are the bytes."""
    rows = data.view(part.dtype.numpy).reshape(-1, *part.shape[1:])
    return LazyTensor(part.shape, part.dtype, lambda start, stop: rows[start - first : stop - first], part.dtype)

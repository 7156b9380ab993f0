"""How many weights of a tensor are not what they should be, and where the first of them is."""

from __future__ import annotations

import numpy as np

from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Bools


class Wrong:
    """A tally over the bands of a tensor, from its first row on."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor, self.count, self.first = tensor, 0, -1

    def add(self, wrong: Bools, start: int) -> None:
        """Count those of rows [n, columns] from `start` on."""
        if not wrong.any():
            return
        if self.first < 0:
            self.first = start * self.tensor.columns + int(wrong.argmax())
        self.count += int(np.count_nonzero(wrong))

    def told(self, encoding: str) -> str:
        """What is to be said of a tensor of which a weight is wrong."""
        at = list(map(int, np.unravel_index(self.first, self.tensor.shape)))
        of = self.tensor.rows * self.tensor.columns
        return f"{self.count} of {of} weights are not the source's as {encoding}, the first at {at}"

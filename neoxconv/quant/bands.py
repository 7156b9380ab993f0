"""Rows in bands that are whole groups, and the sizes of their groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from neoxconv.core.encoding import Scaled
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.dtypes import Floats, narrow, widen
from neoxconv.quant import floats


def sizes_of(encoding: Scaled, tensor: LazyTensor, slab: int, matters: Floats | None = None) -> Floats:
    """The size of every group of a tensor, or of the tensor where that is one, which is read for it.

    For codes that are chosen together: how much errors in each column matter [columns].
    """
    groups, sizes = encoding.groups, encoding.no_sizes(tensor)
    for start, values in bands(encoding, tensor, slab):
        found = encoding.sizes(values, matters)
        touched = groups.groups_of(start, start + len(values), tensor.columns)
        sizes[touched] = np.maximum(sizes, found) if groups.whole else found
    return sizes


def bands(encoding: Scaled, tensor: LazyTensor, slab: int) -> Iterator[tuple[int, Floats]]:
    """The first row and the rows in float32, rounded as the encoding wants them, of bands of whole groups."""
    for start, stop in slabs(tensor, slab, encoding.groups.rows_per_whole_group(tensor.columns)):
        yield start, rounded(encoding, tensor, floats(tensor.read(start, stop), tensor.dtype))


def rounded(encoding: Scaled, tensor: LazyTensor, values: Floats) -> Floats:
    """Values of a tensor, rounded to the type that the encoding takes them in."""
    dtype = encoding.rounded(tensor.native) if encoding.rounded else tensor.dtype
    return values if dtype is tensor.dtype else widen(narrow(np.ascontiguousarray(values), dtype), dtype)

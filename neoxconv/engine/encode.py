"""One tensor on its way: bands of its rows read, encoded and counted, then what is known when the last of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from neoxconv.core.encoding import Encoding, Moments, Scaled, scale_and_least
from neoxconv.core.layout import FEEDBACK_ROWS, Entry
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.dtypes import F16, F32, Array, Bools, Bytes, Floats, nonfinite
from neoxconv.engine.read_back import ReadBack, Verdict, verdict_on
from neoxconv.quant import floats
from neoxconv.quant.bands import bands, sizes_of
from neoxconv.quant.feedback import encode as feedback
from neoxconv.quant.feedback.encode import factors_of
from neoxconv.quant.feedback.rows import encode_matrix
from neoxconv.quant.feedback.shared import SHARED

_LARGEST_HALF = 65504


@dataclass(frozen=True)
class _Piece:
    """Bytes that follow those before in part `number` of an entry.

    `nonfinite` and `overflow`: how many of the weights in them are no number, and how many were beyond the encoding's
    limit. `wrong` [n, columns]: which of the weights in rows from `start` on cannot have become them; None: not asked.
    """

    number: int
    data: Bytes
    nonfinite: int = 0
    overflow: int = 0
    wrong: Bools | None = None
    start: int = 0


def pieces(entry: Entry, slab: int, *, decode: bool = False) -> Iterator[_Piece]:
    """All bytes of an entry's parts, part after part; a band of rows takes at most `slab` bytes as float32.

    With `decode` every band is decoded again and held against its weights.
    """
    encoding = entry.encoding
    if isinstance(encoding, Scaled):
        yield from _scaled_pieces(entry, encoding, slab, decode)
        return
    encoder, slab = _encoder_of(entry, encoding, slab)
    verdict = verdict_on(entry, encoding) if decode and not entry.copied else None
    for start, stop in slabs(entry.tensor, slab):
        piece = _plain_piece(entry, encoding, entry.tensor.read(start, stop), encoder, verdict)
        yield replace(piece, start=start)


_Encoder = Callable[[Floats], Array]


def _encoder_of(entry: Entry, encoding: Encoding, slab: int) -> tuple[_Encoder, int]:
    """What encodes rows as the entry's context says, and how many bytes of them at a time."""
    context, search, grid = entry.context, entry.search, entry.grid
    if context is None or search is None:
        return encoding.encode, slab
    if context.moments is None or grid is None:
        return lambda rows: search(rows, context), slab
    factors = SHARED.of(context.moments, entry.name)
    if context.outputs:
        outputs = factors_of(context.outputs, entry.name, damping=0)
        return lambda rows: encode_matrix(grid, rows, factors, outputs), 4 * entry.tensor.rows * entry.tensor.columns
    return lambda rows: feedback.encode(grid, rows, factors), 4 * entry.tensor.columns * FEEDBACK_ROWS


def _plain_piece(entry: Entry, encoding: Encoding, rows: Array, encoder: _Encoder, verdict: Verdict | None) -> _Piece:
    """A band of rows as a type of its own stores them."""
    if entry.copied:
        return _Piece(0, _as_bytes(rows), _count_bad(entry, encoding, rows=rows, data=rows))
    values = floats(rows, entry.tensor.dtype)
    data = encoder(values)
    overflow = int(np.count_nonzero(np.abs(values) > encoding.limit)) if encoding.limit < np.inf else 0
    bad = _count_bad(entry, encoding, rows=rows, data=data, values=values)
    return _Piece(0, _as_bytes(data), bad, overflow, verdict(values, data) if verdict else None)


def _count_bad(entry: Entry, encoding: Encoding, *, rows: Array, data: Array, values: Floats | None = None) -> int:
    """How many values are infinite or not a number: as they are stored, or for quantized types before and after.

    `values` are the rows in float32 where they were needed to encode them. A float16 weight always fits the float16
    scale of its block; a float32 one may not.
    """
    if not encoding.dtype.quantized:
        return nonfinite(data, encoding.dtype)
    bad = nonfinite(rows, entry.tensor.dtype)
    if bad or entry.tensor.dtype is F16:
        return bad
    if values is not None and np.abs(values).max(initial=0) <= _LARGEST_HALF:
        return 0
    return nonfinite(encoding.decode(data), F32)


def _scaled_pieces(entry: Entry, encoding: Scaled, slab: int, decode: bool) -> Iterator[_Piece]:
    """The codes of a tensor, then the parts that need the sizes of all its groups.

    To be decoded, scales that are quantized together must be known before the codes: the source is read twice then.
    """
    tensor, groups = entry.tensor, encoding.groups
    if entry.context and entry.context.moments:
        yield from _chosen_pieces(entry, encoding, entry.context.moments, slab, decode)
        return
    if encoding.rowwise:
        yield from _rowwise_pieces(tensor, encoding, slab, decode)
        return
    known = groups.whole or (decode and encoding.nested)
    sizes = sizes_of(encoding, tensor, slab) if known else encoding.no_sizes(tensor)
    back = ReadBack(encoding, tensor, sizes if known else None) if decode else None
    for start, values in bands(encoding, tensor, slab):
        touched = groups.groups_of(start, start + len(values), tensor.columns)
        if not known:
            sizes[touched] = encoding.sizes(values)
        codes = encoding.encode(values, sizes[touched], tensor.native)
        yield _coded(back, values, codes, start, sizes[touched])
    yield from _finished(encoding, tensor, sizes)


def _rowwise_pieces(tensor: LazyTensor, encoding: Scaled, slab: int, decode: bool) -> Iterator[_Piece]:
    """All parts of a band of rows, then of the next: nothing is kept."""
    back = ReadBack(encoding, tensor, None) if decode else None
    for start, values in bands(encoding, tensor, slab):
        sizes = encoding.sizes(values)
        yield _coded(back, values, encoding.encode(values, sizes, tensor.native), start, sizes)
        yield from _finished(encoding, tensor, sizes)


def _chosen_pieces(entry: Entry, encoding: Scaled, moments: Moments, slab: int, decode: bool) -> Iterator[_Piece]:
    """The same with codes that are chosen together, for the scales as they are read back."""
    tensor, groups = entry.tensor, encoding.groups
    factors = SHARED.of(moments, entry.name)
    sizes = sizes_of(encoding, tensor, slab, feedback.matters(factors.moments))
    scales = encoding.scales(sizes, tensor.native).decoded
    back = ReadBack(encoding, tensor, sizes, factors.moments) if decode else None
    for start, values in bands(encoding, tensor, 4 * tensor.columns * FEEDBACK_ROWS):
        touched = groups.groups_of(start, start + len(values), tensor.columns)
        scale, least = (groups.per_weight(each, values.shape) for each in scale_and_least(scales[touched]))
        codes = encoding.pack(feedback.choose(encoding.table, values, (scale, least), factors))
        yield _coded(back, values, codes, start, sizes[touched])
    yield from _finished(encoding, tensor, sizes)


def _coded(back: ReadBack | None, values: Floats, codes: Array, start: int, sizes: Floats) -> _Piece:
    """The codes of rows from `start` on, whose groups have these sizes."""
    data = _as_bytes(codes)
    wrong = back.wrong(values, data, start, sizes) if back else None
    return _Piece(0, data, nonfinite(values, F32), wrong=wrong, start=start)


def _finished(encoding: Scaled, tensor: LazyTensor, sizes: Floats) -> Iterator[_Piece]:
    """The parts that need the sizes of groups."""
    for number, data in enumerate(encoding.finish(tensor, sizes), 1):
        yield _Piece(number, np.frombuffer(data, np.uint8))


def _as_bytes(data: Array) -> Bytes:
    """The bytes of an array, flat."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

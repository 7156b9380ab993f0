"""The layout of a model.bin: read.py has the picture. Variables stand in the order of their names, without gaps."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neoxconv.core.layout import Entry, FileLayout, Slot
from neoxconv.dtypes import DType
from neoxconv.errors import PlanError
from neoxconv.formats.ctranslate2.read import MODEL, NUMBERS, REVISION, SPEC, TYPES, VERSION

_MOST = 2**32 - 1  # bytes of a variable, and each of its sizes: an unsigned number of 32 bits


@dataclass(frozen=True)
class _Variable:
    """What stands in the file for one name: its head, then `data`, or what a slot will hold."""

    head: bytes
    data: bytes = b""
    entry: Entry | None = None
    number: int = 0  # of the entry's part


def layout(entries: Sequence[Entry], scalars: Mapping[str, np.generic], aliases: Mapping[str, str]) -> FileLayout:
    """The file of these tensors, single numbers, and names that stand for others' (by alias).

    Raises PlanError for a tensor of 4 GiB or more.
    """
    variables = {name: _scalar(name, value) for name, value in scalars.items()}
    for entry in entries:
        for number, part in enumerate(entry.parts):
            head = _head(part.name, part.shape, part.dtype)
            variables[part.name] = _Variable(head, entry=entry, number=number)
    known = bytearray(struct.pack("<I", VERSION) + _string(SPEC) + struct.pack("<2I", REVISION, len(variables)))
    offset, pieces, slots = 0, [], []
    for name in sorted(variables):
        variable = variables[name]
        known += variable.head + variable.data
        if variable.entry:
            pieces.append((offset, bytes(known)))
            slots.append(Slot(variable.entry, offset + len(known), variable.number))
            offset = slots[-1].offset + slots[-1].part.nbytes
            known.clear()
    known += struct.pack("<I", len(aliases))
    known += b"".join(_string(alias) + _string(name) for alias, name in sorted(aliases.items()))
    pieces.append((offset, bytes(known)))
    return FileLayout(MODEL, offset + len(known), tuple(pieces), tuple(slots))


def _scalar(name: str, value: np.generic) -> _Variable:
    """A single number."""
    dtype = next(dtype for dtype in TYPES if dtype.numpy == value.dtype)
    return _Variable(_head(name, (), dtype), value.tobytes())


def _head(name: str, shape: Sequence[int], dtype: DType) -> bytes:
    """What stands before a variable's bytes. Raises PlanError where there are too many of them."""
    nbytes = dtype.nbytes * math.prod(shape)
    if nbytes > _MOST:
        raise PlanError(
            f"{name}: is {list(shape)} of {dtype.name}, {nbytes:,} bytes; a variable of CTranslate2 has {_MOST:,} at "
            "most. Give a smaller --type."
        )
    sizes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return _string(name) + sizes + struct.pack("<BI", NUMBERS[dtype.name], nbytes)


def _string(text: str) -> bytes:
    """A length, which counts the zero at the end, and the text."""
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data

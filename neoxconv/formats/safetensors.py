"""Safetensors: 8 bytes of header length, a JSON header of names, types, shapes and byte ranges, then the bytes.

    | length: u64 | {"__metadata__": {...}, "name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} |
    | numbers of one tensor | numbers of the next | ...

Ranges count from the end of the header, and cover the rest of the file without gaps or overlaps. Spaces may end the
header. Source: "Format" in the README of huggingface/safetensors, and safetensors/src/tensor.rs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from neoxconv.core.encoding import Part
from neoxconv.core.layout import Digest, Entry, FileLayout, Late, Slot
from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor, stored
from neoxconv.dtypes import F8_E4M3, F8_E5M2, PLAIN
from neoxconv.errors import CheckpointError
from neoxconv.storage import Place, Storage, open_storage

_TYPES = PLAIN | {dtype.name: dtype for dtype in (F8_E4M3, F8_E5M2)}  # by the names that a header has for them
_METADATA = "__metadata__"
ALIGNMENT = 8  # bytes
MAX_HEADER = 100 << 20  # bytes, about what the library reads
_MAX_JSON = 16 << 20  # bytes of a file beside the weights
_MAX_NAME = 1024  # characters
_MAX_AXES = 16
_MAX_NUMBER = 1 << 60  # of a size or an offset


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors unread, free text, and the SHA-256 of the header."""

    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    checksum: str


def index(path: Place) -> Index:
    """Index a single file; its settings come from config.json beside it, or from its own metadata.

    Raises CheckpointError where the file, or that configuration, is damaged.
    """
    file = open_storage(path)
    header = read_header(file)
    beside = path.parent / "config.json"
    if beside.is_file():
        settings = read_json(beside)
    else:
        settings = _read_object(header.metadata.get("config", "{}"), path, "the config in its metadata")
    return Index(
        format="safetensors",
        folder=path.parent,
        files=(SourceFile(file, header.checksum),),
        ranks=(header.tensors,),
        settings=settings,
        single=True,
    )


def read_header(file: Storage) -> Header:
    """Index a file; raises CheckpointError where the header lies about the file."""
    if file.size < 8:
        raise CheckpointError(
            f"{file.path}: is not a safetensors file, or is cut short: it has {file.size} bytes; download it again."
        )
    length = int.from_bytes(file.text(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path}: is not a safetensors file, or is cut short: its header claims {length} bytes, "
            f"the file has {file.size}; download it again."
        )
    text = file.text(8, length)
    header = _read_object(text, file.path, "its header")
    metadata = _checked_metadata(file, header.pop(_METADATA, None))
    ranges = {name: _checked_range(file, name, entry) for name, entry in header.items()}
    _check_coverage(file, ranges, 8 + length)
    tensors = {
        name: stored(file, 8 + length + start, header[name]["shape"], _TYPES[header[name]["dtype"]])
        for name, (start, _) in ranges.items()
    }
    return Header(tensors, metadata, hashlib.sha256(text).hexdigest())


def _checked_metadata(file: Storage, found: Any) -> dict[str, str]:
    """The free text of a header; raises CheckpointError where it is no text."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{file.path}: {_METADATA} is {reprlib.repr(found)}, expected texts; download it again.")
    return found


def _checked_range(file: Storage, name: str, entry: Any) -> tuple[int, int]:
    """A tensor's byte range; raises CheckpointError unless its type is known and its shape fills the range exactly."""
    if len(name) > _MAX_NAME:
        raise CheckpointError(f"{file.path}: {name[:80]}... is a name of {len(name)} characters; download it again.")
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise CheckpointError(
            f"{file.path}: {name} is of type {reprlib.repr(dtype)}, which cannot be read yet; "
            f"expected one of {', '.join(_TYPES)}. Convert it to one of them first."
        )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_are_naturals(shape) and _are_naturals(offsets) and len(shape) <= _MAX_AXES and len(offsets) == 2):
        raise CheckpointError(
            f"{file.path}: {name} has shape {reprlib.repr(shape)} and byte range {reprlib.repr(offsets)}; "
            f"expected up to {_MAX_AXES} sizes and 2 offsets. Download it again."
        )
    start, stop = offsets
    expected = math.prod(shape) * _TYPES[dtype].nbytes
    if stop - start != expected:
        raise CheckpointError(
            f"{file.path}: {name} has {stop - start} bytes, but {shape} of {dtype} are {expected}; download it again."
        )
    return start, stop


def _are_naturals(values: Any) -> bool:
    """Whether `values` is a list of sizes or offsets."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_NUMBER for value in values)


def _check_coverage(file: Storage, ranges: Mapping[str, tuple[int, int]], base: int) -> None:
    """Raise CheckpointError unless the ranges cover the file from `base` to its end, once."""
    position = 0
    for name, (start, stop) in sorted(ranges.items(), key=lambda item: item[1]):
        if start != position:
            raise CheckpointError(
                f"{file.path}: {name} begins at byte {start} of the data, expected {position}; download it again."
            )
        position = stop
    if base + position != file.size:
        raise CheckpointError(
            f"{file.path}: its tensors end at byte {base + position}, the file has {file.size}; download it again."
        )


def read_json(path: Place) -> dict[str, Any]:
    """The JSON object in a small file; raises CheckpointError where it is none."""
    file = open_storage(path)
    if file.size > _MAX_JSON:
        raise CheckpointError(f"{path}: has {file.size} bytes, expected at most {_MAX_JSON}; download it again.")
    return _read_object(file.text(), path)


def _read_object(text: bytes | str, path: Place, what: str = "the file") -> dict[str, Any]:
    """The JSON object in `text`, which `what` names in messages: UTF-8, and no name twice; else CheckpointError."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is a {type(value).__name__}, expected an object; download it again.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where a name stands in it twice or has half a character (a lone surrogate)."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} stands in it twice")
        name.encode()
        found[name] = value
    return found


def layout(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    """One file of the parts of `entries`, the widest numbers first so that all are aligned; late parts before them."""
    late = {entry.name: part for entry in entries for part in entry.parts if part.late}
    others = [(entry, number) for entry in entries for number, part in enumerate(entry.parts) if not part.late]
    others.sort(key=lambda other: -other[0].parts[other[1]].dtype.nbytes)
    parts = [entry.parts[number] for entry, number in others]
    head = _Head(late, parts, metadata)
    *starts, end = itertools.accumulate((part.nbytes for part in parts), initial=head.size)
    slots = tuple(Slot(entry, start, number) for (entry, number), start in zip(others, starts, strict=True))

    def make(written: Sequence[Digest]) -> bytes:
        """The head, once every slot is written."""
        texts = {slot.entry.name: digest.text for slot, digest in zip(slots, written, strict=True) if digest.text}
        return head.made({name: texts[name].encode() for name in late})

    if late:
        return FileLayout(name, end, (), slots, (Late(0, head.size, make),))
    return FileLayout(name, end, ((0, head.made({})),), slots)


@dataclass(frozen=True)
class _Head:
    """What stands before the parts whose size is known: the header and, behind it, the late parts, which are texts.

        | length: u64 | header's JSON, spaces | late text | late text | parts ...

    A text may turn out shorter than its part. Then more spaces end the header, and the parts stay where they are.
    """

    late: Mapping[str, Part]  # by the entry's name, each at its longest
    parts: Sequence[Part]
    metadata: Mapping[str, str]

    @cached_property
    def size(self) -> int:
        """Bytes up to the parts: enough for the longest texts, and a multiple of 8."""
        longest = list(self.late.values())
        needed = 8 + len(_header_of((*longest, *self.parts), self.metadata)) + sum(part.nbytes for part in longest)
        return needed + -needed % ALIGNMENT

    def made(self, texts: Mapping[str, bytes]) -> bytes:
        """Its bytes, `size` in all, when the late parts hold these texts by the entry's name."""
        late = [replace(part, shape=(len(texts[name]),)) for name, part in self.late.items()]
        tail = b"".join(texts[name] for name in self.late)
        header = _header_of((*late, *self.parts), self.metadata).ljust(self.size - 8 - len(tail))
        return len(header).to_bytes(8, "little") + header + tail


def _header_of(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header whose tensors follow each other."""
    borders = itertools.accumulate((part.nbytes for part in parts), initial=0)
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    for part, offsets in zip(parts, itertools.pairwise(borders), strict=True):
        header[part.name] = {"dtype": part.dtype.name, "shape": list(part.shape), "data_offsets": list(offsets)}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

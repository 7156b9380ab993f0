"""Safetensors: 8 bytes of header length, a JSON header of names, types, shapes and byte ranges, then the bytes.

    {"__metadata__": {...}, "name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Ranges count from the end of the header, and cover the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neoxconv.core.encoding import Part
from neoxconv.core.layout import Digest, Entry, FileLayout, Late, Slot
from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor, stored
from neoxconv.dtypes import STORED
from neoxconv.errors import CheckpointError
from neoxconv.storage.files import Storage, open_storage
from neoxconv.storage.remote import Place

MAX_HEADER = 100 << 20
MAX_JSON = 16 << 20  # of a file beside the weights
MAX_NAME = 1024  # characters: what a message can show
METADATA = "__metadata__"
ALIGNMENT = 8


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors unread, free text, and the SHA-256 of the header."""

    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    checksum: str


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
    header = read_object(text, file.path, "its header")
    metadata = checked_metadata(file, header.pop(METADATA, None))
    ranges = {name: checked_range(file, name, entry) for name, entry in header.items()}
    check_coverage(file, ranges, 8 + length)
    tensors = {
        name: stored(file, 8 + length + start, header[name]["shape"], STORED[header[name]["dtype"]])
        for name, (start, _) in ranges.items()
    }
    return Header(tensors, metadata, hashlib.sha256(text).hexdigest())


def read_object(text: bytes | str, path: Place, what: str = "the file") -> dict[str, Any]:
    """The JSON object in `text`, which `what` names in messages: UTF-8, and no name twice; else CheckpointError."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is a {type(value).__name__}, expected an object; download it again.")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where a name stands in it twice or has half a character (a lone surrogate)."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} stands in it twice")
        name.encode()
        found[name] = value
    return found


def checked_metadata(file: Storage, found: Any) -> dict[str, str]:
    """The free text of a header, if it is text."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{file.path}: {METADATA} is {reprlib.repr(found)}, expected texts; download it again.")
    return found


def checked_range(file: Storage, name: str, entry: Any) -> tuple[int, int]:
    """A tensor's byte range, if its type is known and its shape fills it exactly."""
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{file.path}: {name[:80]}... is a name of {len(name)} characters; download it again.")
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in STORED:
        raise CheckpointError(
            f"{file.path}: {name} is of type {reprlib.repr(dtype)}, which cannot be read yet; "
            f"expected one of {', '.join(STORED)}. Convert it to one of them first."
        )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers) or len(offsets) != 2 or len(shape) > 16:
        raise CheckpointError(
            f"{file.path}: {name} has shape {reprlib.repr(shape)} and byte range {reprlib.repr(offsets)}; "
            "expected up to 16 sizes and 2 offsets. Download it again."
        )
    start, stop = offsets
    if stop - start != math.prod(shape) * STORED[dtype].nbytes:
        raise CheckpointError(
            f"{file.path}: {name} has {stop - start} bytes, but {shape} of {dtype} are "
            f"{math.prod(shape) * STORED[dtype].nbytes}; download it again."
        )
    return start, stop


def check_coverage(file: Storage, entries: Mapping[str, tuple[int, int]], base: int) -> None:
    """Raise CheckpointError unless the ranges cover the file from `base` to its end, once."""
    position = 0
    for name, (start, stop) in sorted(entries.items(), key=lambda item: item[1]):
        if start != position:
            raise CheckpointError(
                f"{file.path}: {name} begins at byte {start} of the data, expected {position}; download it again."
            )
        position = stop
    if base + position != file.size:
        raise CheckpointError(
            f"{file.path}: its tensors end at byte {base + position}, the file has {file.size}; download it again."
        )


def index(path: Place) -> Index:
    """Index a single file; its settings come from config.json beside it, or from its own metadata."""
    file = open_storage(path)
    header = read_header(file)
    beside = path.parent / "config.json"
    if beside.is_file():
        settings = read_json(beside)
    else:
        settings = read_object(header.metadata.get("config", "{}"), path, "the config in its metadata")
    return Index(
        "safetensors", path.parent, (SourceFile(file, header.checksum),), (header.tensors,), settings, single=True
    )


def read_json(path: Place) -> dict[str, Any]:
    """The JSON object in a small file."""
    file = open_storage(path)
    if file.size > MAX_JSON:
        raise CheckpointError(f"{path}: has {file.size} bytes, expected at most {MAX_JSON}; download it again.")
    return read_object(file.text(), path)


def layout(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    """One file of the parts of `entries`, the widest numbers first so that all are aligned.

    Late parts stand before the others, and the header ends where they begin: when one is shorter than it might have
    been, more spaces end the header, and nothing else has another place.
    """
    places = [(entry, number, part) for entry in entries for number, part in enumerate(entry.parts)]
    late = [(entry, part) for entry, _, part in places if part.late]
    others = sorted((place for place in places if not place[2].late), key=lambda place: -place[2].dtype.nbytes)
    parts = [part for *_, part in others]

    def start(texts: Sequence[Part]) -> bytes:
        """The header's JSON when the late parts are `texts`."""
        return header_of((*texts, *parts), metadata)

    longest = [part for _, part in late]
    data = 8 + len(start(longest)) + sum(part.nbytes for part in longest)
    data += -data % ALIGNMENT

    def made(written: Sequence[Digest]) -> bytes:
        """All that stands before the other parts."""
        told = {slot.entry.name: digest.text for slot, digest in zip(slots, written, strict=True) if digest.text}
        texts = [told[entry.name].encode() for entry, _ in late]
        tail = b"".join(texts)
        named = [replace(part, shape=(len(text),)) for (_, part), text in zip(late, texts, strict=True)]
        header = start(named).ljust(data - 8 - len(tail))
        return len(header).to_bytes(8, "little") + header + tail

    offsets = [data, *(data + end for end in itertools.accumulate(part.nbytes for part in parts))]
    slots = tuple(Slot(entry, at, number) for (entry, number, _), at in zip(others, offsets, strict=False))
    if late:
        return FileLayout(name, offsets[-1], (), slots, (Late(0, data, made),))
    return FileLayout(name, offsets[-1], ((0, made([Digest("")] * len(slots))),), slots)


def header_of(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header whose tensors follow each other."""
    ends = [0, *itertools.accumulate(part.nbytes for part in parts)]
    header: dict[str, Any] = {METADATA: dict(metadata)}
    for part, start, end in zip(parts, ends, ends[1:], strict=False):
        header[part.name] = {"dtype": part.dtype.name, "shape": list(part.shape), "data_offsets": [start, end]}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

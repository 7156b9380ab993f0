"""Safetensors: 8 bytes of header length, a JSON header of names, types, shapes and byte ranges, then the bytes.

    {"__metadata__": {...}, "name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Ranges count from the end of the header, and cover the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.dtypes import PLAIN
from neoxconv.errors import CheckpointError
from neoxconv.model import Entry, FileLayout, Index, Slot, SourceFile
from neoxconv.storage import Storage, open_storage
from neoxconv.tensor import LazyTensor, stored

MAX_HEADER = 100 << 20
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
    length = int.from_bytes(file.text(0, 8), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path}: is not a safetensors file, or is cut short: its header claims {length} bytes, "
            f"the file has {file.size}; download it again."
        )
    text = file.text(8, length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: its header is damaged ({error}); download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: its header is a {type(header).__name__}, expected an object.")
    metadata = header.pop(METADATA, {})
    entries = {name: checked_range(file, name, entry) for name, entry in header.items()}
    check_coverage(file, entries, 8 + length)
    tensors = {
        name: stored(file, 8 + length + start, header[name]["shape"], PLAIN[header[name]["dtype"]])
        for name, (start, _) in entries.items()
    }
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return Header(tensors, {str(k): str(v) for k, v in texts}, hashlib.sha256(text).hexdigest())


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no name stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def checked_range(file: Storage, name: str, entry: Any) -> tuple[int, int]:
    """A tensor's byte range, if its type is known and its shape fills it exactly."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in PLAIN:
        raise CheckpointError(f"{file.path}: {name} is of type {dtype}; expected one of {', '.join(PLAIN)}.")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers) or len(offsets) != 2 or len(shape) > 16:
        raise CheckpointError(f"{file.path}: {name} has shape {shape} and byte range {offsets}; download it again.")
    start, stop = offsets
    if stop - start != math.prod(shape) * PLAIN[dtype].nbytes:
        raise CheckpointError(
            f"{file.path}: {name} has {stop - start} bytes, but {shape} of {dtype} are "
            f"{math.prod(shape) * PLAIN[dtype].nbytes}; download it again."
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


def index(path: Path) -> Index:
    """Index a single file; its settings come from config.json beside it, or from its own metadata."""
    file = open_storage(path)
    header = read_header(file)
    beside = path.parent / "config.json"
    text = open_storage(beside).text() if beside.is_file() else header.metadata.get("config", "{}")
    settings = read_object(text, beside if beside.is_file() else path)
    return Index("safetensors", path.parent, (SourceFile(file, header.checksum),), (header.tensors,), settings)


def read_object(text: bytes | str, path: Path) -> dict[str, Any]:
    """A JSON object from a small file; raises CheckpointError where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object.")
    return value


def layout(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    """One file of `entries`, the widest numbers first so that all are aligned; the header ends at a multiple of 8."""
    ordered = sorted(entries, key=lambda entry: -entry.encoding.dtype.nbytes)
    header: dict[str, Any] = {METADATA: dict(metadata)}
    position, starts = 0, []
    for entry in ordered:
        end = position + entry.nbytes
        header[entry.name] = {
            "dtype": entry.encoding.dtype.name,
            "shape": list(entry.tensor.shape),
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    base = 8 + len(text)
    slots = tuple(Slot(entry, base + start) for entry, start in zip(ordered, starts, strict=True))
    return FileLayout(name, base + position, ((0, len(text).to_bytes(8, "little") + text),), slots)

"""What a zip says of its own bytes: where each record lies and its CRC-32, told twice; and the tensors on it."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neoxconv.formats.pt.tensors import Place
from neoxconv.formats.pt.unpickle import load_pickle
from neoxconv.formats.pt.zips import FULL, LOCAL, Central, locate, read_directory, read_headers, read_pickle
from neoxconv.storage.files import Storage

DESCRIBED = 8  # the flag of members whose CRC-32 and size stand behind their bytes
DESCRIPTORS = {"<4s3I": FULL, "<4sI2Q": 1 << 64}  # how they stand there, and the largest size it can tell
WIDEST = 24


@dataclass(frozen=True)
class ZipRecord:
    """A member of a zip: its bytes begin at `offset`; without a CRC-32 its header says 0."""

    header: Central
    offset: int

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def crc32(self) -> int:
        return self.header.crc32


def records_of(file: Storage) -> list[ZipRecord]:
    """Every member of a zip, storages or not, as its directory and its local headers place it."""
    headers, _, limit = read_headers(file)
    return [ZipRecord(header, locate(file, header, limit).offset) for header in headers]


def contradicted(file: Storage, record: ZipRecord) -> bool:
    """Whether the local header, or the descriptor behind the bytes, says otherwise than the directory."""
    header, described = record.header, record.header.repeated[0] & DESCRIBED
    local = LOCAL.unpack(file.text(header.offset, LOCAL.size))
    told = [(header.crc32, size, size) for size in (min(header.size, FULL), FULL)]
    told += [(0, size, size) for size in (0, FULL)] if described else []
    if local[2:6] != header.repeated or local[6:9] not in told:
        return True
    return bool(described) and not is_described(file, record)


def is_described(file: Storage, record: ZipRecord) -> bool:
    """Whether CRC-32 and size stand behind a member's bytes, the size in 4 bytes or in 8."""
    header, end = record.header, record.offset + record.size
    text = file.text(end, min(WIDEST, file.size - end))
    numbers = b"PK\x07\x08", header.crc32, header.size, header.size
    return any(
        text.startswith(struct.pack(form, *numbers)) for form, most in DESCRIPTORS.items() if header.size <= most
    )


def tensors_on(file: Storage) -> dict[str, list[str]]:
    """The tensors on each record by the record's name, as paths into the file's value joined by dots."""
    root, text = read_pickle(file, read_directory(file)[0])
    found: dict[str, list[str]] = {}
    for path, place in places(load_pickle(io.BytesIO(text), Place, str(file.path))):
        found.setdefault(f"{root}data/{place.ref.key}", []).append(path)
    return found


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Place]]:
    """Every tensor in a value, and the keys that lead to it."""
    if isinstance(value, Place):
        yield ".".join(path), value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, str(key)))

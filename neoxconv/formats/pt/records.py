"""What a zip says of its own bytes: where each record lies and its CRC-32, told twice; and the tensors on it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neoxconv.formats.pt import zip_headers as headers
from neoxconv.formats.pt.tensors import View
from neoxconv.formats.pt.unpickle import load_pickle
from neoxconv.formats.pt.zips import DirectoryEntry, locate, read_directory, read_entries, read_pickle
from neoxconv.storage import Storage


@dataclass(frozen=True)
class ZipRecord:
    """A member of a zip: its bytes begin at `offset`; without a CRC-32 the directory says 0."""

    entry: DirectoryEntry
    offset: int

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def size(self) -> int:
        return self.entry.size

    @property
    def crc32(self) -> int:
        return self.entry.crc32


def records_of(file: Storage) -> list[ZipRecord]:
    """Every member of a zip, storages or not, as its directory and its local headers place it.

    Raises CheckpointError where these are damaged.
    """
    entries, _, limit = read_entries(file)
    return [ZipRecord(entry, locate(file, entry, limit).offset) for entry in entries]


def contradicted(file: Storage, record: ZipRecord) -> bool:
    """Whether the local header, or the descriptor behind the bytes, says otherwise than the directory.

    The local header may leave sizes to its zip64 extra (FULL), or all to the descriptor (0), where there is one.
    """
    entry = record.entry
    described = bool(entry.repeated.flags & headers.DESCRIBED)
    local = headers.LocalHeader._make(headers.LOCAL.unpack(file.text(entry.offset, headers.LOCAL.size)))
    expected = [(entry.crc32, size, size) for size in (min(entry.size, headers.FULL), headers.FULL)]
    if described:
        expected += [(0, size, size) for size in (0, headers.FULL)]
    if local.repeated != entry.repeated or (local.crc32, local.packed, local.size) not in expected:
        return True
    return described and not _is_described(file, record)


def _is_described(file: Storage, record: ZipRecord) -> bool:
    """Whether CRC-32 and size stand behind a member's bytes, the size in 4 bytes or in 8."""
    end, size = record.offset + record.size, record.size
    text = file.text(end, min(headers.DESCRIPTOR64.size, file.size - end))
    forms = (headers.DESCRIPTOR, headers.DESCRIPTOR64) if size <= headers.FULL else (headers.DESCRIPTOR64,)
    return any(text.startswith(form.pack(headers.DESCRIPTOR_MARK, record.crc32, size, size)) for form in forms)


def tensors_on(file: Storage) -> dict[str, list[str]]:
    """The tensors on each record by the record's name, as paths into the file's value joined by dots.

    Raises CheckpointError where directory or pickle are damaged.
    """
    root, text = read_pickle(file, read_directory(file)[0])
    found: dict[str, list[str]] = {}
    for path, view in views(load_pickle(io.BytesIO(text), View, str(file.path))):
        found.setdefault(f"{root}data/{view.ref.key}", []).append(path)
    return found


def views(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, View]]:
    """Every tensor in a value, and the keys that lead to it, joined by dots."""
    if isinstance(value, View):
        yield ".".join(path), value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from views(item, (*path, str(key)))

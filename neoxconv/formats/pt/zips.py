"""The zip of a .pt file: its directory, its local headers and its pickle are read and cross-checked, no storage is.

Records must be stored, not compressed, and lie apart from each other, so that a tensor is a range of the file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError
from neoxconv.formats.pt import zip_headers as headers
from neoxconv.formats.pt.tensors import PtFile, Record, View, tensor_in
from neoxconv.formats.pt.unpickle import StorageRef, load_pickle
from neoxconv.storage import Storage

_MAX_PICKLE = 64 << 20  # bytes
_MAX_DIRECTORY = 64 << 20  # bytes
_MAX_MEMBERS = 200_000
_MAX_COMMENT = 0xFFFF  # bytes behind the last record


def read_zip(file: Storage) -> PtFile:
    """Index a zip: its directory, the local headers and the pickle are read, no storage is.

    Raises CheckpointError where they are damaged, contradict each other or are not torch's.
    """
    members, directory = read_directory(file)
    root, text = read_pickle(file, members)
    order = members.get(root + "byteorder")
    if order and file.text(order.offset, min(order.size, 16)) != b"little":
        raise CheckpointError(f"{file.path}: its numbers are not little-endian, which is not supported.")
    records = {name.removeprefix(root + "data/"): at for name, at in members.items() if name.startswith(root + "data/")}

    def make_tensor(ref: StorageRef, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        if ref.key not in records:
            raise ValueError(f"a tensor lies on storage {ref.key}, which the file does not hold")
        return tensor_in(file, records[ref.key], View(ref, offset, shape, stride))

    value = load_pickle(io.BytesIO(text), make_tensor, str(file.path))
    return PtFile(value, hashlib.sha256(directory + text).hexdigest(), records)


def read_directory(file: Storage) -> tuple[dict[str, Record], bytes]:
    """The members by name, each stored, whole, inside the file, apart from the others; and the directory's bytes.

    Raises CheckpointError where one is not.
    """
    entries, directory, limit = read_entries(file)
    members = {entry.name: locate(file, entry, limit) for entry in entries}
    if len(members) < len(entries):
        raise CheckpointError(f"{file.path}: holds a member twice; download it again.")
    _check_apart(file, entries, members)
    return members, directory


@dataclass(frozen=True)
class DirectoryEntry:
    """What the directory says of a member; its local header, which begins at `offset`, repeats a part of it."""

    name: str
    crc32: int
    size: int
    offset: int
    repeated: headers.Repeated


def read_entries(file: Storage) -> tuple[list[DirectoryEntry], bytes, int]:
    """The directory's entries, its bytes and where it begins. Raises CheckpointError where it is damaged."""
    told, end = _read_end(file)
    too_large = told.size > _MAX_DIRECTORY or told.members > _MAX_MEMBERS
    if too_large or told.members * headers.CENTRAL.size > told.size or told.offset + told.size != end:
        raise CheckpointError(
            f"{file.path}: is cut short or damaged: its zip directory claims {told.members} members in {told.size} "
            f"bytes at {told.offset}; download it again."
        )
    directory = file.text(told.offset, told.size)
    return list(_directory_entries(file, directory, told.members)), directory, told.offset


def _read_end(file: Storage) -> tuple[headers.Directory, int]:
    """What the records at the file's end say of the directory, and the byte where it must end."""
    cut = f"{file.path}: is cut short or damaged"
    tail_at = max(0, file.size - headers.END.size - _MAX_COMMENT)
    tail = file.text(tail_at, file.size - tail_at)
    at = tail.rfind(headers.END_MARK)
    if at < 0 or len(tail) - at < headers.END.size:
        raise CheckpointError(f"{cut}: it has no zip directory at its end; download it again.")
    record = headers.EndRecord._make(headers.END.unpack_from(tail, at))
    told, end = record.directory, tail_at + at
    if end + headers.END.size + record.comment_length != file.size:
        raise CheckpointError(f"{cut}: its zip does not end where the file does; download it again.")
    if at >= headers.LOCATOR64.size and tail.startswith(headers.LOCATOR64_MARK, at - headers.LOCATOR64.size):
        locator = headers.Locator64._make(headers.LOCATOR64.unpack_from(tail, at - headers.LOCATOR64.size))
        told, end = _read_end64(file, locator), locator.offset
    alone = told.disk == told.first_disk == 0 and told.members_here == told.members
    if not alone or not agree(record.directory, told):
        raise CheckpointError(f"{cut}: the records at its end contradict each other; download it again.")
    return told, end


def _read_end64(file: Storage, locator: headers.Locator64) -> headers.Directory:
    """What the zip64 record, to which its locator points, says of the directory."""
    cut = f"{file.path}: is cut short or damaged"
    text = file.text(locator.offset, headers.END64.size)
    if not text.startswith(headers.END64_MARK):
        raise CheckpointError(f"{cut}: its zip64 directory is not where it should be; download it again.")
    record = headers.End64Record._make(headers.END64.unpack(text))
    if (locator.disk, locator.disks, record.length) != (0, 1, headers.END64.size - 12):
        raise CheckpointError(f"{cut}: its zip64 directory is not alone; download it again.")
    return record.directory


def agree(narrow: headers.Directory, wide: headers.Directory) -> bool:
    """Whether the last record says what the zip64 one says, or leaves it to that."""
    return all(value in (full, widest) for value, full, widest in zip(narrow, wide, headers.WIDEST, strict=True))


def _directory_entries(file: Storage, directory: bytes, count: int) -> Iterator[DirectoryEntry]:
    """The directory's entries; raises CheckpointError for compressed, encrypted or malformed ones."""
    at = 0
    for _ in range(count):
        if at + headers.CENTRAL.size > len(directory) or not directory.startswith(headers.CENTRAL_MARK, at):
            raise CheckpointError(f"{file.path}: its zip directory is damaged; download it again.")
        header = headers.CentralHeader._make(headers.CENTRAL.unpack_from(directory, at))
        name_at = at + headers.CENTRAL.size
        extra_at = name_at + header.name_length
        comment_at = extra_at + header.extra_length
        name = directory[name_at:extra_at].decode("utf-8", "replace")
        size, packed, offset = _widened(header, directory[extra_at:comment_at])
        if header.method or header.flags & headers.ENCRYPTED or packed != size:
            raise CheckpointError(
                f"{file.path}: {name} is compressed or encrypted, which torch.save never does; download it again."
            )
        yield DirectoryEntry(name, header.crc32, size, offset, header.repeated)
        at = comment_at + header.comment_length
    if at != len(directory):
        raise CheckpointError(f"{file.path}: its zip directory is damaged; download it again.")


def _widened(header: headers.CentralHeader, extra: bytes) -> list[int]:
    """Size, packed size and offset; those that do not fit 32 bits from the zip64 extra field, in this order."""
    numbers: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == headers.ZIP64_EXTRA:
            body = extra[at + 4 : at + 4 + length]
            numbers = [number for (number,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        at += 4 + length
    narrow = (header.size, header.packed, header.offset)
    return [numbers.pop(0) if value == headers.FULL and numbers else value for value in narrow]


def locate(file: Storage, entry: DirectoryEntry, limit: int) -> Record:
    """Where a member's bytes begin, as its local header says.

    Raises CheckpointError where that header is not there, or the bytes end behind `limit`, where the directory begins.
    """
    lies = f"{file.path}: {entry.name} does not lie where the zip directory says"
    if entry.offset + headers.LOCAL.size > limit:
        raise CheckpointError(f"{lies}; the file is cut short or damaged, download it again.")
    text = file.text(entry.offset, min(headers.LOCAL.size + len(entry.name.encode()), limit - entry.offset))
    header, name = headers.LocalHeader._make(headers.LOCAL.unpack_from(text)), text[headers.LOCAL.size :]
    start = entry.offset + headers.LOCAL.size + header.name_length + header.extra_length
    same_name = name.decode("utf-8", "replace") == entry.name and header.name_length == len(name)
    if header.signature != headers.LOCAL_MARK or not same_name or start + entry.size > limit:
        raise CheckpointError(f"{lies}; the file is cut short or damaged, download it again.")
    return Record(start, entry.size, entry.crc32)


def _check_apart(file: Storage, entries: Sequence[DirectoryEntry], members: Mapping[str, Record]) -> None:
    """Raise CheckpointError where two members, local headers included, share bytes."""
    ends = {name: record.offset + record.size for name, record in members.items()}
    spans = sorted((entry.offset, ends[entry.name], entry.name) for entry in entries)
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise CheckpointError(f"{file.path}: {first} and {second} overlap; download it again.")


def read_pickle(file: Storage, members: Mapping[str, Record]) -> tuple[str, bytes]:
    """What stands before every member's name, and the pickle; raises CheckpointError where it is not as written."""
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.path}: is a zip with {len(pickles)} data.pkl, not a PyTorch file; download it again."
        )
    root, found = pickles[0].removesuffix("data.pkl"), members[pickles[0]]
    if found.size > _MAX_PICKLE:
        raise CheckpointError(f"{file.path}: its data.pkl has {found.size} bytes; at most {_MAX_PICKLE} are read.")
    text = file.text(found.offset, found.size)
    if found.crc32 and zlib.crc32(text) != found.crc32:  # 0: the writer computed none
        raise CheckpointError(
            f"{file.path}: its data.pkl does not have the CRC-32 that the zip holds; download it again."
        )
    return root, text

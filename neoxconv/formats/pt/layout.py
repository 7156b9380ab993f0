"""The layout of a .pt file: a zip of stored members, its CRC-32s late because only written bytes have one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from neoxconv.core.layout import Entry, FileLayout, Late, Slot
from neoxconv.formats.pt.pickling import TensorRef, dump_pickle
from neoxconv.formats.pt.unpickle import STORAGES
from neoxconv.formats.pt.zips import CENTRAL, END, END64, FULL, LOCAL, LOCATOR64

ALIGNMENT = 64


@dataclass(frozen=True)
class Member:
    """A record of a zip to be written: constant `data`, or the bytes of `entry`."""

    name: bytes
    data: bytes
    entry: Entry | None = None

    @property
    def size(self) -> int:
        return self.entry.nbytes if self.entry else len(self.data)

    @property
    def large(self) -> bool:
        return self.size >= FULL


def layout_pt(name: str, value: Any) -> FileLayout:
    """A .pt file that holds `value`: containers and plain values, with `Entry` leaves for tensors.

    It loads with torch.load(weights_only=True). Raises PlanError for what such a file cannot hold.
    """
    entries: list[Entry] = []
    classes = {dtype.name: storage for storage, dtype in reversed(STORAGES.items())}

    def refer(leaf: Any) -> TensorRef | None:
        if not isinstance(leaf, Entry):
            return None
        entries.append(leaf)
        return TensorRef(str(len(entries) - 1), classes[leaf.encoding.dtype.name], leaf.tensor.shape)

    root = PurePosixPath(name).stem
    pickled = dump_pickle(value, refer, name)
    members = [
        Member(f"{root}/data.pkl".encode(), pickled),
        Member(f"{root}/byteorder".encode(), b"little"),
        *(Member(f"{root}/data/{number}".encode(), b"", entry) for number, entry in enumerate(entries)),
        Member(f"{root}/version".encode(), b"3\n"),
    ]
    return layout_zip(name, members)


def layout_zip(name: str, members: Sequence[Member]) -> FileLayout:
    """A zip of stored members, each aligned to 64 bytes; CRC-32s of entries stand in late ranges behind their bytes."""
    pieces: list[tuple[int, bytes]] = []
    slots: list[Slot] = []
    late: list[Late] = []
    offsets: list[int] = []
    position = 0
    for member in members:
        offsets.append(position)
        header = local_header(member, position)
        pieces.append((position, header))
        position += len(header)
        trailer = descriptor_size(member)
        if member.entry:
            slots.append(Slot(member.entry, position))
            late.append(Late(position + member.size, trailer, late_descriptor(member, len(slots) - 1)))
        else:
            pieces.append((position, member.data + descriptor(member, zlib.crc32(member.data))))
        position += member.size + trailer
    directory = directory_of(members, offsets, position, [0] * len(slots))
    late.append(Late(position, len(directory), late_directory(members, offsets, position)))
    return FileLayout(name, position + len(directory), tuple(pieces), tuple(slots), tuple(late), crcs=True)


def late_descriptor(member: Member, number: int) -> Any:
    """The function that makes the descriptor of the file's entry `number`."""
    return lambda written: descriptor(member, written[number].crc32)


def late_directory(members: Sequence[Member], offsets: Sequence[int], position: int) -> Any:
    """The function that makes the directory."""
    return lambda written: directory_of(members, offsets, position, [digest.crc32 for digest in written])


def local_header(member: Member, position: int) -> bytes:
    """A member's header, padded so that its bytes begin at a multiple of 64; sizes follow behind the bytes."""
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if member.large else b""
    start = position + LOCAL.size + len(member.name) + len(extra) + 4
    padding = -start % ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    sizes = (FULL, FULL) if member.large else (0, 0)
    fixed = LOCAL.pack(b"PK\x03\x04", 45 if member.large else 20, 8, 0, 0, 0, 0, *sizes, len(member.name), len(extra))
    return fixed + member.name + extra


def descriptor_size(member: Member) -> int:
    return 24 if member.large else 16


def descriptor(member: Member, crc32: int) -> bytes:
    """What stands behind a member's bytes: their CRC-32 and size."""
    return struct.pack("<4sI2Q" if member.large else "<4s3I", b"PK\x07\x08", crc32, member.size, member.size)


def directory_of(members: Sequence[Member], offsets: Sequence[int], position: int, crcs: Sequence[int]) -> bytes:
    """The central directory and the end records; zip64 ones where a size or an offset needs them."""
    left = iter(crcs)
    entries = b"".join(
        central_header(member, offset, next(left) if member.entry else zlib.crc32(member.data))
        for member, offset in zip(members, offsets, strict=True)
    )
    count, end64 = len(members), b""
    if position + len(entries) >= FULL or count >= 0xFFFF:
        end64 = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, len(entries), position)
        end64 += LOCATOR64.pack(b"PK\x06\x07", 0, position + len(entries), 1)
    short = min(count, 0xFFFF)
    end = END.pack(b"PK\x05\x06", 0, 0, short, short, len(entries), min(position, FULL), 0)
    return entries + end64 + end


def central_header(member: Member, offset: int, crc32: int) -> bytes:
    """A member's entry in the directory."""
    values = (member.size, member.size, offset)
    extra = b"".join(struct.pack("<Q", value) for value in values if value >= FULL)
    extra = struct.pack("<2H", 1, len(extra)) + extra if extra else b""
    size, packed, at = (min(value, FULL) for value in values)
    version = 45 if extra else 20
    fixed = CENTRAL.pack(
        b"PK\x01\x02", version, version, 8, 0, 0, 0, crc32, packed, size, len(member.name), len(extra), 0, 0, 0, 0, at
    )
    return fixed + member.name + extra

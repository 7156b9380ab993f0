"""The layout of a .pt file: a zip of stored members, its CRC-32s late because only written bytes have one.

    LocalHeader, name, padding | bytes of data.pkl | descriptor
    LocalHeader, name, padding | bytes of tensor 0 | descriptor (late)
    ...
    directory and end records (late)

Each member's bytes begin at a multiple of 64, as caffe2/serialize/inline_container.cc has it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from neoxconv.core.layout import Digest, Entry, FileLayout, Late, Slot
from neoxconv.formats.pt import zip_headers as headers
from neoxconv.formats.pt.pickling import TensorRef, dump_pickle
from neoxconv.formats.pt.unpickle import STORAGES

_ALIGNMENT = 64  # bytes
_VERSION, _VERSION64 = 20, 45  # of the specification, times ten, that a reader must know: zip64 came with 4.5


@dataclass(frozen=True)
class _Member:
    """A record of a zip to be written: constant `data`, or the bytes of `entry`."""

    name: bytes
    data: bytes
    entry: Entry | None = None

    @property
    def size(self) -> int:
        return self.entry.nbytes if self.entry else len(self.data)

    @property
    def large(self) -> bool:
        """Whether its size takes 8 bytes."""
        return self.size >= headers.FULL


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
        _Member(f"{root}/data.pkl".encode(), pickled),
        _Member(f"{root}/byteorder".encode(), b"little"),
        *(_Member(f"{root}/data/{number}".encode(), b"", entry) for number, entry in enumerate(entries)),
        _Member(f"{root}/version".encode(), b"3\n"),
    ]
    return _layout_zip(name, members)


def _layout_zip(name: str, members: Sequence[_Member]) -> FileLayout:
    """A zip of stored members, each aligned to 64 bytes; CRC-32s of entries stand in late ranges behind their bytes."""
    pieces: list[tuple[int, bytes]] = []
    slots: list[Slot] = []
    late: list[Late] = []
    offsets: list[int] = []
    position = 0
    for member in members:
        offsets.append(position)
        header = _local_header(member, position)
        pieces.append((position, header))
        position += len(header)
        trailer = _descriptor(member, zlib.crc32(member.data))
        if member.entry:
            slots.append(Slot(member.entry, position))
            late.append(Late(position + member.size, len(trailer), _late_descriptor(member, len(slots) - 1)))
        else:
            pieces.append((position, member.data + trailer))
        position += member.size + len(trailer)
    directory = _directory_of(members, offsets, position, [0] * len(slots))
    late.append(Late(position, len(directory), _late_directory(members, offsets, position)))
    return FileLayout(name, position + len(directory), tuple(pieces), tuple(slots), tuple(late), crcs=True)


def _late_descriptor(member: _Member, number: int) -> Callable[[Sequence[Digest]], bytes]:
    """The function that makes the descriptor of the file's entry `number`."""
    return lambda written: _descriptor(member, written[number].crc32)


def _late_directory(
    members: Sequence[_Member], offsets: Sequence[int], position: int
) -> Callable[[Sequence[Digest]], bytes]:
    """The function that makes the directory."""
    return lambda written: _directory_of(members, offsets, position, [digest.crc32 for digest in written])


def _local_header(member: _Member, position: int) -> bytes:
    """A member's header, padded so that its bytes begin at a multiple of 64; sizes follow behind the bytes."""
    extra = struct.pack("<2H2Q", headers.ZIP64_EXTRA, 16, 0, 0) if member.large else b""
    start = position + headers.LOCAL.size + len(member.name) + len(extra) + 4
    padding = -start % _ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    size = headers.FULL if member.large else 0
    header = headers.LocalHeader(
        version=_VERSION64 if member.large else _VERSION,
        flags=headers.DESCRIBED,
        packed=size,
        size=size,
        name_length=len(member.name),
        extra_length=len(extra),
    )
    return headers.LOCAL.pack(*header) + member.name + extra


def _descriptor(member: _Member, crc32: int) -> bytes:
    """What stands behind a member's bytes: their CRC-32 and size."""
    form = headers.DESCRIPTOR64 if member.large else headers.DESCRIPTOR
    return form.pack(headers.DESCRIPTOR_MARK, crc32, member.size, member.size)


def _directory_of(members: Sequence[_Member], offsets: Sequence[int], position: int, crcs: Sequence[int]) -> bytes:
    """The central directory and the end records; zip64 ones where a size or an offset needs them."""
    left = iter(crcs)
    entries = b"".join(
        _central_header(member, offset, next(left) if member.entry else zlib.crc32(member.data))
        for member, offset in zip(members, offsets, strict=True)
    )
    count, end64 = len(members), b""
    if position + len(entries) >= headers.FULL or count >= headers.MANY:
        record = headers.End64Record(
            made_by=_VERSION64,
            version=_VERSION64,
            members_here=count,
            members=count,
            size=len(entries),
            offset=position,
        )
        end64 = headers.END64.pack(*record) + headers.LOCATOR64.pack(*headers.Locator64(offset=position + len(entries)))
    narrow = min(count, headers.MANY)
    end = headers.EndRecord(members_here=narrow, members=narrow, size=len(entries), offset=min(position, headers.FULL))
    return entries + end64 + headers.END.pack(*end)


def _central_header(member: _Member, offset: int, crc32: int) -> bytes:
    """A member's entry in the directory."""
    values = (member.size, member.size, offset)
    extra = b"".join(struct.pack("<Q", value) for value in values if value >= headers.FULL)
    extra = struct.pack("<2H", headers.ZIP64_EXTRA, len(extra)) + extra if extra else b""
    version = _VERSION64 if extra else _VERSION
    header = headers.CentralHeader(
        made_by=version,
        version=version,
        flags=headers.DESCRIBED,
        crc32=crc32,
        packed=min(member.size, headers.FULL),
        size=min(member.size, headers.FULL),
        name_length=len(member.name),
        extra_length=len(extra),
        offset=min(offset, headers.FULL),
    )
    return headers.CENTRAL.pack(*header) + member.name + extra

"""The headers of a zip, field by field; all numbers are little-endian.

    for each member      LocalHeader, name, extra; its bytes; a descriptor where the flags say so
    the directory        for each member CentralHeader, name, extra, comment
    the end              EndRecord, comment; before it End64Record and Locator64 where a number takes more than 4 bytes

    descriptor           "PK\\x07\\x08" crc32:u32 packed:u32 size:u32, of large members packed:u64 size:u64
    extra                id:u16 length:u16 bytes, ...; behind id 1 those of size, packed, offset that are FULL, as u64

Source: PKWARE's APPNOTE.TXT, 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

FULL = 0xFFFFFFFF  # a field whose value stands in the zip64 extra
MANY = 0xFFFF  # a count whose value stands in the zip64 end record
ENCRYPTED, DESCRIBED = 1, 8  # flags: the bytes are encrypted; a descriptor follows them
ZIP64_EXTRA = 1
DESCRIPTOR_MARK = b"PK\x07\x08"
DESCRIPTOR, DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")


class Repeated(NamedTuple):
    """What a member's local header and its entry in the directory both say, in one spelling."""

    flags: int
    method: int  # 0: stored as it is
    time: int
    date: int


class LocalHeader(NamedTuple):
    """The fields of LOCAL."""

    signature: bytes = b"PK\x03\x04"
    version: int = 0  # needed to read it, times ten
    flags: int = 0
    method: int = 0
    time: int = 0
    date: int = 0
    crc32: int = 0
    packed: int = 0  # bytes in the file
    size: int = 0  # bytes when unpacked
    name_length: int = 0
    extra_length: int = 0

    @property
    def repeated(self) -> Repeated:
        return Repeated(self.flags, self.method, self.time, self.date)


class CentralHeader(NamedTuple):
    """The fields of CENTRAL."""

    signature: bytes = b"PK\x01\x02"
    made_by: int = 0
    version: int = 0
    flags: int = 0
    method: int = 0
    time: int = 0
    date: int = 0
    crc32: int = 0
    packed: int = 0
    size: int = 0
    name_length: int = 0
    extra_length: int = 0
    comment_length: int = 0
    disk: int = 0
    internal: int = 0  # attributes
    external: int = 0
    offset: int = 0  # of the local header

    @property
    def repeated(self) -> Repeated:
        return Repeated(self.flags, self.method, self.time, self.date)


class Directory(NamedTuple):
    """What an end record says of the directory."""

    disk: int
    first_disk: int
    members_here: int
    members: int
    size: int
    offset: int


# The most that END can say; it leaves what is larger to END64.
WIDEST = Directory(MANY, MANY, MANY, MANY, FULL, FULL)


class EndRecord(NamedTuple):
    """The fields of END."""

    signature: bytes = b"PK\x05\x06"
    disk: int = 0
    first_disk: int = 0
    members_here: int = 0
    members: int = 0
    size: int = 0
    offset: int = 0
    comment_length: int = 0

    @property
    def directory(self) -> Directory:
        return Directory(self.disk, self.first_disk, self.members_here, self.members, self.size, self.offset)


class End64Record(NamedTuple):
    """The fields of END64."""

    signature: bytes = b"PK\x06\x06"
    length: int = END64.size - 12  # of what follows this field
    made_by: int = 0
    version: int = 0
    disk: int = 0
    first_disk: int = 0
    members_here: int = 0
    members: int = 0
    size: int = 0
    offset: int = 0

    @property
    def directory(self) -> Directory:
        return Directory(self.disk, self.first_disk, self.members_here, self.members, self.size, self.offset)


class Locator64(NamedTuple):
    """The fields of LOCATOR64."""

    signature: bytes = b"PK\x06\x07"
    disk: int = 0
    offset: int = 0  # of END64
    disks: int = 1


# What the headers begin with.
LOCAL_MARK, CENTRAL_MARK = LocalHeader().signature, CentralHeader().signature
END_MARK, END64_MARK, LOCATOR64_MARK = EndRecord().signature, End64Record().signature, Locator64().signature

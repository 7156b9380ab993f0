"""The zip of a .pt file: its directory, its local headers and its pickle are read and cross-checked, no storage is."""

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
from neoxconv.formats.pt.tensors import Place, PtFile, Record, tensor_in
from neoxconv.formats.pt.unpickle import StorageRef, load_pickle
from neoxconv.storage.files import Storage

MAX_PICKLE = 64 << 20
MAX_DIRECTORY = 64 << 20
MAX_MEMBERS = 200_000

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
FULL = 0xFFFFFFFF  # a field whose value stands in the zip64 extra
WIDEST = (0xFFFF,) * 4 + (FULL,) * 2  # the fields of the last record when it leaves them to the zip64 one


def read_zip(file: Storage) -> PtFile:
    """Index a zip: its directory, the local headers and the pickle are read, no storage is."""
    members, directory = read_directory(file)
    root, text = read_pickle(file, members)
    order = members.get(root + "byteorder")
    if order and file.text(order.offset, min(order.size, 16)) != b"little":
        raise CheckpointError(f"{file.path}: its numbers are not little-endian, which is not supported.")
    records = {name.removeprefix(root + "data/"): at for name, at in members.items() if name.startswith(root + "data/")}

    def make_tensor(ref: StorageRef, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        if ref.key not in records:
            raise ValueError(f"a tensor lies on storage {ref.key}, which the file does not hold")
        return tensor_in(file, records[ref.key], Place(ref, offset, shape, stride))

    value = load_pickle(io.BytesIO(text), make_tensor, str(file.path))
    return PtFile(value, hashlib.sha256(directory + text).hexdigest(), records)


def read_pickle(file: Storage, members: Mapping[str, Record]) -> tuple[str, bytes]:
    """What stands before every member's name, and the pickle; raises CheckpointError where it is not as written."""
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.path}: is a zip with {len(pickles)} data.pkl, not a PyTorch file; download it again."
        )
    root, found = pickles[0].removesuffix("data.pkl"), members[pickles[0]]
    if found.size > MAX_PICKLE:
        raise CheckpointError(f"{file.path}: its data.pkl has {found.size} bytes; at most {MAX_PICKLE} are read.")
    text = file.text(found.offset, found.size)
    if found.crc32 and zlib.crc32(text) != found.crc32:
        raise CheckpointError(
            f"{file.path}: its data.pkl does not have the CRC-32 that the zip holds; download it again."
        )
    return root, text


def read_directory(file: Storage) -> tuple[dict[str, Record], bytes]:
    """The members by name, each stored, whole, inside the file, apart from the others; and the directory's bytes."""
    headers, directory, limit = read_headers(file)
    members = {header.name: locate(file, header, limit) for header in headers}
    if len(members) < len(headers):
        raise CheckpointError(f"{file.path}: holds a member twice; download it again.")
    check_apart(file, headers, members)
    return members, directory


def read_headers(file: Storage) -> tuple[list[Central], bytes, int]:
    """The directory's entries, its bytes and where it begins."""
    cut = f"{file.path}: is cut short or damaged"
    tail_size = min(file.size, END.size + 0xFFFF)
    tail = file.text(file.size - tail_size, tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < END.size:
        raise CheckpointError(f"{cut}: it has no zip directory at its end; download it again.")
    *short, comment = END.unpack_from(tail, at)[1:]
    told = short
    end = file.size - tail_size + at
    if end + END.size + comment != file.size:
        raise CheckpointError(f"{cut}: its zip does not end where the file does; download it again.")
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size :][:4] == b"PK\x06\x07":
        _, disk, end, disks = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)
        wide_end = file.text(end, END64.size)
        if wide_end[:4] != b"PK\x06\x06":
            raise CheckpointError(f"{cut}: its zip64 directory is not where it should be; download it again.")
        _, length, _, _, *told = END64.unpack(wide_end)
        if (disk, disks, length) != (0, 1, END64.size - 12):
            raise CheckpointError(f"{cut}: its zip64 directory is not alone; download it again.")
    if told[:2] != [0, 0] or told[2] != told[3] or any(map(differ, short, told, WIDEST)):
        raise CheckpointError(f"{cut}: the records at its end contradict each other; download it again.")
    count, size, offset = told[3:]
    if size > MAX_DIRECTORY or count > MAX_MEMBERS or count * CENTRAL.size > size or offset + size != end:
        raise CheckpointError(
            f"{cut}: its zip directory claims {count} members in {size} bytes at {offset}; download it again."
        )
    directory = file.text(offset, size)
    return list(central_entries(file, directory, count)), directory, offset


def differ(short: int, wide: int, widest: int) -> bool:
    """Whether a field says otherwise than its zip64 double; it may leave it to that."""
    return short not in (wide, widest)


@dataclass(frozen=True)
class Central:
    """What the directory says of a member; `repeated` (flags, method, time, date) stands in its local header too."""

    name: str
    crc32: int
    size: int
    offset: int
    repeated: tuple[int, ...]


def central_entries(file: Storage, directory: bytes, count: int) -> Iterator[Central]:
    """The directory's entries; raises CheckpointError for compressed, encrypted or malformed ones."""
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\x01\x02":
            raise CheckpointError(f"{file.path}: its zip directory is damaged; download it again.")
        fields = CENTRAL.unpack_from(directory, at)
        flags, method, crc, packed, size, name_length, extra_length, comment_length, offset = (
            *fields[3:5], *fields[7:13], fields[16]
        )  # fmt: skip
        at += CENTRAL.size
        name = directory[at : at + name_length].decode("utf-8", "replace")
        extra = directory[at + name_length : at + name_length + extra_length]
        size, packed, offset = wide(extra, (size, packed, offset))
        if method or flags & 1 or packed != size:
            raise CheckpointError(
                f"{file.path}: {name} is compressed or encrypted, which torch.save never does; download it again."
            )
        yield Central(name, crc, size, offset, fields[3:7])
        at += name_length + extra_length + comment_length
    if at != len(directory):
        raise CheckpointError(f"{file.path}: its zip directory is damaged; download it again.")


def wide(extra: bytes, values: tuple[int, ...]) -> list[int]:
    """Size, packed size and offset, those that do not fit 32 bits from the zip64 extra field."""
    numbers: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            numbers = [number for (number,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        at += 4 + length
    return [numbers.pop(0) if value == FULL and numbers else value for value in values]


def locate(file: Storage, header: Central, limit: int) -> Record:
    """Where a member's bytes begin, as its local header says; they must end before the directory."""
    lies = f"{file.path}: {header.name} does not lie where the zip directory says"
    if header.offset + LOCAL.size > limit:
        raise CheckpointError(f"{lies}; the file is cut short or damaged, download it again.")
    local = file.text(header.offset, min(LOCAL.size + len(header.name.encode()), limit - header.offset))
    fields, name = LOCAL.unpack_from(local), local[LOCAL.size :]
    start = header.offset + LOCAL.size + fields[9] + fields[10]
    whole = fields[0] == b"PK\x03\x04" and name.decode("utf-8", "replace") == header.name and fields[9] == len(name)
    if not whole or start + header.size > limit:
        raise CheckpointError(f"{lies}; the file is cut short or damaged, download it again.")
    return Record(start, header.size, header.crc32)


def check_apart(file: Storage, headers: Sequence[Central], members: dict[str, Record]) -> None:
    """Raise CheckpointError where two members, local headers included, share bytes."""
    ends = {name: record.offset + record.size for name, record in members.items()}
    spans = sorted((header.offset, ends[header.name], header.name) for header in headers)
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise CheckpointError(f"{file.path}: {first} and {second} overlap; download it again.")

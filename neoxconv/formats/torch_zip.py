"""A .pt file as byte ranges, and the layout of one.

    <root>/data.pkl      the pickle: containers, and for each tensor a storage's key, an offset, a shape and strides
    <root>/data/<key>    a storage's numbers, stored uncompressed, at a multiple of 64 bytes
    <root>/version       "3", and in newer files a few more small records
    central directory    each record's place, size and CRC-32

Files older than torch 1.6 are no zips: five pickles, then each storage as a count and its bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from neoxconv.dtypes import Array
from neoxconv.errors import CheckpointError
from neoxconv.formats.pickles import STORAGES, StorageRef, TensorRef, dump_pickle, load_pickle
from neoxconv.model import Entry, FileLayout, Late, Slot
from neoxconv.storage import Storage
from neoxconv.tensor import LazyTensor, Read, stored

MAX_PICKLE = 64 << 20
MAX_DIRECTORY = 64 << 20
MAX_MEMBERS = 200_000
MAX_REPEATED = 1 << 24  # numbers of a tensor that repeats its storage's
MAX_AXES = 16
NEAR = 64 << 10  # bytes that are read at once, wanted or not
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ALIGNMENT = 64

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
FULL = 0xFFFFFFFF  # a field whose value stands in the zip64 extra


@dataclass(frozen=True)
class Record:
    """Where a member of the zip has its bytes, and their CRC-32; 0 where the writer computed none."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class PtFile:
    """A .pt file's value with tensors unread, a SHA-256 of what describes it, and its storages by key."""

    value: Any
    checksum: str
    records: dict[str, Record]


def read_pt(file: Storage) -> PtFile:
    """Index a file that torch.save wrote, zip or older; raises CheckpointError where it is neither, or is damaged."""
    start = file.text(0, min(64, file.size))
    if start[:2] == b"PK":
        return read_zip(file)
    if start[:1] == b"\x80":
        return read_legacy(file)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file.path}: is a git-lfs pointer, not the file itself; run `git lfs pull`.")
    raise CheckpointError(
        f"{file.path}: is not a PyTorch checkpoint: it begins with {start[:8]!r}, expected a zip (PK); "
        "download it again."
    )


def read_zip(file: Storage) -> PtFile:
    """Index a zip: its directory, the local headers and the pickle are read, no storage is."""
    members, directory = read_directory(file)
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


def read_directory(file: Storage) -> tuple[dict[str, Record], bytes]:
    """The members by name, each stored, whole, inside the file, apart from the others; and the directory's bytes."""
    cut = f"{file.path}: is cut short or damaged"
    tail_size = min(file.size, END.size + 0xFFFF)
    tail = file.text(file.size - tail_size, tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < END.size:
        raise CheckpointError(f"{cut}: it has no zip directory at its end; download it again.")
    _, _, _, _, count, size, offset, comment = END.unpack_from(tail, at)
    end = file.size - tail_size + at
    if end + END.size + comment != file.size:
        raise CheckpointError(f"{cut}: its zip does not end where the file does; download it again.")
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size :][:4] == b"PK\x06\x07":
        end = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)[2]
        wide_end = file.text(end, END64.size)
        if wide_end[:4] != b"PK\x06\x06":
            raise CheckpointError(f"{cut}: its zip64 directory is not where it should be; download it again.")
        count, size, offset = END64.unpack(wide_end)[7:]
    if size > MAX_DIRECTORY or count > MAX_MEMBERS or count * CENTRAL.size > size or offset + size != end:
        raise CheckpointError(
            f"{cut}: its zip directory claims {count} members in {size} bytes at {offset}; download it again."
        )
    directory = file.text(offset, size)
    headers = list(central_entries(file, directory, count))
    members = {header.name: locate(file, header, offset) for header in headers}
    if len(members) < count:
        raise CheckpointError(f"{file.path}: holds a member twice; download it again.")
    check_apart(file, headers, members)
    return members, directory


@dataclass(frozen=True)
class Central:
    """What the directory says of a member."""

    name: str
    crc32: int
    size: int
    offset: int


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
            raise CheckpointError(f"{file.path}: {name} is compressed or encrypted, which torch.save never does.")
        yield Central(name, crc, size, offset)
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


@dataclass(frozen=True)
class Place:
    """Where in a storage a tensor lies: `offset` and `stride` count numbers."""

    ref: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def tensor_in(file: Storage, record: Record, place: Place) -> LazyTensor:
    """The tensor at a place in a storage; raises ValueError where it would reach beyond it."""
    dtype, shape, stride = place.ref.dtype, place.shape, place.stride
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    first = place.ref.start + place.offset
    last = first + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last >= place.ref.numel or (last + 1) * dtype.nbytes > record.size):
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its storage {place.ref.key}")
    if math.prod(shape) > max(place.ref.numel, MAX_REPEATED) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of shape {list(shape)} is far larger than its storage {place.ref.key}")
    tensor = stored(file, record.offset + first * dtype.nbytes, shape, dtype)
    if 0 in shape or is_contiguous(shape, stride):
        return tensor
    return replace(tensor, read=strided(file, record.offset + first * dtype.nbytes, place))


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether rows follow each other without gaps."""
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(extent == 1 or step == want for extent, step, want in zip(shape, stride, wanted, strict=True))


def strided(file: Storage, base: int, place: Place) -> Read:
    """Rows of a tensor whose first number is byte `base`, whatever its strides: transposed, cut, repeated."""
    dtype = place.ref.dtype
    steps = tuple(step * dtype.nbytes for step in place.stride)

    def read(start: int, stop: int) -> Array:
        rows = np.empty((stop - start, *place.shape[1:]), dtype.stored)
        if rows.size:
            fill(rows, file, base + start * steps[0], steps)
        return rows

    return read


def fill(out: Array, file: Storage, offset: int, steps: tuple[int, ...]) -> None:
    """Copy numbers that lie `steps` bytes apart into `out`; where they lie far apart, one half after the other."""
    reach = [(extent - 1) * step for extent, step in zip(out.shape, steps, strict=True)]
    span = sum(reach) + out.itemsize
    if span <= max(NEAR, 2 * out.nbytes):
        out[...] = np.ndarray(out.shape, out.dtype, file.read(offset, span), 0, steps)
        return
    axis = reach.index(max(reach))
    middle = out.shape[axis] // 2
    first, second = np.split(out, [middle], axis)
    fill(first, file, offset, steps)
    fill(second, file, offset + middle * steps[axis], steps)


class Stream(io.RawIOBase):
    """A file as a stream, for pickles that lie one after the other."""

    def __init__(self, file: Storage) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.file.size - self.position)
        buffer[:count] = self.file.text(self.position, count)
        self.position += count
        return count


def read_legacy(file: Storage) -> PtFile:
    """Index a file older than the zips: magic number, protocol, system, value, storage keys, then the storages."""
    stream, name = io.BufferedReader(Stream(file), 1 << 16), str(file.path)
    records: dict[str, Record] = {}

    def nothing(*place: Any) -> None:
        raise ValueError("a tensor stands where there is none")

    if load_pickle(stream, nothing, name) != LEGACY_MAGIC or load_pickle(stream, nothing, name) != LEGACY_PROTOCOL:
        raise CheckpointError(f"{file.path}: is not a PyTorch file; download it again.")
    system = load_pickle(stream, nothing, name)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError(f"{file.path}: its numbers are not little-endian, which is not supported.")
    places: list[Place] = []

    def postpone(*place: Any) -> Place:
        places.append(Place(*place))
        return places[-1]

    value = load_pickle(stream, postpone, name)
    keys = load_pickle(stream, nothing, name)
    described = stream.tell()
    widths = {place.ref.key: place.ref.dtype.nbytes for place in places}
    position = described
    for key in keys if isinstance(keys, list) else []:
        if str(key) not in widths:
            raise CheckpointError(f"{file.path}: storage {key} holds numbers of a type that is not supported.")
        count = int.from_bytes(file.text(position, 8), "little")
        size = count * widths[str(key)]
        if position + 8 + size > file.size:
            raise CheckpointError(
                f"{file.path}: storage {key} claims {count} numbers beyond the file's end; download it again."
            )
        records[str(key)] = Record(position + 8, size, 0)
        position += 8 + size
    checksum = hashlib.sha256(file.text(0, min(described, MAX_PICKLE))).hexdigest()
    return PtFile(settle(value, file, records), checksum, records)


def settle(value: Any, file: Storage, records: dict[str, Record]) -> Any:
    """`value` with every place made a tensor."""
    if isinstance(value, Place):
        try:
            return tensor_in(file, records[value.ref.key], value)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file.path}: {error}; download it again.") from error
    if isinstance(value, dict):
        return type(value)((key, settle(item, file, records)) for key, item in value.items())
    if isinstance(value, list):
        return [settle(item, file, records) for item in value]
    return tuple(settle(item, file, records) for item in value) if type(value) is tuple else value


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
    late.append(Late(position, len(directory), lambda crcs: directory_of(members, offsets, position, crcs)))
    return FileLayout(name, position + len(directory), tuple(pieces), tuple(slots), tuple(late))


def late_descriptor(member: Member, number: int) -> Any:
    """The function that makes the descriptor of the file's entry `number`."""
    return lambda crcs: descriptor(member, crcs[number])


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

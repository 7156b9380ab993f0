"""GGUF: typed keys, then for each tensor a name, dimensions, a type and an offset, then the aligned tensors.

    "GGUF" version:u32 tensors:u64 keys:u64
    key:    name type:u32 value          string = length:u64 bytes; array = type:u32 count:u64 items
    tensor: name dims:u32 extents:u64... type:u32 offset:u64      extents from the fastest, offset from the data's start

This file reads; gguf_layout.py writes.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.dtypes import F16, PLAIN, DType
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.model import Index, SourceFile
from neoxconv.storage import Storage, open_storage
from neoxconv.tensor import LazyTensor, stored

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MAX_HEADER = 512 << 20
MAX_DIMS, MAX_DEPTH = 4, 3
CHUNK = 1 << 20


def block(number: int, name: str, weights: int, nbytes: int) -> tuple[int, DType]:
    """A block type under its number in ggml."""
    return number, DType(name, weights, nbytes, np.dtype(np.uint8))


TYPES: dict[int, DType] = dict(
    (
        *((number, PLAIN[name]) for number, name in (
            (0, "F32"), (1, "F16"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"), (28, "F64"), (30, "BF16"))),
        block(2, "Q4_0", 32, 18),
        block(3, "Q4_1", 32, 20),
        block(6, "Q5_0", 32, 22),
        block(7, "Q5_1", 32, 24),
        block(8, "Q8_0", 32, 34),
        block(10, "Q2_K", 256, 84),
        block(11, "Q3_K", 256, 110),
        block(12, "Q4_K", 256, 144),
        block(13, "Q5_K", 256, 176),
        block(14, "Q6_K", 256, 210),
        block(16, "IQ2_XXS", 256, 66),
        block(17, "IQ2_XS", 256, 74),
        block(18, "IQ3_XXS", 256, 98),
        block(19, "IQ1_S", 256, 50),
        block(20, "IQ4_NL", 32, 18),
        block(21, "IQ3_S", 256, 110),
        block(22, "IQ2_S", 256, 82),
        block(23, "IQ4_XS", 256, 136),
        block(29, "IQ1_M", 256, 56),
        block(34, "TQ1_0", 256, 54),
        block(35, "TQ2_0", 256, 66),
        block(39, "MXFP4", 32, 17),
        block(40, "NVFP4", 64, 36),
    )
)  # fmt: skip
NUMBERS = {dtype.name: number for number, dtype in TYPES.items()}

# The types of keys' values: struct's letters; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    keys: dict[str, Any]
    tensors: dict[str, LazyTensor]
    checksum: str


class Cursor:
    """Reads a header from front to back, in chunks, never beyond the file."""

    def __init__(self, file: Storage) -> None:
        self.file, self.buffer, self.position = file, b"", 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.position + count
        if count > self.file.size - self.position or end > MAX_HEADER:
            raise CheckpointError(
                f"{self.file.path}: its header claims {count} bytes at {self.position} of {self.file.size}; "
                "it is cut short or damaged, download it again."
            )
        if end > len(self.buffer):
            more = min(max(end, len(self.buffer) + CHUNK), self.file.size) - len(self.buffer)
            self.buffer += self.file.text(len(self.buffer), more)
        data, self.position = self.buffer[self.position : end], end
        return data

    def number(self, letter: str) -> Any:
        """The next number of a struct type."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def string(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        """The next value of a key's type."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth >= MAX_DEPTH:
            raise CheckpointError(f"{self.file.path}: a key has a value of the unknown type {kind}; download it again.")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            letter = SCALARS[inner]
            return [value for (value,) in struct.iter_unpack("<" + letter, self.take(count * struct.calcsize(letter)))]
        if count > self.file.size - self.position:
            raise CheckpointError(f"{self.file.path}: an array claims {count} items; download the file again.")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(file: Storage) -> Header:
    """Index one file; raises CheckpointError where the header lies about the file."""
    cursor = Cursor(file)
    if file.size < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{file.path}: is not a GGUF file; download it again.")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise CheckpointError(f"{file.path}: is GGUF version {version} or big-endian; expected 2 or 3, little-endian.")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.string()
        if name in keys:
            raise CheckpointError(f"{file.path}: holds the key {name} twice; download it again.")
        keys[name] = cursor.value(cursor.number("I"))
    places = read_places(cursor, tensor_count)
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
        raise CheckpointError(f"{file.path}: general.alignment is {alignment}; download it again.")
    base = -(-cursor.position // alignment) * alignment
    check_places(file, places, base, alignment)
    tensors = {name: stored(file, base + p.offset, p.shape, p.dtype) for name, p in places.items()}
    return Header(keys, tensors, hashlib.sha256(cursor.buffer[: cursor.position]).hexdigest())


@dataclass(frozen=True)
class Place:
    """A tensor as the header describes it; the offset counts from the data's start."""

    shape: tuple[int, ...]
    dtype: DType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.dtype.block * self.dtype.nbytes


def read_places(cursor: Cursor, count: int) -> dict[str, Place]:
    """The descriptions of all tensors."""
    places: dict[str, Place] = {}
    for _ in range(count):
        name, dims = cursor.string(), cursor.number("I")
        if not 1 <= dims <= MAX_DIMS or name in places:
            raise CheckpointError(
                f"{cursor.file.path}: {name} has {dims} dimensions or stands twice; download it again."
            )
        extents = [cursor.number("Q") for _ in range(dims)]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in TYPES:
            raise CheckpointError(f"{cursor.file.path}: {name} is of ggml type {kind}, which cannot be read.")
        if extents[0] % TYPES[kind].block:
            raise CheckpointError(
                f"{cursor.file.path}: {name} has rows of {extents[0]}, but {TYPES[kind].name} stores "
                f"{TYPES[kind].block} weights together; download it again."
            )
        places[name] = Place(tuple(reversed(extents)), TYPES[kind], offset)
    return places


def check_places(file: Storage, places: dict[str, Place], base: int, alignment: int) -> None:
    """Raise CheckpointError where a tensor is not aligned, shares bytes with another or reaches beyond the file."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if place.offset % alignment or place.offset < end:
            raise CheckpointError(
                f"{file.path}: {name} lies at {place.offset}, over another tensor; download it again."
            )
        end = place.offset + place.nbytes
        if base + end > file.size:
            raise CheckpointError(
                f"{file.path}: {name} ends at byte {base + end}, the file at {file.size}; it is cut short, download it again."
            )


def index(path: Path) -> Index:
    """Index a file, or all parts of the split file that it belongs to."""
    headers = [(file, read_header(file)) for file in map(open_storage, parts(path))]
    first = headers[0][1].keys
    tensors: dict[str, LazyTensor] = {}
    for file, header in headers:
        twice = (
            f"{file.path}: holds {name}, as another part does; download it again."
            for name in header.tensors
            if name in tensors
        )
        raise_all(CheckpointError, twice)
        tensors |= header.tensors
    expected = first.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{path}: its parts hold {len(tensors)} tensors, expected {expected}; download them again."
        )
    return Index(
        "gguf",
        path.parent,
        tuple(SourceFile(file, header.checksum) for file, header in headers),
        (with_native_types(tensors),),
        {key: value for key, value in first.items() if not key.startswith("split.")},
    )


def parts(path: Path) -> list[Path]:
    """The file, or every part of a split one; raises CheckpointError naming the parts that are missing."""
    match = SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    names = [path.with_name(f"{match[1]}-{number + 1:05d}-of-{match[3]}.gguf") for number in range(int(match[3]))]
    raise_all(CheckpointError, (f"{name}: is missing; download it again." for name in names if not name.is_file()))
    return names


def with_native_types(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with the type that a plain target keeps: F16 for blocks; for vectors, always F32 here, the matrices'."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            sizes[native(tensor.dtype).name] += tensor.rows * tensor.columns
    common = PLAIN[max(sizes, key=lambda name: sizes[name])] if sizes else F16
    return {
        name: replace(tensor, native=native(tensor.dtype) if len(tensor.shape) > 1 else common)
        for name, tensor in tensors.items()
    }


def native(dtype: DType) -> DType:
    """The plain type that stands for a stored one."""
    return dtype if dtype.block == 1 else F16

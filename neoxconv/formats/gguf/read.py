"""GGUF: typed keys, then for each tensor a name, extents, a type and an offset, then the aligned tensors.

    "GGUF" version:u32 tensors:u64 keys:u64
    key:    name type:u32 value          string = length:u64 bytes; array = type:u32 count:u64 items
    tensor: name dims:u32 extents:u64... type:u32 offset:u64      extents from the fastest, offset from the data's start

Source: ggml's src/gguf.cpp. This file reads; write.py lays files out.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor, stored
from neoxconv.dtypes import F16, F32, FLOATS, PLAIN, DType
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.storage import Place, Storage, open_storage, together

MAGIC, _VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32  # bytes of which offsets are multiples, unless a key says otherwise
_SPLIT = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")

# Far above any model (20B: a header of 3 MB, 532 tensors), low enough to bound the memory that a lying file can take.
_MAX_HEADER = 64 << 20  # bytes
_MAX_COUNT = 1 << 16  # keys, or tensors
MAX_ITEMS = 1 << 22  # of all arrays
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_NAME = 0xFFFF  # bytes
MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20  # bytes
_CHUNK = 1 << 20  # bytes of a header that are read at first
_LEAST_KEY, _LEAST_TENSOR = 13, 33  # bytes that one takes at least

# ggml's number of a type, its name, the weights of a block and their bytes. Source: ggml.h and ggml-common.h.
_BLOCKS = (
    (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)  # fmt: skip
_NUMBERED = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
TYPES = {number: PLAIN[name] for number, name in _NUMBERED.items()} | {
    number: DType(name, weights, nbytes, np.dtype(np.uint8)) for number, name, weights, nbytes in _BLOCKS
}
NUMBERS = {dtype.name: number for number, dtype in TYPES.items()}

# The types of keys' values: struct's letters; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
_STRUCTS = {letter: struct.Struct("<" + letter) for letter in SCALARS.values()}
# The bytes that a value of a type takes at least.
_LEAST = {STRING: 8, ARRAY: 12, **{kind: _STRUCTS[letter].size for kind, letter in SCALARS.items()}}


@dataclass(frozen=True)
class _Header:
    """What a file says of itself, with the SHA-256 of the bytes that say it."""

    file: Storage
    keys: dict[str, Any]
    typed: dict[str, bytes]  # the keys' values as the file has them, each behind its type
    tensors: dict[str, LazyTensor]
    checksum: str


def index(path: Place) -> Index:
    """Index a GGUF file, or all parts of the split file that `path` is one part of.

    The settings are the keys of the first part, without `split.*`. Raises CheckpointError for whatever is malformed.
    """
    headers = together(lambda part: read_header(open_storage(part)), parts(path), path)
    _check_parts(headers)
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return Index(
        format="gguf",
        folder=path.parent,
        files=tuple(SourceFile(header.file, header.checksum) for header in headers),
        ranks=(_with_native_types(tensors),),
        settings={key: value for key, value in headers[0].keys.items() if not key.startswith("split.")},
        single=True,
        typed=headers[0].typed,
    )


def parts(path: Place) -> list[Place]:
    """The file, or every part of a split one; raises CheckpointError naming the parts that are missing."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path}: is named part {number} of {count}; give it its own name back.")
    names = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    raise_all(CheckpointError, (f"{name}: is missing; download it again." for name in names if not name.is_file()))
    return names


def read_header(file: Storage) -> _Header:
    """Index one file; raises CheckpointError where the header is damaged or lies about the file."""
    cursor = _Cursor(file)
    if cursor.take(min(4, file.size)) != MAGIC:
        raise CheckpointError(f"{file.path}: is not a GGUF file: expected it to begin with GGUF; give another file.")
    _check_version(file, cursor.number("I"))
    tensor_count, key_count = cursor.count(_MAX_COUNT, _LEAST_TENSOR), cursor.count(_MAX_COUNT, _LEAST_KEY)
    keys: dict[str, Any] = {}
    typed: dict[str, bytes] = {}
    for _ in range(key_count):
        name = cursor.name("key", keys)
        start = cursor.position
        keys[name] = cursor.value(cursor.kind())
        typed[name] = bytes(cursor.buffer[start : cursor.position])
    infos = _read_tensor_infos(cursor, tensor_count)
    alignment = _read_alignment(file, keys)
    base = -(-cursor.position // alignment) * alignment
    _check_apart(file, infos, base, alignment)
    tensors = {name: stored(file, base + info.offset, info.shape, info.dtype) for name, info in infos.items()}
    return _Header(file, keys, typed, tensors, hashlib.sha256(cursor.buffer[: cursor.position]).hexdigest())


def _check_version(file: Storage, version: int) -> None:
    """Raise CheckpointError for a version, or an order of bytes, that is not read."""
    if version in _VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    found = f"big-endian, version {swapped}" if swapped in _VERSIONS else f"version {version}"
    raise CheckpointError(f"{file.path}: is GGUF {found}; expected little-endian, version 2 or 3. Convert it first.")


def _read_alignment(file: Storage, keys: dict[str, Any]) -> int:
    """The number of which every tensor's offset is a multiple.

    Raises CheckpointError where it is no power of two, as ggml demands, or too large.
    """
    found = keys.get("general.alignment", ALIGNMENT)
    if type(found) is not int or not 1 <= found <= _MAX_ALIGNMENT or found.bit_count() != 1:
        expected = f"expected a power of two up to {_MAX_ALIGNMENT}; download the file again."
        raise CheckpointError(f"{file.path}: general.alignment is {found!r:.40}, {expected}")
    return found


@dataclass(frozen=True)
class _TensorInfo:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]  # rows first
    dtype: DType
    offset: int  # from the data's start
    nbytes: int


def _read_tensor_infos(cursor: _Cursor, count: int) -> dict[str, _TensorInfo]:
    """The descriptions of the next `count` tensors by name; raises CheckpointError for a type or shape that is none."""
    infos: dict[str, _TensorInfo] = {}
    for _ in range(count):
        name = cursor.name("tensor", infos)
        dims = cursor.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise cursor.damaged(f"has {dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dims)]))
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in TYPES:
            raise CheckpointError(
                f"{cursor.file.path}: {cursor.subject} is of ggml type {kind}, which cannot be read; give another file."
            )
        dtype = TYPES[kind]
        row = shape[-1] if dims > 1 else 1  # a vector's rows are single numbers
        if 0 in shape or row % dtype.block:
            raise cursor.damaged(f"has shape {list(shape)}, expected rows of a multiple of {dtype.block} weights")
        infos[name] = _TensorInfo(shape, dtype, offset, dtype.size(math.prod(shape)))
    return infos


def _check_apart(file: Storage, infos: Mapping[str, _TensorInfo], base: int, alignment: int) -> None:
    """Raise CheckpointError where a tensor is not aligned, shares bytes with another or reaches beyond the file."""
    end, before = 0, ""
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        where = f"{file.path}: tensor {name!r:.100}"
        if info.offset % alignment:
            raise CheckpointError(f"{where}: begins at {info.offset}, no multiple of {alignment}; download it again.")
        if info.offset < end:
            raise CheckpointError(f"{where}: begins at {info.offset}, inside of {before!r:.100}; download it again.")
        end, before = info.offset + info.nbytes, name
        if base + end > file.size:
            raise CheckpointError(f"{where}: ends at byte {base + end}, the file at {file.size}; download it again.")


def _check_parts(headers: Sequence[_Header]) -> None:
    """Raise CheckpointError unless the files are all parts of one model, in order, and no tensor is in two of them."""
    seen: dict[str, Storage] = {}
    total = sum(len(header.tensors) for header in headers)
    problems = []
    for number, header in enumerate(headers):
        expected = {"split.no": number, "split.count": len(headers), "split.tensors.count": total}
        if len(headers) == 1:  # a whole model may be silent, and llama.cpp gives a merged one the count 0
            expected = {} if header.keys.get("split.count", 1) in (0, 1) else {"split.count": 1}
        problems += [
            f"{header.file.path}: {key} is {header.keys.get(key)!r:.40}, expected {value}; "
            "give all parts of one model, under the names that they were made with."
            for key, value in expected.items()
            if header.keys.get(key) != value
        ]
        twice = [name for name in header.tensors if name in seen]
        problems += [
            f"{header.file.path}: holds {name!r:.100}, as {seen[name].name} does; download both." for name in twice
        ]
        seen |= dict.fromkeys(header.tensors, header.file)
    raise_all(CheckpointError, problems)


def _with_native_types(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with the type that a plain target keeps: of blocks F16, of vectors what most bytes of matrices are.

    GGUF has vectors in F32 whatever the model was trained in.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and native(tensor.dtype).name in FLOATS:
            sizes[native(tensor.dtype).name] += tensor.nbytes
    common = PLAIN[max(sizes, key=lambda name: sizes[name])] if sizes else F16
    return {
        name: replace(tensor, native=common if len(tensor.shape) == 1 and tensor.dtype == F32 else native(tensor.dtype))
        for name, tensor in tensors.items()
    }


def native(dtype: DType) -> DType:
    """The plain type that a plain target keeps of a stored one."""
    return dtype if dtype.block == 1 else F16


class _Cursor:
    """Reads a header from front to back, in chunks, never beyond the file; `subject` is what messages name.

    Every method that reads raises CheckpointError where the file ends early or says what cannot be.
    """

    def __init__(self, file: Storage) -> None:
        self.file, self.subject = file, "the header"
        self.buffer, self.position, self.items = b"", 0, 0

    def damaged(self, problem: str) -> CheckpointError:
        """The error to raise where the subject is not what it must be."""
        return CheckpointError(f"{self.file.path}: {self.subject}: {problem}; download the file again.")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.position + count
        if end > len(self.buffer):
            self.fetch(end)
        data, self.position = self.buffer[self.position : end], end
        return data

    def fetch(self, end: int) -> None:
        """Have the file's bytes up to `end` in the buffer, which doubles so that few bytes are copied often."""
        limit = min(self.file.size, _MAX_HEADER)
        if end > limit:
            raise self.damaged(f"claims bytes {self.position} to {end} of {limit}")
        stop = min(max(end, 2 * len(self.buffer), _CHUNK), self.file.size)
        self.buffer += self.file.text(len(self.buffer), stop - len(self.buffer))

    def number(self, letter: str) -> Any:
        """The next number of a struct type."""
        return _STRUCTS[letter].unpack(self.take(_STRUCTS[letter].size))[0]

    def count(self, limit: int, least: int) -> int:
        """The next number, as a count of things of `least` bytes or more that are still to come."""
        count: int = self.number("Q")
        if count > limit or count * least > self.file.size - self.position:
            raise self.damaged(f"claims {count} items, at most {limit}, in {self.file.size - self.position} bytes")
        return count

    def string(self, limit: int = _MAX_HEADER) -> str:
        """The next string, of at most `limit` bytes."""
        length = self.number("Q")
        if length > limit:
            raise self.damaged(f"claims a string of {length} bytes, at most {limit} are read")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"is not UTF-8 ({error.reason} at byte {error.start} of a string)") from error

    def name(self, what: str, taken: dict[str, Any]) -> str:
        """The next string as a new name of a `what`; messages name it from here on."""
        self.subject = f"the name of {what} {len(taken)}"
        name = self.string(_MAX_NAME)
        if not name:
            raise self.damaged("is empty")
        self.subject = f"{what} {name!r:.100}"
        if name in taken:
            raise self.damaged("is there twice")
        return name

    def kind(self) -> int:
        """The next number, as the type of a value."""
        kind: int = self.number("I")
        if kind not in _LEAST:
            raise self.damaged(f"has a value of type {kind}, expected 0 to {max(_LEAST)}")
        return kind

    def value(self, kind: int, depth: int = 0) -> Any:
        """The next value of a key's type; arrays become lists."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if depth == _MAX_DEPTH:
            raise self.damaged(f"has arrays in arrays, more than {_MAX_DEPTH} deep")
        inner = self.kind()
        count = self.count(MAX_ITEMS - self.items, _LEAST[inner])
        self.items += count
        if inner in SCALARS:
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * _LEAST[inner])))
        return [self.value(inner, depth + 1) for _ in range(count)]

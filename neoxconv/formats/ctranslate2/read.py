"""CTranslate2's model.bin: named variables one after the other, each with its bytes, then names that mean others.

    version:u32 spec revision:u32 variables:u32          string = length:u16, which counts the zero; bytes; a zero
    variable: name dims:u8 sizes:u32... type:u8 length:u32 bytes
    aliases:u32 alias: its name, and that of a variable

Beside it lie config.json (special tokens, the norms' epsilon) and vocabulary.json (a list of texts by their ids).
Source: ctranslate2 4.8.5, specs/model_spec.py `_serialize`. This file reads; write.py lays files out.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from neoxconv.core.tensor import LazyTensor, stored
from neoxconv.dtypes import BF16, F16, F32, I8, I16, I32, DType
from neoxconv.errors import CheckpointError
from neoxconv.formats.safetensors import read_json
from neoxconv.storage import Place, Storage, is_file, open_storage

MODEL, CONFIG, VOCABULARY = "model.bin", "config.json", "vocabulary.json"
VERSION, SPEC, REVISION = 6, "TransformerDecoderSpec", 8
TYPES: tuple[DType, ...] = (F32, I8, I16, I32, F16, BF16)  # by their numbers: DataType in include/ctranslate2/types.h
NUMBERS = {dtype.name: number for number, dtype in enumerate(TYPES)}
_SPECS = b"Spec\0"  # what the names of all kinds of models end with

# Far above any model (20B: 1,200 variables), low enough to bound the memory that a lying file can take.
_MAX_COUNT = 1 << 16  # variables, or aliases
_MAX_DIMS = 4
_MAX_NAME = 1024  # bytes
_MAX_VOCABULARY = 1 << 28  # bytes
_CHUNK = 4096  # bytes that are read at a time in search of heads: a matrix, which is skipped, follows most of them
_LEAST_VARIABLE, _LEAST_ALIAS = 9, 6  # bytes that one takes at least


@dataclass(frozen=True)
class Model:
    """What a model.bin holds: tensors unread, single numbers, names that stand for tensors, and the SHA-256 of all that
    stands between tensors."""

    file: Storage
    tensors: dict[str, LazyTensor]
    scalars: dict[str, float]
    aliases: dict[str, str]
    checksum: str


def read_model(path: Place) -> Model:
    """Index a model.bin. Raises CheckpointError where it is damaged, lies about itself, or is of another version."""
    cursor = _Cursor(open_storage(path))
    _check_version(cursor)
    tensors, scalars = _read_variables(cursor)
    aliases = _read_aliases(cursor, tensors)
    if cursor.position != cursor.file.size:
        raise CheckpointError(
            f"{path}: ends at byte {cursor.position} by what it says, but has {cursor.file.size}; download it again."
        )
    return Model(cursor.file, tensors, scalars, aliases, cursor.digest.hexdigest())


def is_model(start: bytes) -> bool:
    """Whether a file that begins so is a model.bin of any version that names its kind, as far as 9 bytes tell."""
    version, length = struct.unpack("<IH", start[:6].ljust(6, b"\0"))
    return 2 <= version < 64 and len(_SPECS) < length < 64 and start[6:].isalpha() and len(start) == 9


def _check_version(cursor: _Cursor) -> None:
    """Raise CheckpointError for a version or a kind of model that is not read."""
    cursor.subject = "its head"
    version = cursor.number("I")
    if version != VERSION:
        raise CheckpointError(
            f"{cursor.file.path}: is version {version} of CTranslate2's files; expected {VERSION}. Convert the model "
            "again with a newer ctranslate2."
        )
    spec, revision = cursor.string(), cursor.number("I")
    if (spec, revision) != (SPEC, REVISION):
        raise CheckpointError(
            f"{cursor.file.path}: is {spec!r:.60}, revision {revision}; expected {SPEC}, revision {REVISION}. "
            "Other models are not supported."
        )


def _read_variables(cursor: _Cursor) -> tuple[dict[str, LazyTensor], dict[str, float]]:
    """The tensors, and the single numbers."""
    tensors: dict[str, LazyTensor] = {}
    scalars: dict[str, float] = {}
    for number in range(cursor.count(_MAX_COUNT, _LEAST_VARIABLE)):
        name = cursor.name(f"variable {number}", (tensors, scalars))
        shape, dtype = cursor.shape(), cursor.dtype()
        nbytes = math.prod(shape) * dtype.nbytes
        if cursor.number("I") != nbytes or 0 in shape:
            raise cursor.damaged(f"is {list(shape)} of {dtype.name}, which are not as many bytes as it says")
        if shape:
            tensors[name] = stored(cursor.file, cursor.position, shape, dtype)
            cursor.skip(nbytes)
        else:
            scalars[name] = float(np.frombuffer(cursor.take(nbytes), dtype.numpy)[0])
    return tensors, scalars


def _read_aliases(cursor: _Cursor, tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """The names that stand for tensors."""
    aliases: dict[str, str] = {}
    for number in range(cursor.count(_MAX_COUNT, _LEAST_ALIAS)):
        alias = cursor.name(f"alias {number}", (tensors, aliases))
        meant = cursor.string()
        if meant not in tensors:
            raise cursor.damaged(f"means {meant!r:.100}, which is no tensor")
        aliases[alias] = meant
    return aliases


def read_config(folder: Place) -> dict[str, Any]:
    """config.json; nothing where there is none. Raises CheckpointError where it is no JSON object."""
    path = folder / CONFIG
    return read_json(path) if is_file(path) else {}


def read_vocabulary(folder: Place) -> list[str]:
    """The texts by their ids, of vocabulary.json; none where there is no such file.

    Raises CheckpointError where it is no list of texts.
    """
    path = folder / VOCABULARY
    if not is_file(path):
        return []
    file = open_storage(path)
    if file.size > _MAX_VOCABULARY:
        raise CheckpointError(f"{path}: has {file.size} bytes, expected at most {_MAX_VOCABULARY}; download it again.")
    try:
        found = json.loads(file.text().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again.") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{path}: is no list of texts; download it again.")
    return found


class _Cursor:
    """Reads heads from front to back, never beyond the file; `subject` is what messages name.

    Every method that reads raises CheckpointError where the file ends early or says what cannot be.
    """

    def __init__(self, file: Storage) -> None:
        self.file, self.subject, self.position = file, "its head", 0
        self.digest = hashlib.sha256()
        self._start, self._buffer = 0, b""  # where the bytes begin that were read last

    def damaged(self, problem: str) -> CheckpointError:
        """The error to raise where the subject is not what it must be."""
        return CheckpointError(f"{self.file.path}: {self.subject} {problem}; download the file again.")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin = self.position - self._start
        if begin + count > len(self._buffer):
            if self.position + count > self.file.size:
                raise self.damaged(f"claims bytes {self.position} to {self.position + count} of {self.file.size}")
            length = min(max(count, _CHUNK), self.file.size - self.position)
            self._start, self._buffer, begin = self.position, self.file.text(self.position, length), 0
        data = self._buffer[begin : begin + count]
        self.position += count
        self.digest.update(data)
        return data

    def skip(self, count: int) -> None:
        """Leave out the next `count` bytes."""
        if self.position + count > self.file.size:
            raise self.damaged(f"ends at byte {self.position + count}, the file at {self.file.size}")
        self.position += count

    def number(self, letter: str) -> int:
        """The next unsigned number of a struct type."""
        return int.from_bytes(self.take(struct.calcsize(letter)), "little")

    def count(self, limit: int, least: int) -> int:
        """The next number, as a count of things of `least` bytes or more that are still to come."""
        count = self.number("I")
        if count > limit or count * least > self.file.size - self.position:
            raise self.damaged(f"claims {count} items, at most {limit}, in {self.file.size - self.position} bytes")
        return count

    def string(self) -> str:
        """The next string."""
        length = self.number("H")
        if not 1 <= length <= _MAX_NAME:
            raise self.damaged(f"has a text of {length} bytes, expected 1 to {_MAX_NAME}")
        data = self.take(length)
        try:
            text = data[:-1].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a text that is not UTF-8 ({error.reason} at byte {error.start})") from error
        if data[-1] or "\0" in text:
            raise self.damaged("has a text that does not end where it says")
        return text

    def name(self, what: str, taken: Collection[Collection[str]]) -> str:
        """The next string as a name that none of `taken` has; messages name it from here on."""
        self.subject = what
        name = self.string()
        self.subject = f"{what.split()[0]} {name!r:.100}"
        if not name or any(name in names for names in taken):
            raise self.damaged("is there twice" if name else "has no name")
        return name

    def shape(self) -> tuple[int, ...]:
        """The sizes of the subject; none of a single number."""
        dims = self.number("B")
        if dims > _MAX_DIMS:
            raise self.damaged(f"has {dims} dimensions, expected {_MAX_DIMS} at most")
        return tuple(self.number("I") for _ in range(dims))

    def dtype(self) -> DType:
        """The type of the subject's numbers."""
        number = self.number("B")
        if number >= len(TYPES):
            raise self.damaged(f"is of type {number}, expected 0 to {len(TYPES) - 1}")
        return TYPES[number]

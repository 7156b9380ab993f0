"""Importance matrices: for every tensor, how much an error in each of its columns matters.

llama.cpp's llama-imatrix makes them: over the tokens of a text, the mean square of what each column is multiplied with.

    GGUF form  tensors NAME.in_sum2 [columns] and NAME.counts [1]: sums, and the tokens they run over
    .dat form  entries:i32, each: length:i32 name calls:i32 columns:i32 f32...; then chunks:i32 length:i32 text's name

Only ratios within a tensor act. Source: llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Doubles, Floats, Numbers
from neoxconv.errors import CheckpointError
from neoxconv.formats.gguf import read as gguf
from neoxconv.storage import Storage, open_storage

SUMS, COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _LENGTH = (f"imatrix.{name}" for name in ("datasets", "chunk_count", "chunk_size"))
# Far above any model.
_BAND = 16 << 20  # bytes
_MAX_ENTRIES, _MAX_NAME, _MAX_COLUMNS = 1 << 16, 1 << 10, 1 << 24  # MAX_NAME in bytes
_MAX_TOTAL = 1 << 26  # columns of all entries: three times those of a model of 1T parameters


@dataclass(frozen=True)
class Matrix:
    """The importance of columns by the GGUF names of tensors."""

    path: Path
    entries: dict[str, Floats]  # [columns] each, with a mean of 1
    chunks: int  # of text that it was made with; 0 where the file does not say
    dataset: str = ""  # the text's name, of several the first

    @cached_property
    def sha256(self) -> str:
        """Of the whole file."""
        return _digest(open_storage(self.path))


def read(path: Path) -> Matrix:
    """The matrix in a file of either form. Raises CheckpointError where it is damaged or holds no importances."""
    file = open_storage(path)
    if file.text(0, min(4, file.size)) == gguf.MAGIC:
        found, chunks, dataset = _read_gguf(file)
    else:
        found, chunks, dataset = _read_dat(file, _whole(file))
    if not found:
        raise CheckpointError(f"{path}: holds no importances; make it with llama-imatrix.")
    entries = {name: _with_mean_1(path, name, values) for name, values in found.items()}
    return Matrix(path, entries, chunks, dataset)


def _whole(file: Storage) -> bytes:
    """All bytes of a file. Raises CheckpointError where they are too many."""
    if file.size > _MAX_ENTRIES * 256:
        raise CheckpointError(
            f"{file.path}: has {file.size} bytes, too many for an importance matrix; give another file."
        )
    return file.text()


def _digest(file: Storage) -> str:
    """The SHA-256 of a file, a band of its bytes at a time."""
    found = hashlib.sha256()
    for start in range(0, file.size, _BAND):
        found.update(file.text(start, min(_BAND, file.size - start)))
    return found.hexdigest()


def _with_mean_1(path: Path, name: str, values: Floats) -> Floats:
    """Importances [columns] with a mean of 1; none (all 0) stay so.

    Raises CheckpointError where one is no finite number from 0 on.
    """
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        raise CheckpointError(
            f"{path}: {name}: the importance of column {bad[0]} is {values[bad[0]]}, expected a finite one from 0 on; "
            "make the matrix again."
        )
    mean = values.mean(dtype=np.float64)
    return (values / mean if mean else values).astype(np.float32)


def _read_gguf(file: Storage) -> tuple[dict[str, Floats], int, str]:
    """The entries of the GGUF form, the number of chunks, and the text's name.

    A tensor that saw no token counts as all alike.

    Raises CheckpointError where the file is another kind of GGUF, or an entry is not what it must be.
    """
    header = gguf.read_header(file)
    kind = header.keys.get("general.type")
    if kind != "imatrix":
        raise CheckpointError(f"{file.path}: general.type is {kind!r:.40}, expected 'imatrix'; give another file.")
    entries, total = {}, 0
    for name, tensor in header.tensors.items():
        entry = name.removesuffix(SUMS)
        if entry != name:
            count = numbers(file, header.tensors.get(entry + COUNTS), entry + COUNTS)
            total += tensor.rows * tensor.columns
            if total > _MAX_TOTAL:
                raise CheckpointError(
                    f"{file.path}: has importances of more than {_MAX_TOTAL} columns; give another file."
                )
            sums = numbers(file, tensor, name)
            if count.size != 1:
                raise CheckpointError(
                    f"{file.path}: {entry}: has {count.size} matrices, expected 1; experts are not supported."
                )
            entries[entry] = sums if count[0] > 0 else np.ones_like(sums)
    chunks = header.keys.get(_CHUNKS, 0)
    names = header.keys.get(_DATASETS, [])
    dataset = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return entries, chunks if type(chunks) is int else 0, dataset


def numbers(file: Storage, tensor: LazyTensor | None, name: str) -> Floats:
    """A float32 tensor's numbers as a vector; raises CheckpointError where it is none."""
    if tensor is None or tensor.dtype.name != "F32":
        found = "is missing" if tensor is None else f"is {tensor.dtype.name}, expected F32"
        raise CheckpointError(f"{file.path}: {name} {found}; make the matrix again.")
    count = tensor.rows * tensor.columns
    if count > _MAX_COLUMNS:
        raise CheckpointError(
            f"{file.path}: {name} has {count} numbers, at most {_MAX_COLUMNS}; make the matrix again."
        )
    return tensor.floats(0, tensor.rows).reshape(-1)


def _read_dat(file: Storage, data: bytes) -> tuple[dict[str, Floats], int, str]:
    """The entries of the .dat form, the number of chunks and the text's name, which older files lack.

    Raises CheckpointError where the bytes cannot be them.
    """
    entries: dict[str, Floats] = {}
    end = 4
    try:
        for name, values, behind in _dat_entries(data):
            entries[name], end = values, behind
    except (ValueError, struct.error) as error:
        what = "it ends early" if isinstance(error, struct.error) else error
        raise CheckpointError(
            f"{file.path}: is no importance matrix, in neither the GGUF nor the .dat form, or is damaged ({what}); "
            "make it again."
        ) from error
    if len(data) < end + 8:
        return entries, struct.unpack_from("<i", data, end)[0] if len(data) >= end + 4 else 0, ""
    chunks, length = struct.unpack_from("<2i", data, end)
    return entries, chunks, data[end + 8 : end + 8 + max(length, 0)].decode(errors="replace")


def _dat_entries(data: bytes) -> Iterator[tuple[str, Floats, int]]:
    """Names, importances [columns] and the bytes behind which each ends.

    Raises ValueError or struct.error where the bytes cannot be them.
    """
    position = 4
    for number in range(_count_at(data, 0, _MAX_ENTRIES)):
        length = _count_at(data, position, _MAX_NAME)
        name = data[position + 4 : position + 4 + length].decode()
        position += 4 + length + 4  # the number of calls scales all alike
        columns = _count_at(data, position, _MAX_COLUMNS)
        if position + 4 + 4 * columns > len(data):
            raise ValueError(f"entry {number} ends beyond the file")
        values = np.frombuffer(data, "<f4", columns, position + 4)
        position += 4 + values.nbytes
        yield name, values, position


def _count_at(data: bytes, offset: int, limit: int) -> int:
    """The number at `offset`, as a count of 1 to `limit` things; raises ValueError where it is none."""
    count: int = struct.unpack_from("<i", data, offset)[0]
    if not 1 <= count <= limit:
        raise ValueError(f"a count of {count} at byte {offset}")
    return count


def facts(text: str, tokens: Numbers) -> dict[str, Any]:
    """The keys that say what tokens [batch, time] a matrix is of."""
    return {_DATASETS: [text], _CHUNKS: len(tokens), _LENGTH: tokens.shape[1]}


def write(path: Path, sums: dict[str, Doubles], tokens: Numbers, text: str) -> None:
    """Write the GGUF form that llama.cpp's tools read: `sums` [columns] over all `tokens` [batch, time] of a text.

    Raises OSError where the disk does not take it.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    told = facts(text, tokens)
    writer.add_array(_DATASETS, told[_DATASETS])
    for key in (_CHUNKS, _LENGTH):
        writer.add_uint32(key, told[key])
    for name in sorted(sums):
        writer.add_tensor(name + SUMS, sums[name].astype(np.float32))
        writer.add_tensor(name + COUNTS, np.array([tokens.size], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

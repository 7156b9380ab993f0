"""Files older than torch 1.6, which are no zips.

    five pickles         a magic number, a protocol, facts of the machine, the value, the list of storages' keys
    for each key         count:u64, and so many numbers

Source: torch/serialization.py, _legacy_save and _legacy_load.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any, NoReturn

from neoxconv.errors import CheckpointError
from neoxconv.formats.pt.tensors import PtFile, Record, View, tensor_in
from neoxconv.formats.pt.unpickle import load_pickle
from neoxconv.storage import Storage, Stream

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_DESCRIBED = 64 << 20  # bytes of pickles that the checksum covers


def read_before_zip(file: Storage) -> PtFile:
    """Index a file older than the zips: its pickles and the storages' counts are read, no storage is.

    Raises CheckpointError where it is no such file, or is damaged.
    """
    stream, name = io.BufferedReader(Stream(file), 1 << 16), str(file.path)
    if load_pickle(stream, _no_tensor, name) != _MAGIC or load_pickle(stream, _no_tensor, name) != _PROTOCOL:
        raise CheckpointError(f"{file.path}: is not a PyTorch file; download it again.")
    system = load_pickle(stream, _no_tensor, name)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError(f"{file.path}: its numbers are not little-endian; save it again on a machine whose are.")
    views: list[View] = []  # tensors, whose storages are not found yet

    def postpone(*where: Any) -> View:
        views.append(View(*where))
        return views[-1]

    value = load_pickle(stream, postpone, name)
    keys = load_pickle(stream, _no_tensor, name)
    described = stream.tell()
    widths = {view.ref.key: view.ref.dtype.nbytes for view in views}
    records = _find_storages(file, described, keys, widths)
    checksum = hashlib.sha256(file.text(0, min(described, _MAX_DESCRIBED))).hexdigest()
    return PtFile(_with_tensors(value, file, records), checksum, records)


def _no_tensor(*where: Any) -> NoReturn:
    """Refuse a tensor in a pickle that has none."""
    raise ValueError("a tensor stands where there is none")


def _find_storages(file: Storage, position: int, keys: Any, widths: Mapping[str, int]) -> dict[str, Record]:
    """Where each storage lies, the first one at byte `position`; `widths` are the bytes of a number by key.

    Raises CheckpointError where one is not whole, or no tensor tells its type.
    """
    records: dict[str, Record] = {}
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str):
            raise CheckpointError(f"{file.path}: its list of storages is damaged; download it again.")
        if key not in widths:
            raise CheckpointError(
                f"{file.path}: storage {key} holds numbers of a type that cannot be read; convert it first."
            )
        count = int.from_bytes(file.text(position, 8), "little")
        record = Record(position + 8, count * widths[key], crc32=0)
        position = record.offset + record.size
        if position > file.size:
            raise CheckpointError(
                f"{file.path}: storage {key} claims {count} numbers beyond the file's end; download it again."
            )
        records[key] = record
    return records


def _with_tensors(value: Any, file: Storage, records: Mapping[str, Record]) -> Any:
    """`value` with every view of a storage made a tensor; raises CheckpointError where one does not lie on it."""
    if isinstance(value, View):
        try:
            return tensor_in(file, records[value.ref.key], value)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file.path}: {error}; download it again.") from error
    if isinstance(value, dict):
        return type(value)((key, _with_tensors(item, file, records)) for key, item in value.items())
    if isinstance(value, list):
        return [_with_tensors(item, file, records) for item in value]
    return tuple(_with_tensors(item, file, records) for item in value) if type(value) is tuple else value

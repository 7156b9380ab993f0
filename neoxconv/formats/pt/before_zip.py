"""Files older than torch 1.6: five pickles, one after the other, then each storage as a count and its bytes."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.pt.tensors import Place, PtFile, Record, tensor_in
from neoxconv.formats.pt.unpickle import load_pickle
from neoxconv.storage.files import Storage, Stream

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_DESCRIBED = 64 << 20  # bytes of pickles that the checksum covers


def read_legacy(file: Storage) -> PtFile:
    """Index a file older than the zips: magic number, protocol, system, value, storage keys, then the storages."""
    stream, name = io.BufferedReader(Stream(file), 1 << 16), str(file.path)
    records: dict[str, Record] = {}

    def nothing(*place: Any) -> None:
        raise ValueError("a tensor stands where there is none")

    if load_pickle(stream, nothing, name) != MAGIC or load_pickle(stream, nothing, name) != PROTOCOL:
        raise CheckpointError(f"{file.path}: is not a PyTorch file; download it again.")
    system = load_pickle(stream, nothing, name)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError(f"{file.path}: its numbers are not little-endian; save it again on a machine whose are.")
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
        if not isinstance(key, str):
            raise CheckpointError(f"{file.path}: its list of storages is damaged; download it again.")
        if key not in widths:
            raise CheckpointError(
                f"{file.path}: storage {key} holds numbers of a type that cannot be read; convert it first."
            )
        count = int.from_bytes(file.text(position, 8), "little")
        size = count * widths[key]
        if position + 8 + size > file.size:
            raise CheckpointError(
                f"{file.path}: storage {key} claims {count} numbers beyond the file's end; download it again."
            )
        records[key] = Record(position + 8, size, 0)
        position += 8 + size
    checksum = hashlib.sha256(file.text(0, min(described, MAX_DESCRIBED))).hexdigest()
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

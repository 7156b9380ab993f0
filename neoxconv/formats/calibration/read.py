"""What a calibration holds is found by its header; moments are read when they are asked for, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.encoding import Aim, Gradients, Moments
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, Floats
from neoxconv.errors import CheckpointError
from neoxconv.formats.calibration.names import (
    AIM,
    AIMED,
    GRADIENT,
    GRADIENT_INPUTS,
    IN,
    MOMENTS,
    OF,
    OUTPUTS,
    OUTPUTS_OF,
    OUTPUTS_SHA256,
    SHA256,
    SOURCE,
    TYPES,
    UNKNOWN,
    triangle,
)  # fmt: skip
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.imatrix import SUMS, numbers
from neoxconv.storage import Storage, open_storage

_TURNED = 64  # rows of moments that are copied to the other side of the diagonal at a time


def source_of(path: Path) -> str:
    """What a calibration was made of, as `source_digest` has it; empty where it does not say."""
    found = gguf.read_header(open_storage(path)).keys.get(SOURCE)
    return found if isinstance(found, str) else ""


def digest_of(path: Path) -> str:
    """The SHA-256 of the header and of all but what the header has digests of, which may be gigabytes."""
    file = open_storage(path)
    header = gguf.read_header(file)
    digest = hashlib.sha256(header.checksum.encode())
    for name, tensor in header.tensors.items():
        if not name.endswith((MOMENTS, OUTPUTS, AIM)):
            digest.update(numbers(file, tensor, name).data)
    return digest.hexdigest()


def moments_in(path: Path) -> dict[str, Moments]:
    """The second moments in a calibration by the GGUF names of matrices; nothing is read of them yet.

    Raises CheckpointError where it holds none.
    """
    file = open_storage(path)
    header = gguf.read_header(file)
    names, owners, digests = (_texts(header.keys.get(key)) for key in (OF, IN, SHA256))
    if not names or not len(names) == len(owners) == len(digests):
        raise CheckpointError(
            f"{path}: holds no second moments; make a calibration with `neoxconv calibrate --covariance`, "
            "or give an importance matrix with --imatrix."
        )
    found = {
        name: _moments(path, header.tensors, (owner + MOMENTS, name + SUMS), digest, f"second moments of {owner}")
        for name, owner, digest in zip(names, owners, digests, strict=True)
    }
    aims = _aims_of(header.keys, header.tensors)
    return {name: replace(moments, aim=aims.get(name)) for name, moments in found.items()}


def outputs_in(path: Path) -> dict[str, Moments]:
    """The second moments of gradients in a calibration, damped, by the GGUF names of matrices; none where it has none.

    Nothing is read of them yet. Raises CheckpointError where they are incomplete.
    """
    header = gguf.read_header(open_storage(path))
    names, digests = (_texts(header.keys.get(key)) for key in (OUTPUTS_OF, OUTPUTS_SHA256))
    if len(names) != len(digests):
        raise CheckpointError(f"{path}: names {len(names)} matrices for {len(digests)} outputs; calibrate again.")
    return {
        name: _moments(path, header.tensors, (name + OUTPUTS, name + GRADIENT), digest, f"outputs of {name}")
        for name, digest in zip(names, digests, strict=True)
    }


def _moments(path: Path, tensors: Mapping[str, LazyTensor], names: tuple[str, str], digest: str, what: str) -> Moments:
    """The moments in the first of two tensors, of a side as long as the second. Raises CheckpointError."""
    tensor, sums = (tensors.get(name) for name in names)
    if tensor is None or sums is None or tensor.dtype is not F32 or digest == UNKNOWN:
        raise CheckpointError(f"{path}: the {what} are missing; calibrate again.")
    expected = (triangle(sums.rows),)
    if tensor.shape != expected or sums.columns != 1:
        raise CheckpointError(
            f"{path}: the {what} are {list(tensor.shape)}, expected {list(expected)}, a triangle of {sums.rows} "
            "columns; calibrate again."
        )
    return Moments(sums.rows, digest, _Reader(path, what, tensor, sums.rows, digest))


def _aims_of(keys: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Aim]:
    """The aims in a calibration, by the GGUF names of matrices."""
    pairs = zip(_texts(keys.get(AIMED)), _texts(keys.get(TYPES)), strict=False)
    return {name: Aim(tensors[name + AIM], encoding) for name, encoding in pairs if name + AIM in tensors}


def _texts(value: Any) -> list[str]:
    """A list of strings; an empty one where a value is none."""
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def gradients_in(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Gradients]:
    """How much predictions depend on matrices, by their GGUF names; `shapes` are those of the model's.

    Raises CheckpointError where a calibration was made without, and for what is damaged or another model's.
    """
    file = open_storage(path)
    tensors = gguf.read_header(file).tensors
    found = {}
    for name in [name.removesuffix(GRADIENT) for name in tensors if name.endswith(GRADIENT)]:
        if name not in shapes:
            raise CheckpointError(f"{path}: {name} is not in the model; the calibration is another model's.")
        rows, columns = (
            _squares(file, name + suffix, tensors.get(name + suffix), count)
            for suffix, count in zip((GRADIENT, GRADIENT_INPUTS), shapes[name], strict=True)
        )
        found[name] = Gradients(rows, columns)
    if not found:
        raise CheckpointError(f"{path}: says nothing of gradients; make it with `neoxconv calibrate --gradients`.")
    return found


def _squares(file: Storage, name: str, tensor: LazyTensor | None, count: int) -> Floats:
    """A tensor [count] of mean squares. Raises CheckpointError where it is none."""
    values = numbers(file, tensor, name)
    if values.size != count:
        raise CheckpointError(
            f"{file.path}: {name} has {values.size} numbers, the model's matrix asks for {count}; "
            "the calibration is another model's, or damaged: calibrate again."
        )
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size or not values.any():
        what = f"number {bad[0]} is {values[bad[0]]}" if bad.size else "all numbers are 0"
        raise CheckpointError(
            f"{file.path}: {name}: {what}, expected finite ones from 0 on; the calibration is unfinished or damaged: "
            "calibrate again."
        )
    return values


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor of moments when it is called, and checks its digest."""

    path: Path
    what: str
    tensor: LazyTensor
    side: int
    digest: str

    def __call__(self) -> Floats:
        packed = self.tensor.floats(0, self.tensor.rows)
        if hashlib.sha256(np.ascontiguousarray(packed).data).hexdigest() != self.digest:
            raise CheckpointError(f"{self.path}: the {self.what} are damaged; calibrate again.")
        return _square(packed, self.side)


def _square(packed: Floats, side: int) -> Floats:
    """A symmetric matrix [side, side] of its upper triangle, row after row; what is below comes band by band."""
    square, end = np.empty((side, side), np.float32), 0
    for row in range(side):
        start, end = end, end + side - row
        square[row, row:] = packed[start:end]
    for start in range(0, side, _TURNED):
        stop = min(start + _TURNED, side)
        band = square[start:stop, start:].copy()  # its rows lie closer together, so that a cache holds them
        own, right = band[:, : stop - start], band[:, stop - start :]
        square[start:stop, start:stop] = np.triu(own) + np.triu(own, 1).T
        square[stop:, start:stop] = right.T
    return square

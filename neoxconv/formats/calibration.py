"""A calibration: an importance matrix with the second moments of what each matrix is multiplied with, as one GGUF file.

    NAME.in_sum2 [columns], NAME.counts [1]    as llama.cpp's importance matrix has them (imatrix.py); it reads no more
    NAME.gradient [rows]                       E[g^2] at its outputs, where gradients were asked for
    NAME.gradient_inputs [columns]             E[|g|^2 x^2] / E[|g|^2] at its inputs
    NAME.moments [columns (columns + 1) / 2]   E[x x^T], the upper triangle row after row; once for all that share x
    NAME.aim [rows, columns]                   what is rounded in its place, where layers were calibrated through others
    neoxconv.moments.of, .in, .sha256          for each of the names: whose moments are its own, and their digest
    neoxconv.aims.of, .types                   the matrices that have an aim, and the type that it is for

The file is written layer after layer. Its size is known before the first, and a run that was interrupted goes on.
Until gradients are known, nan stands for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.encoding import Aim, Gradients, Moments, copied
from neoxconv.core.layout import Entry, FileLayout
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, Floats
from neoxconv.errors import CheckpointError
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.gguf import write as gguf_write
from neoxconv.formats.imatrix import COUNTS, SUMS, numbers
from neoxconv.storage import Storage, open_storage

_MOMENTS = ".moments"
_OF, _IN, _SHA256 = (f"neoxconv.moments.{name}" for name in ("of", "in", "sha256"))
_AIM = ".aim"
_AIMED, _TYPES = "neoxconv.aims.of", "neoxconv.aims.types"
_GRADIENT, _GRADIENT_INPUTS = ".gradient", ".gradient_inputs"
_UNKNOWN = "0" * 64  # a digest that is not known yet


@dataclass(frozen=True)
class Inputs:
    """What several matrices are multiplied with: the GGUF names of these, the first of which names it, and its size.

    A matrix that gets an aim shares its inputs with no other: `rows` are its own then, `encoding` is what the aim is
    for.
    """

    names: tuple[str, ...]
    columns: int
    rows: int = 0
    encoding: str = ""

    @property
    def owner(self) -> str:
        return self.names[0]

    @property
    def packed(self) -> int:
        """Numbers in a triangle."""
        return self.columns * (self.columns + 1) // 2


class Writer:
    """A calibration that is written input after input, at `path`: `begin`, `add` for each, `finish`.

    `gradients`: rows and columns of the matrices whose gradients it will have, by GGUF name.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[Inputs, ...],
        keys: Mapping[str, Any],
        tokens: int,
        gradients: Mapping[str, tuple[int, int]],
    ) -> None:
        self.path, self.inputs, self.keys, self.tokens, self.gradients = path, inputs, keys, tokens, gradients
        self.digests = dict.fromkeys((each.owner for each in inputs), _UNKNOWN)

    def layout(self) -> FileLayout:
        """Where everything lies; of the same size whatever the digests are."""
        entries = [_vector(name + SUMS, each.columns) for each in self.inputs for name in each.names]
        entries += [_vector(name + COUNTS, 1) for each in self.inputs for name in each.names]
        for name, (rows, columns) in self.gradients.items():
            entries += [_vector(name + _GRADIENT, rows), _vector(name + _GRADIENT_INPUTS, columns)]
        entries += [_vector(each.owner + _MOMENTS, each.packed) for each in self.inputs]
        aimed = [each for each in self.inputs if each.encoding]
        entries += [_tensor(each.owner + _AIM, (each.rows, each.columns)) for each in aimed]
        owners = {name: each.owner for each in self.inputs for name in each.names}
        told = {
            _OF: list(owners),
            _IN: list(owners.values()),
            _SHA256: [self.digests[owner] for owner in owners.values()],
        }
        if aimed:
            told |= {_AIMED: [each.owner for each in aimed], _TYPES: [each.encoding for each in aimed]}
        (file,) = gguf_write.layout("calibration", {"general.type": "imatrix", **self.keys, **told}, entries, None)
        return file

    def begin(self) -> None:
        """Make the file, without what is still to come."""
        with open(self.path, "wb") as stream:
            stream.truncate(self.layout().size)
        nothing = Gradients(np.array([np.nan], np.float32), np.array([np.nan], np.float32))
        self._write(_named(dict.fromkeys(self.gradients, nothing)))

    def add(self, each: Inputs, moments: Floats) -> None:
        """Write the second moments [columns, columns] of inputs. Raises CheckpointError where they are not finite."""
        if not np.isfinite(moments).all():
            raise CheckpointError(
                f"{self.path}: what {each.owner} is multiplied with is not finite; check the weights."
            )
        packed = np.concatenate([moments[row, row:] for row in range(len(moments))], dtype=np.float32)
        self.digests[each.owner] = hashlib.sha256(packed.data).hexdigest()
        sums = (np.diag(moments).astype(np.float64) * self.tokens).astype(np.float32)
        found = {each.owner + _MOMENTS: packed}
        for name in each.names:
            found |= {name + SUMS: sums, name + COUNTS: np.array([self.tokens], np.float32)}
        self._write(found)

    def add_aim(self, each: Inputs, rows: Floats) -> None:
        """Write what is rounded in place of the matrix [rows, columns] that has these inputs."""
        self._write({each.owner + _AIM: rows})

    def finish(self, gradients: Mapping[str, Gradients]) -> None:
        """Write the digests and, by the GGUF names of matrices, gradients, and have all of it on disk."""
        self._write(_named(gradients))

    def _write(self, tensors: Mapping[str, Floats]) -> None:
        """Write the header and tensors at their places."""
        file = self.layout()
        offsets = {slot.entry.name: slot.offset for slot in file.slots}
        with open(self.path, "r+b") as stream:
            for offset, data in file.pieces:
                stream.seek(offset)
                stream.write(data)
            for name, values in tensors.items():
                stream.seek(offsets[name])
                stream.write(np.ascontiguousarray(values).data)
            stream.flush()
            os.fsync(stream.fileno())


def _named(gradients: Mapping[str, Gradients]) -> dict[str, Floats]:
    """Gradients by the names of the tensors that hold them."""
    rows = {name + _GRADIENT: found.rows for name, found in gradients.items()}
    return rows | {name + _GRADIENT_INPUTS: found.columns for name, found in gradients.items()}


def _vector(name: str, count: int) -> Entry:
    """A vector of float32 that nobody reads yet."""
    return _tensor(name, (count,))


def _tensor(name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor of float32 that nobody reads yet."""
    nothing = LazyTensor(shape, F32, lambda start, stop: np.zeros((stop - start, *shape[1:]), np.float32), F32)
    return Entry(name, name, nothing, copied(F32))


def moments_in(path: Path) -> dict[str, Moments]:
    """The second moments in a calibration by the GGUF names of matrices; nothing is read of them yet.

    Raises CheckpointError where it holds none.
    """
    file = open_storage(path)
    header = gguf.read_header(file)
    names, owners, digests = (_texts(header.keys.get(key)) for key in (_OF, _IN, _SHA256))
    if not names or not len(names) == len(owners) == len(digests):
        raise CheckpointError(
            f"{path}: holds no second moments; make a calibration with `neoxconv calibrate --covariance`, "
            "or give an importance matrix with --imatrix."
        )
    found, aims = {}, _aims_of(header.keys, header.tensors)
    for name, owner, digest in zip(names, owners, digests, strict=True):
        tensor, sums = header.tensors.get(owner + _MOMENTS), header.tensors.get(name + SUMS)
        if tensor is None or sums is None or tensor.dtype is not F32 or digest == _UNKNOWN:
            raise CheckpointError(f"{path}: the second moments of {owner} are missing; calibrate again.")
        if tensor.rows != sums.rows * (sums.rows + 1) // 2:
            raise CheckpointError(
                f"{path}: the second moments of {owner} have {tensor.rows} numbers, expected those of a triangle of "
                f"{sums.rows} columns; calibrate again."
            )
        found[name] = Moments(sums.rows, digest, _Reader(path, owner, tensor, sums.rows, digest), aims.get(name))
    return found


def _aims_of(keys: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Aim]:
    """The aims in a calibration, by the GGUF names of matrices."""
    pairs = zip(_texts(keys.get(_AIMED)), _texts(keys.get(_TYPES)), strict=False)
    return {name: Aim(tensors[name + _AIM], encoding) for name, encoding in pairs if name + _AIM in tensors}


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
    for name in [name.removesuffix(_GRADIENT) for name in tensors if name.endswith(_GRADIENT)]:
        if name not in shapes:
            raise CheckpointError(f"{path}: {name} is not in the model; the calibration is another model's.")
        rows, columns = (
            _squares(file, name + suffix, tensors.get(name + suffix), count)
            for suffix, count in zip((_GRADIENT, _GRADIENT_INPUTS), shapes[name], strict=True)
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
    owner: str
    tensor: LazyTensor
    side: int
    digest: str

    def __call__(self) -> Floats:
        packed = self.tensor.floats(0, self.tensor.rows)
        if hashlib.sha256(np.ascontiguousarray(packed).data).hexdigest() != self.digest:
            raise CheckpointError(f"{self.path}: the second moments of {self.owner} are damaged; calibrate again.")
        side = self.side
        square = np.empty((side, side), np.float32)
        ends = np.cumsum(np.arange(side, 0, -1))
        for row, end in enumerate(ends.tolist()):
            square[row, row:] = square[row:, row] = packed[end - side + row : end]
        return square

"""A calibration: an importance matrix with the second moments of what each matrix is multiplied with, as one GGUF file.

    NAME.in_sum2 [columns], NAME.counts [1]    as llama.cpp's importance matrix has them (imatrix.py); it reads no more
    NAME.gradient [rows]                       E[g^2] at its outputs, where gradients were asked for
    NAME.gradient_inputs [columns]             E[|g|^2 x^2] / E[|g|^2] at its inputs
    NAME.moments [columns (columns + 1) / 2]   E[x x^T], the upper triangle row after row; once for all that share x
    NAME.outputs [rows (rows + 1) / 2]         E[g g^T], damped, in the same way, where it was asked for
    neoxconv.moments.of, .in, .sha256          for each of the names: whose moments are its own, and their digest
    neoxconv.outputs.of, .sha256               for each of the names that have some: the digest of its outputs

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

from neoxconv.core.encoding import Gradients, Moments, copied
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
_OUTPUTS = ".outputs"
_OUTPUTS_OF, _OUTPUTS_SHA256 = (f"neoxconv.outputs.{name}" for name in ("of", "sha256"))
_GRADIENT, _GRADIENT_INPUTS = ".gradient", ".gradient_inputs"
_UNKNOWN = "0" * 64  # a digest that is not known yet


@dataclass(frozen=True)
class Inputs:
    """What several matrices are multiplied with: the GGUF names of these, the first of which names it, and its size."""

    names: tuple[str, ...]
    columns: int

    @property
    def owner(self) -> str:
        return self.names[0]

    @property
    def packed(self) -> int:
        """Numbers in a triangle."""
        return triangle(self.columns)


def triangle(side: int) -> int:
    """Numbers in the upper triangle of a square."""
    return side * (side + 1) // 2


class Writer:
    """A calibration that is written input after input, at `path`: `begin`, `add` for each, `finish`.

    `gradients`: rows and columns of the matrices whose gradients it will have, by GGUF name; `outputs`: rows of those
    with second moments of gradients, which `add_outputs` writes.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[Inputs, ...],
        keys: Mapping[str, Any],
        tokens: int,
        gradients: Mapping[str, tuple[int, int]],
        outputs: Mapping[str, int],
    ) -> None:
        self.path, self.inputs, self.keys, self.tokens, self.gradients = path, inputs, keys, tokens, gradients
        self.outputs = outputs
        self.digests = dict.fromkeys([each.owner + _MOMENTS for each in inputs], _UNKNOWN)
        self.digests |= dict.fromkeys([name + _OUTPUTS for name in outputs], _UNKNOWN)

    def layout(self) -> FileLayout:
        """Where everything lies; of the same size whatever the digests are."""
        entries = [_vector(name + SUMS, each.columns) for each in self.inputs for name in each.names]
        entries += [_vector(name + COUNTS, 1) for each in self.inputs for name in each.names]
        for name, (rows, columns) in self.gradients.items():
            entries += [_vector(name + _GRADIENT, rows), _vector(name + _GRADIENT_INPUTS, columns)]
        entries += [_vector(each.owner + _MOMENTS, each.packed) for each in self.inputs]
        entries += [_vector(name + _OUTPUTS, triangle(rows)) for name, rows in self.outputs.items()]
        owners = {name: each.owner for each in self.inputs for name in each.names}
        told = {
            _OF: list(owners),
            _IN: list(owners.values()),
            _SHA256: [self.digests[owner + _MOMENTS] for owner in owners.values()],
        }
        if self.outputs:
            told |= {
                _OUTPUTS_OF: list(self.outputs),
                _OUTPUTS_SHA256: [self.digests[name + _OUTPUTS] for name in self.outputs],
            }
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
        sums = (np.diag(moments).astype(np.float64) * self.tokens).astype(np.float32)
        found = self._packed(each.owner + _MOMENTS, moments)
        for name in each.names:
            found |= {name + SUMS: sums, name + COUNTS: np.array([self.tokens], np.float32)}
        self._write(found)

    def add_outputs(self, name: str, outputs: Floats) -> None:
        """Write the second moments [rows, rows] of gradients. Raises CheckpointError where they are not finite."""
        if not np.isfinite(outputs).all():
            raise CheckpointError(f"{self.path}: the gradients at {name} are not finite; check the weights.")
        self._write(self._packed(name + _OUTPUTS, outputs))

    def _packed(self, tensor: str, square: Floats) -> dict[str, Floats]:
        """The upper triangle of a square, by the name of the tensor that holds it; its digest is noted."""
        packed = np.concatenate([square[row, row:] for row in range(len(square))], dtype=np.float32)
        self.digests[tensor] = hashlib.sha256(packed.data).hexdigest()
        return {tensor: packed}

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
    return Entry(
        name, name, LazyTensor((count,), F32, lambda start, stop: np.zeros(stop - start, np.float32), F32), copied(F32)
    )


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
    return {
        name: _moments(path, header.tensors, owner + _MOMENTS, name + SUMS, digest)
        for name, owner, digest in zip(names, owners, digests, strict=True)
    }


def outputs_in(path: Path) -> dict[str, Moments]:
    """The second moments of gradients in a calibration, damped, by the GGUF names of matrices; none where it has none.

    Nothing is read of them yet. Raises CheckpointError where they are incomplete.
    """
    header = gguf.read_header(open_storage(path))
    names, digests = (_texts(header.keys.get(key)) for key in (_OUTPUTS_OF, _OUTPUTS_SHA256))
    if len(names) != len(digests):
        raise CheckpointError(f"{path}: names {len(names)} matrices for {len(digests)} outputs; calibrate again.")
    return {
        name: _moments(path, header.tensors, name + _OUTPUTS, name + _GRADIENT, digest)
        for name, digest in zip(names, digests, strict=True)
    }


def _moments(path: Path, tensors: Mapping[str, LazyTensor], name: str, diagonal: str, digest: str) -> Moments:
    """The moments in the tensor `name`, of a side as long as the tensor `diagonal`. Raises CheckpointError."""
    tensor, sums = tensors.get(name), tensors.get(diagonal)
    if tensor is None or sums is None or tensor.dtype is not F32 or digest == _UNKNOWN:
        raise CheckpointError(f"{path}: {name} is missing; calibrate again.")
    if tensor.rows != triangle(sums.rows):
        raise CheckpointError(
            f"{path}: {name} has {tensor.rows} numbers, expected those of a triangle of {sums.rows}; calibrate again."
        )
    return Moments(sums.rows, digest, _Reader(path, name, tensor, sums.rows, digest))


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
    name: str
    tensor: LazyTensor
    side: int
    digest: str

    def __call__(self) -> Floats:
        packed = self.tensor.floats(0, self.tensor.rows)
        if hashlib.sha256(np.ascontiguousarray(packed).data).hexdigest() != self.digest:
            raise CheckpointError(f"{self.path}: {self.name} is damaged; calibrate again.")
        side = self.side
        square = np.empty((side, side), np.float32)
        ends = np.cumsum(np.arange(side, 0, -1))
        for row, end in enumerate(ends.tolist()):
            square[row, row:] = square[row:, row] = packed[end - side + row : end]
        return square

"""A calibration: an importance matrix with the second moments of what each matrix is multiplied with, as one GGUF file.

    NAME.in_sum2 [columns], NAME.counts [1]    as llama.cpp's importance matrix has them (imatrix.py); it reads no more
    NAME.gradient [rows]                       E[g^2] at its outputs, where gradients were asked for
    NAME.gradient_inputs [columns]             E[|g|^2 x^2] / E[|g|^2] at its inputs
    NAME.moments [columns (columns + 1) / 2]   E[x x^T], the upper triangle row after row; once for all that share x
    NAME.outputs [rows (rows + 1) / 2]         E[g g^T], damped, in the same way, where it was asked for
    NAME.aim [rows, columns]                   what is rounded in its place, where layers were calibrated through others
    neoxconv.moments.of, .in, .sha256          for each of the names: whose moments are its own, and their digest
    neoxconv.outputs.of, .sha256               for each of the names that have some: the digest of its outputs
    neoxconv.aims.of, .types, .sha256          the matrices that have an aim, the type that it is for, its digest
    neoxconv.source                            the digest of the source that it was made of

The file is written layer after layer. Its size is known before the first, and a run that was interrupted goes on.
Until gradients are known, nan stands for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.encoding import Aim, Gradients, Moments, copied
from neoxconv.core.layout import Entry, FileLayout
from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, Array, Floats
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.gguf import write as gguf_write
from neoxconv.formats.imatrix import COUNTS, SUMS, numbers
from neoxconv.storage import Storage, open_storage

_MOMENTS = ".moments"
_OF, _IN, _SHA256 = (f"neoxconv.moments.{name}" for name in ("of", "in", "sha256"))
_OUTPUTS = ".outputs"
_OUTPUTS_OF, _OUTPUTS_SHA256 = (f"neoxconv.outputs.{name}" for name in ("of", "sha256"))
_AIM = ".aim"
_AIMED, _TYPES, _AIMS_SHA256 = (f"neoxconv.aims.{name}" for name in ("of", "types", "sha256"))
_GRADIENT, _GRADIENT_INPUTS = ".gradient", ".gradient_inputs"
SOURCE = "neoxconv.source"
_BAND = 16 << 20  # bytes of moments that are written at a time
_TURNED = 64  # rows of moments that are copied to the other side of the diagonal at a time
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
        return triangle(self.columns)


def triangle(side: int) -> int:
    """Numbers in the upper triangle of a square."""
    return side * (side + 1) // 2


class Writer:
    """A calibration that is written input after input, at `path`: `begin` or `resume`, `add` for each, `finish`.

    `gradients`: rows and columns of the matrices whose gradients it will have, by GGUF name; `outputs`: rows of those
    with second moments of gradients. Nobody else may write the file meanwhile. Raises OSError where the disk does not
    take it.
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
        self.outputs, self.aimed = outputs, [each for each in inputs if each.encoding]
        known = [each.owner + _MOMENTS for each in inputs] + [name + _OUTPUTS for name in outputs]
        self.digests = dict.fromkeys([*known, *(each.owner + _AIM for each in self.aimed)], _UNKNOWN)
        self.descriptor = -1

    @property
    def names(self) -> list[str]:
        """Of all the matrices."""
        return [name for each in self.inputs for name in each.names]

    def layout(self) -> FileLayout:
        """Where everything lies; of the same size whatever the digests are."""
        entries = [_vector(name + SUMS, each.columns) for each in self.inputs for name in each.names]
        entries += [_vector(name + COUNTS, 1) for name in self.names]
        for name, (rows, columns) in self.gradients.items():
            entries += [_vector(name + _GRADIENT, rows), _vector(name + _GRADIENT_INPUTS, columns)]
        entries += [_vector(each.owner + _MOMENTS, each.packed) for each in self.inputs]
        entries += [_vector(name + _OUTPUTS, triangle(rows)) for name, rows in self.outputs.items()]
        entries += [_tensor(each.owner + _AIM, (each.rows, each.columns)) for each in self.aimed]
        owners = {name: each.owner for each in self.inputs for name in each.names}
        told = {
            _OF: list(owners),
            _IN: list(owners.values()),
            _SHA256: [self.digests[owner + _MOMENTS] for owner in owners.values()],
        }
        if self.outputs:
            digests = [self.digests[name + _OUTPUTS] for name in self.outputs]
            told |= {_OUTPUTS_OF: list(self.outputs), _OUTPUTS_SHA256: digests}
        if self.aimed:
            told |= {
                _AIMED: [each.owner for each in self.aimed],
                _TYPES: [each.encoding for each in self.aimed],
                _AIMS_SHA256: [self.digests[each.owner + _AIM] for each in self.aimed],
            }
        (file,) = gguf_write.layout("calibration", {"general.type": "imatrix", **self.keys, **told}, entries, None)
        return file

    def begin(self, *, again: bool) -> None:
        """Make the file, without what is still to come. Raises OSError where there is one, unless it is ours."""
        self.descriptor = self._taken(os.O_CREAT if again else os.O_CREAT | os.O_EXCL)
        self.digests = dict.fromkeys(self.digests, _UNKNOWN)
        os.truncate(self.descriptor, 0)
        os.truncate(self.descriptor, self.layout().size)
        nothing = Gradients(np.array([np.nan], np.float32), np.array([np.nan], np.float32))
        self._write(_named(dict.fromkeys(self.gradients, nothing)))

    def resume(self, digests: Mapping[str, str]) -> bool:
        """Go on with a file in which moments have these digests; False where it cannot be the one that was begun."""
        if set(digests) != set(self.digests) or not self.path.is_file() or self.path.is_symlink():
            return False
        if self.path.stat().st_size != self.layout().size:
            return False
        self.descriptor, self.digests = self._taken(), dict(digests)
        return True

    def _taken(self, flags: int = 0) -> int:
        """The file, open and locked; raises PlanError where another process has it. Links are not followed."""
        import fcntl

        descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise PlanError(f"{self.path}: another run is at work there; wait until it ends, or stop it.") from error
        except OSError:  # a file system without locks
            pass
        return descriptor

    def add(self, each: Inputs, sums: Floats) -> None:
        """Write the second moments of inputs, of sums over tokens [columns, columns], whose upper triangle is read.

        Raises CheckpointError where they are not finite.
        """
        self._add(each.owner + _MOMENTS, sums, self.tokens, f"what {each.owner} is multiplied with is")
        told: dict[str, Floats] = {}
        for name in each.names:
            told |= {name + SUMS: np.diag(sums), name + COUNTS: np.array([self.tokens], np.float32)}
        self._write(told)

    def add_outputs(self, name: str, outputs: Floats) -> None:
        """Write the second moments [rows, rows] of gradients. Raises CheckpointError where they are not finite."""
        self._add(name + _OUTPUTS, outputs, 1, f"gradients at {name} are")
        self._write({})

    def _add(self, tensor: str, sums: Floats, count: int, what: str) -> None:
        """Write the upper triangle of sums over `count`, and note its digest."""
        (start,) = (slot.offset for slot in self.layout().slots if slot.entry.name == tensor)
        digest = hashlib.sha256()
        for packed in _packed(sums, count):
            if not np.isfinite(packed).all():
                raise CheckpointError(f"{self.path}: {what} not finite; check the weights.")
            digest.update(packed.data)
            _write_all(self.descriptor, packed, start)
            start += packed.nbytes
        self.digests[tensor] = digest.hexdigest()

    def add_aim(self, each: Inputs, rows: Floats) -> None:
        """Write what is rounded in place of the matrix [rows, columns] that has these inputs."""
        rows = np.ascontiguousarray(rows)
        self.digests[each.owner + _AIM] = hashlib.sha256(rows.data).hexdigest()
        self._write({each.owner + _AIM: rows})

    def finish(self, gradients: Mapping[str, Gradients]) -> None:
        """Write the digests and, by the GGUF names of matrices, gradients, and have all of it on disk."""
        self._write(_named(gradients))

    def close(self) -> None:
        """Let go of the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def _write(self, tensors: Mapping[str, Floats]) -> None:
        """Write the header and tensors at their places, and have them on disk."""
        file = self.layout()
        offsets = {slot.entry.name: slot.offset for slot in file.slots}
        for offset, data in file.pieces:
            _write_all(self.descriptor, np.frombuffer(data, np.uint8), offset)
        for name, values in tensors.items():
            _write_all(self.descriptor, np.ascontiguousarray(values), offsets[name])
        os.fsync(self.descriptor)


def _write_all(descriptor: int, values: Array, offset: int) -> None:
    """Write all of an array at `offset`; one pwrite may write less."""
    view = values.reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _packed(sums: Floats, tokens: int) -> Iterator[Floats]:
    """The upper triangle of sums [columns, columns], a band of rows after the other, over how many there were."""
    step = max(1, _BAND // (4 * len(sums)))
    for start in range(0, len(sums), step):
        rows = sums[start : start + step, start:] / np.float32(tokens)
        yield np.concatenate([row[i:] for i, row in enumerate(rows)])


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


def source_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of what a source is: its files' names, sizes and headers, and how its ranks were joined."""
    files = [(file.storage.name, file.storage.size, file.checksum) for file in checkpoint.index.files]
    told = files, checkpoint.norms, sorted(checkpoint.unusual.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()


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
        if not name.endswith((_MOMENTS, _OUTPUTS, _AIM)):
            digest.update(numbers(file, tensor, name).data)
    return digest.hexdigest()


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
    found = {
        name: _moments(path, header.tensors, (owner + _MOMENTS, name + SUMS), digest, f"second moments of {owner}")
        for name, owner, digest in zip(names, owners, digests, strict=True)
    }
    aims = _aims_of(header.keys, header.tensors)
    return {name: replace(moments, aim=aims.get(name)) for name, moments in found.items()}


def outputs_in(path: Path) -> dict[str, Moments]:
    """The second moments of gradients in a calibration, damped, by the GGUF names of matrices; none where it has none.

    Nothing is read of them yet. Raises CheckpointError where they are incomplete.
    """
    header = gguf.read_header(open_storage(path))
    names, digests = (_texts(header.keys.get(key)) for key in (_OUTPUTS_OF, _OUTPUTS_SHA256))
    if len(names) != len(digests):
        raise CheckpointError(f"{path}: names {len(names)} matrices for {len(digests)} outputs; calibrate again.")
    return {
        name: _moments(path, header.tensors, (name + _OUTPUTS, name + _GRADIENT), digest, f"outputs of {name}")
        for name, digest in zip(names, digests, strict=True)
    }


def _moments(path: Path, tensors: Mapping[str, LazyTensor], names: tuple[str, str], digest: str, what: str) -> Moments:
    """The moments in the first of two tensors, of a side as long as the second. Raises CheckpointError."""
    tensor, sums = (tensors.get(name) for name in names)
    if tensor is None or sums is None or tensor.dtype is not F32 or digest == _UNKNOWN:
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

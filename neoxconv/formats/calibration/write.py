"""A calibration is written layer after layer, in place, and goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.encoding import Gradients
from neoxconv.core.layout import FileLayout
from neoxconv.dtypes import Floats
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.calibration.names import (
    AIM,
    AIMED,
    AIMS_SHA256,
    GRADIENT,
    GRADIENT_INPUTS,
    IN,
    MOMENTS,
    OF,
    OUTPUTS,
    OUTPUTS_OF,
    OUTPUTS_SHA256,
    SHA256,
    TYPES,
    UNKNOWN,
    Inputs,
    tensor,
    triangle,
    vector,
)  # fmt: skip
from neoxconv.formats.gguf import write as gguf_write
from neoxconv.formats.imatrix import COUNTS, SUMS
from neoxconv.storage import write_all

_BAND = 16 << 20  # bytes of moments that are written at a time


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
        known = [each.owner + MOMENTS for each in inputs] + [name + OUTPUTS for name in outputs]
        self.digests = dict.fromkeys([*known, *(each.owner + AIM for each in self.aimed)], UNKNOWN)
        self.descriptor = -1

    @property
    def names(self) -> list[str]:
        """Of all the matrices."""
        return [name for each in self.inputs for name in each.names]

    def layout(self) -> FileLayout:
        """Where everything lies; of the same size whatever the digests are."""
        entries = [vector(name + SUMS, each.columns) for each in self.inputs for name in each.names]
        entries += [vector(name + COUNTS, 1) for name in self.names]
        for name, (rows, columns) in self.gradients.items():
            entries += [vector(name + GRADIENT, rows), vector(name + GRADIENT_INPUTS, columns)]
        entries += [vector(each.owner + MOMENTS, each.packed) for each in self.inputs]
        entries += [vector(name + OUTPUTS, triangle(rows)) for name, rows in self.outputs.items()]
        entries += [tensor(each.owner + AIM, (each.rows, each.columns)) for each in self.aimed]
        owners = {name: each.owner for each in self.inputs for name in each.names}
        told = {
            OF: list(owners),
            IN: list(owners.values()),
            SHA256: [self.digests[owner + MOMENTS] for owner in owners.values()],
        }
        if self.outputs:
            digests = [self.digests[name + OUTPUTS] for name in self.outputs]
            told |= {OUTPUTS_OF: list(self.outputs), OUTPUTS_SHA256: digests}
        if self.aimed:
            told |= {
                AIMED: [each.owner for each in self.aimed],
                TYPES: [each.encoding for each in self.aimed],
                AIMS_SHA256: [self.digests[each.owner + AIM] for each in self.aimed],
            }
        (file,) = gguf_write.layout("calibration", {"general.type": "imatrix", **self.keys, **told}, entries, None)
        return file

    def begin(self, *, again: bool) -> None:
        """Make the file, without what is still to come. Raises OSError where there is one, unless it is ours."""
        self.descriptor = self._taken(os.O_CREAT if again else os.O_CREAT | os.O_EXCL)
        self.digests = dict.fromkeys(self.digests, UNKNOWN)
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
        self._add(each.owner + MOMENTS, sums, self.tokens, f"what {each.owner} is multiplied with is")
        told: dict[str, Floats] = {}
        for name in each.names:
            told |= {name + SUMS: np.diag(sums), name + COUNTS: np.array([self.tokens], np.float32)}
        self._write(told)

    def add_outputs(self, name: str, outputs: Floats) -> None:
        """Write the second moments [rows, rows] of gradients. Raises CheckpointError where they are not finite."""
        self._add(name + OUTPUTS, outputs, 1, f"gradients at {name} are")
        self._write({})

    def _add(self, tensor: str, sums: Floats, count: int, what: str) -> None:
        """Write the upper triangle of sums over `count`, and note its digest."""
        (start,) = (slot.offset for slot in self.layout().slots if slot.entry.name == tensor)
        digest = hashlib.sha256()
        for packed in _packed(sums, count):
            if not np.isfinite(packed).all():
                raise CheckpointError(f"{self.path}: {what} not finite; check the weights.")
            digest.update(packed.data)
            write_all(self.descriptor, packed.view(np.uint8), start)
            start += packed.nbytes
        self.digests[tensor] = digest.hexdigest()

    def add_aim(self, each: Inputs, rows: Floats) -> None:
        """Write what is rounded in place of the matrix [rows, columns] that has these inputs."""
        rows = np.ascontiguousarray(rows)
        self.digests[each.owner + AIM] = hashlib.sha256(rows.data).hexdigest()
        self._write({each.owner + AIM: rows})

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
            write_all(self.descriptor, np.frombuffer(data, np.uint8), offset)
        for name, values in tensors.items():
            write_all(self.descriptor, np.ascontiguousarray(values).reshape(-1).view(np.uint8), offsets[name])
        os.fsync(self.descriptor)


def _packed(sums: Floats, tokens: int) -> Iterator[Floats]:
    """The upper triangle of sums [columns, columns], a band of rows after the other, over how many there were."""
    step = max(1, _BAND // (4 * len(sums)))
    for start in range(0, len(sums), step):
        rows = sums[start : start + step, start:] / np.float32(tokens)
        yield np.concatenate([row[i:] for i, row in enumerate(rows)])


def _named(gradients: Mapping[str, Gradients]) -> dict[str, Floats]:
    """Gradients by the names of the tensors that hold them."""
    rows = {name + GRADIENT: found.rows for name, found in gradients.items()}
    return rows | {name + GRADIENT_INPUTS: found.columns for name, found in gradients.items()}

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
from dataclasses import dataclass

import numpy as np

from neoxconv.core.encoding import copied
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32

MOMENTS = ".moments"
OF, IN, SHA256 = (f"neoxconv.moments.{name}" for name in ("of", "in", "sha256"))
OUTPUTS = ".outputs"
OUTPUTS_OF, OUTPUTS_SHA256 = (f"neoxconv.outputs.{name}" for name in ("of", "sha256"))
AIM = ".aim"
AIMED, TYPES, AIMS_SHA256 = (f"neoxconv.aims.{name}" for name in ("of", "types", "sha256"))
GRADIENT, GRADIENT_INPUTS = ".gradient", ".gradient_inputs"
SOURCE = "neoxconv.source"
UNKNOWN = "0" * 64  # a digest that is not known yet


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


def vector(name: str, count: int) -> Entry:
    """A vector of float32 that nobody reads yet."""
    return tensor(name, (count,))


def tensor(name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor of float32 that nobody reads yet."""
    nothing = LazyTensor(shape, F32, lambda start, stop: np.zeros((stop - start, *shape[1:]), np.float32), F32)
    return Entry(name, name, nothing, copied(F32))


def source_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of what a source is: its files' names, sizes and headers, and how its ranks were joined."""
    files = [(file.storage.name, file.storage.size, file.checksum) for file in checkpoint.index.files]
    told = files, checkpoint.norms, sorted(checkpoint.unusual.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()

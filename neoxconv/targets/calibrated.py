"""What a calibration says of a model's matrices: whose inputs it measured, and whether the model is another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neoxconv.core.encoding import Context, Moments
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError, escaped, raise_all
from neoxconv.formats import imatrix
from neoxconv.formats.calibration.names import source_digest
from neoxconv.formats.calibration.read import digest_of, moments_in, source_of
from neoxconv.formats.imatrix import Matrix

# What files say of it, GGUF's keys and config.json: the digest of the calibration by which codes were chosen.
KEY, SETTING = "neoxconv.calibration", "neoxconv_calibration"


@dataclass(frozen=True)
class Calibration:
    """The second moments of what matrices are multiplied with, by their unified names."""

    digest: str
    moments: Mapping[str, Moments]
    notes: tuple[str, ...]

    def context(self, entry: Entry) -> Context | None:
        """What an entry's encoder is to know."""
        return Context(moments=self.moments[entry.name]) if entry.name in self.moments else None

    def applied(self, entries: list[Entry]) -> list[Entry]:
        """The entries, those of matrices with the moments of their inputs."""
        return [replace(entry, context=self.context(entry)) for entry in entries]


def chosen_by(settings: Mapping[str, Any]) -> str | None:
    """The digest of the calibration by which a target's codes were chosen, as it says."""
    found = settings.get(KEY, settings.get(SETTING))
    return None if found is None else str(found)


def calibration_for(checkpoint: Checkpoint, path: Path) -> Calibration:
    """A calibration of the model. Raises PlanError where it is another model's, or lacks a matrix.

    A calibration has GGUF's names, and what a matrix is multiplied with is the same in every format.
    """
    matrix, found = imatrix.read(path), moments_in(path)
    architecture, config = checkpoint.architecture, checkpoint.config
    matrices = [weight for _, weight in architecture.names(config) if len(weight.shape) == 2]
    linear = {weight.gguf: weight.unified for weight in matrices if weight.linear}
    if "" in linear:
        raise PlanError(
            f"--calibration: GGUF has no names for the matrices of {architecture.title}, by which a calibration knows "
            "them; leave it out, or give --to gguf."
        )
    refuse_others(matrix, {weight.gguf: config.sizes[weight.shape[1]] for weight in matrices})
    raise_all(PlanError, (
        f"{path}: has no second moments for {name}; calibrate this model again."
        for name in linear if name not in found
    ))  # fmt: skip
    if any(moments.aim for moments in found.values()):
        raise PlanError(f"{path}: was made through a type of GGUF; calibrate with --covariance for other formats.")
    digest, moments = digest_of(path), {unified: found[name] for name, unified in linear.items()}
    done = f"codes chosen together in {len(moments)} matrices, by the calibration of digest {digest}"
    return Calibration(digest, moments, (done, *notes_on_source(checkpoint, path)))


def notes_on_source(checkpoint: Checkpoint, path: Path) -> list[str]:
    """A word where a calibration was made of other files, which may be the same model in another format."""
    if source_of(path) == source_digest(checkpoint):
        return []
    return [
        f"{escaped(path)} was made of other files than this source: right for the same model in another format, "
        "wrong for another model"
    ]


def refuse_others(matrix: Matrix, columns: Mapping[str, int]) -> None:
    """Raise PlanError where a matrix has importances of what is none of a model's tensors, of so many columns each."""
    raise_all(PlanError, (
        f"{matrix.path}: {name} has importances of {values.size} columns, the model's has {columns[name]}; "
        "the matrix is another model's."
        if name in columns
        else f"{matrix.path}: {name} is not in the model; the matrix is another model's."
        for name, values in matrix.entries.items()
        if columns.get(name) != values.size
    ))  # fmt: skip

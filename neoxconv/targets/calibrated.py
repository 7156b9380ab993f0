"""What a calibration or an importance matrix says of a model's matrices, and whether the model is another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neoxconv.core.encoding import Aim, Context, Moments, Scaled
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import F32
from neoxconv.errors import PlanError, escaped, raise_all
from neoxconv.formats import imatrix
from neoxconv.formats.calibration.names import source_digest
from neoxconv.formats.calibration.read import digest_of, moments_in, outputs_in, source_of
from neoxconv.formats.imatrix import Matrix
from neoxconv.targets.recipe import Recipe

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
        return Context(moments=self.moments[entry.unified]) if entry.unified in self.moments else None

    def applied(self, entries: list[Entry]) -> list[Entry]:
        """The entries, those of matrices with the moments of their inputs."""
        return [replace(entry, context=self.context(entry)) for entry in entries]


def chosen_by(settings: Mapping[str, Any]) -> str | None:
    """The digest of the calibration by which a target's codes were chosen, as it says."""
    found = settings.get(KEY, settings.get(SETTING))
    return None if found is None else str(found)


def calibration_for(checkpoint: Checkpoint, path: Path, entries: Sequence[Entry]) -> Calibration:
    """A calibration of the model, for the matrices whose scales lie beside them, by the entries: a head may be one.

    Raises PlanError where it is another model's, or lacks a matrix. A calibration has GGUF's names, and what a matrix
    is multiplied with is the same in every format.
    """
    matrix, found = imatrix.read(path), moments_in(path)
    architecture, config = checkpoint.architecture, checkpoint.config
    matrices = [weight for _, weight in architecture.names(config) if len(weight.shape) == 2]
    scaled = {entry.unified for entry in entries if isinstance(entry.encoding, Scaled)}
    chosen = [weight for weight in matrices if weight.unified in scaled and (weight.linear or weight.gguf in found)]
    linear = {weight.gguf: weight.unified for weight in chosen}
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


def with_contexts(
    entries: list[Entry], matrix: Matrix | None, moments: Mapping[str, Moments], recipe: Recipe
) -> list[Entry]:
    """The entries, each with the importance of its columns, and with --calibration with the moments that are in it.

    Raises PlanError where the matrix is another model's.
    """
    found, thorough = matrix.entries if matrix else {}, recipe.effort == "high"
    if matrix:
        refuse_others(matrix, {entry.name: entry.tensor.columns for entry in entries})
    useful = [name for name, values in found.items() if values.any()]
    outputs = outputs_in(recipe.calibration) if recipe.calibration else {}
    aims = {name: known.aim.rows for name, known in moments.items() if known.aim}
    raise_all(PlanError, (
        f"{recipe.calibration}: the aim of {entry.name} is {aims[entry.name].dtype.name} "
        f"{list(aims[entry.name].shape)}, expected F32 {list(entry.tensor.shape)}; the calibration is another model's, "
        "or damaged: calibrate again."
        for entry in entries
        if entry.name in aims and (aims[entry.name].shape, aims[entry.name].dtype) != (entry.tensor.shape, F32)
    ))  # fmt: skip

    def with_context(entry: Entry) -> Entry:
        known = moments.get(entry.name) if entry.grid else None
        importance = found.get(entry.name) if entry.name in useful else None
        tensor = aims.get(entry.name, entry.tensor) if known else entry.tensor
        context = Context(importance, thorough, known, outputs.get(entry.name) if known else None)
        return replace(entry, tensor=tensor, context=context)

    return [with_context(entry) if entry.search and (thorough or entry.name in useful) else entry for entry in entries]


def check_aims(entries: Sequence[Entry], aims: Mapping[str, Aim], recipe: Recipe) -> None:
    """Raise PlanError where aims of a calibration are for other types than these."""
    aimed = [(entry, aims[entry.name]) for entry in entries if entry.name in aims]
    raise_all(PlanError, (
        f"{recipe.calibration}: was made through {entry.name} as {aim.encoding}, and here it is {entry.encoding.name}; "
        "calibrate --through the type that you convert to."
        for entry, aim in aimed if aim.encoding != entry.encoding.name
    ))  # fmt: skip

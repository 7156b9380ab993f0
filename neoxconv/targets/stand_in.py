"""A checkpoint in a format that does not know its family: written as another family's that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neoxconv.core.model import Architecture, Checkpoint, StandIn
from neoxconv.errors import PlanError
from neoxconv.quant import decoded
from neoxconv.sources import SOURCES

_WORDS = {"gguf": "GGUF", "neox": "gpt-neox"}  # formats by whose names they have, as messages call them


def written_as(checkpoint: Checkpoint, naming: str, asked: str | None = None) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint as it goes into a format of that naming ("gguf" or "neox"), and notes on what it was made.

    `asked` is the family that the user wants it written as. Raises PlanError where the format has no such family, or
    only one that is not quite the same and was not asked for.
    """
    architecture = checkpoint.architecture
    if _has_words(architecture, naming) and asked in (None, architecture.name):
        return checkpoint, ()
    known = architecture.stand_ins.get(naming, {})
    family = asked or next((name for name, each in known.items() if not each.note(checkpoint.config)), None)
    if family is None or family not in known:
        raise PlanError(_refused(checkpoint, naming, known, asked))
    limit = known[family].note(checkpoint.config)
    same = f"which {limit}" if limit else "which computes the same function"
    plain = replace(checkpoint, tensors={name: decoded(tensor) for name, tensor in checkpoint.tensors.items()})
    note = f"{_WORDS[naming]} has no {architecture.name}: written as {family}, {same}"
    return known[family].make(plain), (note,)


def as_the_targets(source: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The source as its target's family, where the target's format has that one in its place; else as it is."""
    naming, family = SOURCES[target.index.format].naming, target.architecture.name
    known = source.architecture.stand_ins.get(naming, {})
    return written_as(source, naming, family)[0] if family in known and family != source.architecture.name else source


def _has_words(architecture: Architecture, naming: str) -> bool:
    """Whether a format can say a family's hyperparameters."""
    return (architecture.to_gguf if naming == "gguf" else architecture.to_neox) is not None


def _refused(checkpoint: Checkpoint, naming: str, known: Mapping[str, StandIn], asked: str | None) -> str:
    """Why a checkpoint is not written, and what to do."""
    where, name, format = checkpoint.index.where, checkpoint.architecture.name, _WORDS[naming]
    ways = "; ".join(f"--as {other} {each.note(checkpoint.config) or 'is the same'}" for other, each in known.items())
    if asked:
        return f"--as {asked}: {where} is a {name} model; {ways or 'leave the option out'}."
    return f"{where}: {format} has no {name}; {ways or 'and no family that computes the same; give another target'}."

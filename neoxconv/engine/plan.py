"""Everything is decided before anything is written: the target's files, every size, offset and encoding.

A plan is made from an open checkpoint and a recipe. It can be printed, priced, compared and resumed: its fingerprint
covers the sources' names, sizes and headers, the configuration, the recipe, this version and every byte range.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from neoxconv.core.layout import Entry, FileLayout, Slot
from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError, PlanError, raise_all
from neoxconv.storage import origin_of, together
from neoxconv.targets import TARGETS, content_of
from neoxconv.targets.recipe import Recipe
from neoxconv.version import __version__
from neoxconv.words import plural


@dataclass(frozen=True)
class Step:
    """A tensor to be written: the places of its parts in a file of the plan, that of the codes first."""

    number: int  # among the plan's steps
    file: FileLayout
    slots: tuple[Slot, ...]

    @property
    def entry(self) -> Entry:
        return self.slots[0].entry

    @property
    def nbytes(self) -> int:
        return sum(slot.part.nbytes for slot in self.slots)

    @property
    def keys(self) -> list[str]:
        """What journals and manifests call the slots."""
        return [slot_key(self.file, slot) for slot in self.slots]


def slot_key(file: FileLayout, slot: Slot) -> str:
    return f"{file.name}@{slot.offset}"


def _by_entry(file: FileLayout) -> list[tuple[Slot, ...]]:
    """The slots of every entry of a file, in the order of their codes."""
    slots: dict[str, list[Slot]] = {slot.entry.name: [] for slot in file.slots if slot.number == 0}
    for slot in sorted(file.slots, key=lambda slot: slot.number):
        slots[slot.entry.name].append(slot)
    return [tuple(group) for group in slots.values()]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be written. `sidecars` are whole small files; `single` means that the target is one file."""

    checkpoint: Checkpoint
    recipe: Recipe
    files: tuple[FileLayout, ...]
    sidecars: dict[str, bytes]
    notes: tuple[str, ...]
    tokenizer: Mapping[str, Any]  # the one that was chosen, as the content says
    single: bool
    name: str  # of the file or folder where nobody gives one
    kind: str  # what the type of its matrices is called
    card: bytes  # what its README.md says

    @cached_property
    def steps(self) -> list[Step]:
        """A tensor each, in the order of files and offsets."""
        found = [(file, slots) for file in self.files for slots in _by_entry(file)]
        return [Step(number, file, slots) for number, (file, slots) in enumerate(found)]

    def steps_of(self, file: FileLayout) -> list[Step]:
        """The steps that write a file."""
        return [step for step in self.steps if step.file is file]

    def nbytes_of(self, name: str) -> int:
        """Bytes of the tensors in the file of that name."""
        return sum(step.nbytes for step in self.steps if step.file.name == name)

    @property
    def source(self) -> str:
        """What messages call the source."""
        return str(self.checkpoint.index.where)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name (the manifest, which is written last, is not among them)."""
        return {file.name: file.size for file in self.files} | {name: len(data) for name, data in self.sidecars.items()}

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def kept(self) -> int:
        """Bytes that a worker holds at most until a tensor is done."""
        return max((step.entry.kept for step in self.steps), default=0)

    @property
    def encodings(self) -> dict[str, int]:
        """How many tensors each encoding gets."""
        return dict(Counter(step.entry.encoding.name for step in self.steps))

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The source files by name, size and the SHA-256 of what describes their contents."""
        return [
            {"name": file.storage.name, "bytes": file.storage.size, "checksum": file.checksum}
            for file in self.checkpoint.index.files
        ]

    @property
    def origin(self) -> dict[str, str]:
        """The URL and the commit of a source on the Hub; nothing of others."""
        return origin_of(self.checkpoint.opening.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the target's bytes."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def command(self) -> str:
        """SHA-256 over what was asked for: the same for a source at the same place that has changed."""
        checkpoint = self.checkpoint
        where = str(checkpoint.index.where.absolute())
        asked = {"source": where, "recipe": self.recipe.facts, "norms": checkpoint.norms, **checkpoint.unusual}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What the fingerprint covers."""
        return {
            "version": __version__,
            "sources": self.sources,
            "config": self.checkpoint.config.facts,
            "norms": self.checkpoint.norms,
            **self.checkpoint.unusual,
            "recipe": self.recipe.facts,
            "files": [
                [
                    file.name,
                    file.size,
                    _pieces_digest(file),
                    [[s.offset, s.number, *s.entry.facts] for s in file.slots],
                ]
                for file in self.files
            ],
            "sidecars": {name: hashlib.sha256(data).hexdigest() for name, data in self.sidecars.items()},
        }


def _pieces_digest(file: FileLayout) -> str:
    """SHA-256 of the bytes of a file that are known before any tensor: headers with all that they say."""
    digest = hashlib.sha256()
    for offset, piece in file.pieces:
        digest.update(f"{offset} {len(piece)} ".encode() + piece)
    return digest.hexdigest()


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan for `recipe`; raises PlanError where the target cannot express the model."""
    if recipe.format not in TARGETS:
        raise PlanError(f"--to {recipe.format}: expected one of {', '.join(TARGETS)}.")
    target = TARGETS[recipe.format]
    content = content_of(checkpoint, recipe)
    entries = [slot.entry for file in content.files for slot in file.slots if slot.number == 0]
    return Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        files=content.files,
        sidecars=content.sidecars,
        notes=(*checkpoint.notes, *content.notes, *_lossy_notes(checkpoint, entries)),
        tokenizer=content.tokenizer,
        name=content.name,
        kind=content.kind,
        card=content.card,
        single=target.single and len(content.files) == 1 and not recipe.split_size,
    )


def _lossy_notes(checkpoint: Checkpoint, entries: Sequence[Entry]) -> list[str]:
    """What is lost because the source is quantized already."""
    types = [tensor.dtype.name for tensor in checkpoint.tensors.values() if tensor.dtype.quantized]
    again = [e for e in entries if e.tensor.dtype.quantized and e.encoding.dtype.quantized and not e.copied]
    notes = []
    if types:
        notes.append(
            f"the source is quantized ({', '.join(dict.fromkeys(types))}): its weights are not the original ones"
        )
    if again:
        notes.append(
            f"WARNING: {plural(len(again), 'tensor')} quantized a second time, which adds errors to errors; "
            "convert from the original checkpoint where you can"
        )
    return notes


def resume_key(plan: Plan) -> str:
    """What unfinished work must agree in: the plan, and sources unchanged since; headers say nothing of the weights."""
    states = [file.storage.state for file in plan.checkpoint.index.files]
    return hashlib.sha256(f"{plan.fingerprint} {states}".encode()).hexdigest()


def check_sources(plan: Plan) -> None:
    """Raise CheckpointError where a file far away is not the one that was opened; not every store tells on reading."""
    files = [file.storage for file in plan.checkpoint.index.files]
    changed = together(lambda file: file.has_changed(), files, plan.checkpoint.index.folder)
    raise_all(CheckpointError, (
        f"{file.path}: has changed while it was read; convert again from a source that stays."
        for file, differs in zip(files, changed, strict=True) if differs
    ))  # fmt: skip

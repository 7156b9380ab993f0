"""What a command's options ask for: a checkpoint opened as they say; a conversion checked, shown and carried out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.recipes import recipe_of
from neoxconv.cli.source import Given, Reading, checked, chosen, opened
from neoxconv.core.model import Checkpoint
from neoxconv.engine import run as engine
from neoxconv.engine.cards import check_card, write_card
from neoxconv.engine.checks import DECODED
from neoxconv.engine.memory import check_memory
from neoxconv.engine.plan import Plan, make_plan
from neoxconv.engine.target_place import target_of
from neoxconv.engine.together import prepare_all
from neoxconv.engine.workplace import free_for, work_of
from neoxconv.errors import CheckpointError, PlanError, escaped, raise_all
from neoxconv.sources import SOURCES, integrity
from neoxconv.sources.checkpoint import rank_difference
from neoxconv.storage import Place, holds
from neoxconv.targets.carried import tokenizer_line
from neoxconv.words import plural, shell, size, table


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversion that is planned and allowed; nothing is written yet but what an interrupted run has `done`."""

    source: Place
    reading: Reading
    conversion: engine.Conversion
    done: int  # steps
    card: bool = False  # to be written beside the target
    check: integrity.Integrity | None = None  # of the source, where it was asked for

    @property
    def plan(self) -> Plan:
        return self.conversion.plan

    @property
    def target(self) -> Place:
        return self.conversion.target

    @property
    def notes(self) -> tuple[str, ...]:
        """The plan's notes, and options that have no effect."""
        idle = self.idle_norms
        notes = [f"--norms {self.reading.norms} does nothing here: {idle}"] if idle else []
        if self.done:
            notes.append(f"continues: {self.done} of {len(self.plan.steps)} tensors are done and are hashed again")
        return (*self.plan.notes, *notes)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by the name that it will have."""
        return {self.target.name: self.plan.total} if self.plan.single else self.plan.sizes

    @property
    def idle_norms(self) -> str | None:
        """Why --norms, if it was given, has no effect; None where it has."""
        ranks = len(self.plan.checkpoint.index.ranks)
        if not self.reading.norms:
            return None
        if ranks == 1:
            return "the source has no ranks to merge"
        recipe = self.plan.recipe
        same = recipe.format == "slim" and (recipe.tp or ranks) == ranks
        return "slim at the source's own degree keeps each rank's norms" if same else None

    @property
    def free(self) -> int:
        """Bytes free on the disk where the target is made."""
        return free_for(work_of(self.target))

    @property
    def facts(self) -> dict[str, Any]:
        """The whole plan as plain values."""
        return {
            "bytes_total": self.plan.total,
            "files": [{"name": name, "bytes": count} for name, count in self.sizes.items()],
            "peak_memory": self.conversion.budget.peak,
            "disk_free": self.free,
            "tokenizer": dict(self.plan.tokenizer) or None,
            "notes": list(self.notes),
        }

    @property
    def summary(self) -> str:
        """The plan in a few lines."""
        plan = self.plan
        rows = [
            *self.about_source,
            ("target", f"{plan.recipe.format} {self.target}"),
            ("tensors", self.tensors),
            ("tokenizer", tokenizer_line(plan.tokenizer)),
            ("size", f"{plan.total:,} bytes ({size(plan.total)}) in {plural(len(plan.sizes), 'file')}"),
            ("memory", self.memory),
        ]
        return table("<<", rows + [("note", note) for note in self.notes])

    @property
    def about_source(self) -> list[tuple[str, str]]:
        """What is read, and how."""
        checkpoint = self.plan.checkpoint
        index, ranks = checkpoint.index, len(checkpoint.index.ranks)
        rows = [
            ("source", f"{SOURCES[index.format].title} {self.source}, {plural(len(index.files), 'file')}, TP {ranks}")
        ]
        if index.replaced:
            rows.append(("weights", "master: the optimizer's fp32"))
        if ranks > 1:
            rows.append(
                ("norms", f"{checkpoint.norms}; the ranks' own differ by {rank_difference(checkpoint):.3g} at most")
            )
        if self.check:
            rows.append(("check", self.check.verdict))
        return rows

    @property
    def tensors(self) -> str:
        """How many tensors each encoding gets."""
        return ", ".join(f"{count} {name}" for name, count in self.plan.encodings.items())

    @property
    def memory(self) -> str:
        """What is taken of it at most, and where."""
        budget = self.conversion.budget
        return f"{size(budget.peak)} at most with {plural(budget.jobs, 'thread')}{self.elsewhere}"

    @property
    def elsewhere(self) -> str:
        """Where else than here the work is done."""
        return f", on each worker of {executor}" if (executor := self.conversion.executor) else ""

    @property
    def listing(self) -> str:
        """The whole plan: its summary, every file, and the disk."""
        files = table("<>", [(name, f"{count:,}") for name, count in self.sizes.items()])
        disk = f"  disk     {self.plan.total:,} bytes needed, {self.free:,} free"
        return f"{self.summary}\n\n{files}\n\n{disk}"

    def run(self, quiet: bool) -> dict[str, Any]:
        """Carry the request out; what came of it as plain values."""
        begin = time.monotonic()
        total = sum(step.nbytes for step in self.plan.steps)
        with progress_bar(total, "converting", quiet) as progress:
            try:
                made = engine.carry_out(self.conversion, progress)
            except KeyboardInterrupt as stop:
                raise type(stop)(f"{self.target}: not finished; run the same command again to continue.") from stop
        self.write_card()
        return self.result(made, time.monotonic() - begin)

    def write_card(self) -> None:
        """Write the card beside a single file, where it was asked for; a folder has its own in it."""
        if self.card:
            write_card(Path(str(self.target)), self.plan.card)

    def result(self, made: engine.Done, seconds: float) -> dict[str, Any]:
        """What came of it, as plain values."""
        return {
            "target": str(self.target),
            "bytes_total": self.plan.total,
            "seconds": round(seconds, 3),
            "notes": [*self.notes],
            "overflow": made.overflow,
            "verified": self.verified,
        }

    @property
    def verified(self) -> int:
        """How many tensors are decoded and compared while they are written; the others are copied as they are."""
        if DECODED not in self.conversion.checks:
            return 0
        return sum(not step.entry.copied for step in self.plan.steps)

    def farewell(self, result: Mapping[str, Any]) -> str:
        """What was made, and what to do next."""
        words = ["neoxconv", "verify", str(self.source), str(self.target), *self.reading.words]
        calibration = self.plan.recipe.calibration
        check = shell([*words, "--calibration", str(calibration)] if calibration else words)
        lines = [
            f"  overflow {plural(count, 'weight')} of {name} beyond the type's largest number, which they became"
            for name, count in result["overflow"].items()
        ]
        if self.verified:
            copied = len(self.plan.steps) - self.verified
            lines.append(
                f"  verified {plural(self.verified, 'tensor')} as they were written, {copied} copied as they are"
            )
        return "\n".join(
            [*lines, f"{escaped(self.target)}: {size(self.plan.total)} in {result['seconds']:.1f} s; next: {check}"]
        )


def prepare(source: Place, target: Place | str, given: Given) -> Request:
    """The plan for a conversion. Raises UsageError, CheckpointError or PlanError where it cannot be carried out."""
    recipe = recipe_of(given)
    plan = make_plan(source_as_asked(source, given), recipe)
    return requests(source, {target: plan}, given)[0]


def source_as_asked(source: Place, given: Given) -> Checkpoint:
    """SRC, open. Too little memory is told before that."""
    check_memory(given["memory"])
    return opened(source, chosen(Reading, given))


def requests(source: Place, plans: Mapping[Place, Plan] | Mapping[Place | str, Plan], given: Given) -> list[Request]:
    """Conversions of one source that may be carried out, side by side.

    Raises CheckpointError where the source is damaged, PlanError where a target cannot be made.
    """
    checkpoint = next(iter(plans.values())).checkpoint
    targets = {target_of(plan, target): plan for target, plan in plans.items()}
    for target, plan in targets.items():
        _check_apart(checkpoint, source, target, (plan.recipe.imatrix, plan.recipe.calibration, plan.recipe.metadata))
        if given["card"] and plan.single:
            check_card(target)
    conversions = prepare_all(
        targets,
        jobs=given["jobs"],
        memory=given["memory"],
        overwrite=given["overwrite"],
        allow_nonfinite=bool(given["allow_nonfinite"]),
        verify=given["verify"],
        executor=given["executor"],
        private=given["private"],
        dry=given["dry_run"],
    )
    done = [conversion.count_done() for conversion in conversions]
    quiet = given["quiet"] or given["json"]
    check = checked(checkpoint, jobs=given["jobs"], quiet=quiet) if given["check"] else None
    raise_all(CheckpointError, map(str, check.damage if check else ()))
    checkpoint.refuse_doubts()
    reading = chosen(Reading, given)
    return [
        Request(
            source=source,
            reading=reading,
            conversion=conversion,
            done=count,
            check=check,
            card=bool(given["card"]) and conversion.plan.single,
        )
        for conversion, count in zip(conversions, done, strict=True)
    ]


def _check_apart(checkpoint: Checkpoint, source: Place, target: Place, read: Sequence[Place | None]) -> None:
    """Raise PlanError where making the target would write into the source, or replace it or what else is `read`."""
    index = checkpoint.index
    folders = [source] if source.is_dir() else []
    folders += [] if index.single else [index.folder]
    for made in (target, work_of(target)):
        if folder := next((folder for folder in folders if holds(folder, made)), None):
            raise PlanError(f"{made}: lies in the source {folder.resolve()}; give a target outside of it.")
        if any(holds(made, file.storage.path) for file in index.files):
            raise PlanError(f"{made}: holds the source {source}; give a target outside of it.")
        if file := next((file for file in read if file and holds(made, file)), None):
            raise PlanError(f"{made}: would replace {file}, which is read; give another name.")

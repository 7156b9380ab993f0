"""What a command's options ask for: a checkpoint opened as they say; a conversion checked, shown and carried out."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, checked, opened
from neoxconv.core.model import Checkpoint
from neoxconv.engine.journal import Journal, read_journal
from neoxconv.engine.manifest import overflows, read_manifest
from neoxconv.engine.memory import Memory, memory_for, threads_for
from neoxconv.engine.plan import Plan, make_plan, resume_key
from neoxconv.engine.publish import check_target, nearest_folder
from neoxconv.engine.run import run
from neoxconv.engine.upload import check_free
from neoxconv.engine.workplace import partial_of, work_of
from neoxconv.errors import CheckpointError, PlanError, raise_all
from neoxconv.sources import SOURCES, integrity
from neoxconv.sources.checkpoint import rank_difference
from neoxconv.storage.remote import Place, Remote
from neoxconv.targets import TAKEN_BY, TARGETS
from neoxconv.targets.recipe import Recipe
from neoxconv.words import plural, size, table


def check_options(given: Given) -> None:
    """Raise UsageError where an option is for another format, or for another of its types, than the one asked for."""
    target = TARGETS[given["format"]]
    for option, formats in TAKEN_BY.items():
        if given[option] not in (None, ()) and target.name not in formats:
            takes = ", ".join(map(flag, target.options))
            raise click.UsageError(
                f"{flag(option)} is for {', '.join(formats)}, not for {target.name}, which takes {takes}."
            )
    kind, dtype = given["type"], given["dtype"]
    if kind and kind not in target.types:
        raise click.UsageError(f"--type {kind} is not for {target.name}, which has {', '.join(target.types)}.")
    for option, types in target.only_of.items():
        if kind and kind not in types and given[option] is not None:
            raise click.UsageError(f"{flag(option)} is for {target.name}'s {' and '.join(types)}, not for {kind}.")
    if dtype and dtype not in target.dtypes:
        others = " and ".join(other.name for other in TARGETS.values() if dtype in other.dtypes)
        raise click.UsageError(f"--dtype {dtype} is for {others}; {target.name} takes {' or '.join(target.dtypes)}.")


def flag(option: str) -> str:
    """An option as it stands on the command line."""
    return f"--{option.replace('_', '-')}"


@dataclass(frozen=True)
class Request:
    """A conversion that is planned and allowed; nothing is written yet but what an interrupted run has `done`."""

    source: Place
    target: Place
    plan: Plan
    memory: Memory
    given: Given
    done: int
    check: integrity.Integrity | None = None  # of the source, where it was asked for

    @property
    def notes(self) -> tuple[str, ...]:
        """The plan's notes, and options that have no effect."""
        idle = self.idle_norms
        notes = [f"--norms {self.given['norms']} does nothing here: {idle}"] if idle else []
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
        if not self.given["norms"]:
            return None
        if ranks == 1:
            return "the source has no ranks to merge"
        recipe = self.plan.recipe
        same = recipe.format == "slim" and (recipe.tp or ranks) == ranks
        return "slim at the source's own degree keeps each rank's norms" if same else None

    @property
    def free(self) -> int:
        """Bytes free on the disk where the target is made."""
        return shutil.disk_usage(nearest_folder(work_of(self.target))).free

    @property
    def facts(self) -> dict[str, Any]:
        """The whole plan as plain values."""
        return {
            "bytes_total": self.plan.total,
            "files": [{"name": name, "bytes": count} for name, count in self.sizes.items()],
            "peak_memory": self.memory.peak,
            "disk_free": self.free,
            "notes": list(self.notes),
        }

    @property
    def summary(self) -> str:
        """The plan in a few lines."""
        plan, index = self.plan, self.plan.checkpoint.index
        ranks = len(index.ranks)
        rows = [
            ("source", f"{SOURCES[index.format].title} {self.source}, {plural(len(index.files), 'file')}, TP {ranks}"),
            *([("weights", "master: the optimizer's fp32")] if index.replaced else []),
            ("target", f"{plan.recipe.format} {self.target}"),
            ("tensors", ", ".join(f"{count} {name}" for name, count in plan.encodings.items())),
            ("size", f"{plan.total:,} bytes ({size(plan.total)}) in {plural(len(plan.sizes), 'file')}"),
            ("memory", f"{size(self.memory.peak)} at most with {plural(self.memory.jobs, 'thread')}{self.place}"),
        ]
        if ranks > 1:
            difference = f"the ranks' own differ by {rank_difference(plan.checkpoint):.3g} at most"
            rows.append(("norms", f"{plan.checkpoint.norms}; {difference}"))
        if self.check:
            rows.append(("check", self.check.verdict))
        return table("<<", rows + [("note", note) for note in self.notes])

    @property
    def place(self) -> str:
        """Where else than here the work is done."""
        return f", on each worker of {self.given['executor']}" if self.given["executor"] else ""

    @property
    def listing(self) -> str:
        """The whole plan: its summary, every file, and the disk."""
        files = table("<>", [(name, f"{count:,}") for name, count in self.sizes.items()])
        disk = f"  disk     {self.plan.total:,} bytes needed, {self.free:,} free"
        return f"{self.summary}\n\n{files}\n\n{disk}"

    def run(self, quiet: bool) -> dict[str, Any]:
        """Carry the request out; what came of it as plain values."""
        begin, given = time.monotonic(), self.given
        total = sum(step.nbytes for step in self.plan.steps)
        with progress_bar(total, "converting", quiet) as progress:
            try:
                run(
                    self.plan,
                    self.target,
                    jobs=given["jobs"],
                    memory=given["memory"],
                    overwrite=given["overwrite"],
                    allow_nonfinite=given["allow_nonfinite"],
                    executor=given["executor"],
                    progress=progress,
                )
            except KeyboardInterrupt as stop:
                raise type(stop)(f"{self.target}: not finished; run the same command again to continue.") from stop
        return {
            "target": str(self.target),
            "bytes_total": self.plan.total,
            "seconds": round(time.monotonic() - begin, 3),
            "notes": [*self.notes],
            "overflow": overflows(read_manifest(self.target) or {"files": []}),
        }

    def farewell(self, result: Mapping[str, Any]) -> str:
        """What was made, and what to do next."""
        settings = [word for path in self.given["config"] for word in ("--config", str(path))]
        settings += ["--preset", self.given["preset"]] if self.given["preset"] else []
        check = shlex.join(["neoxconv", "verify", str(self.source), str(self.target), *settings])
        lines = [
            f"  overflow {plural(count, 'weight')} of {name} beyond the type's largest number, which they became"
            for name, count in result["overflow"].items()
        ]
        return "\n".join(
            [*lines, f"{self.target}: {size(self.plan.total)} in {result['seconds']:.1f} s; next: {check}"]
        )


def prepare(source: Place, target: Place, given: Given) -> Request:
    """The plan for a conversion. Raises UsageError, CheckpointError or PlanError where it cannot be carried out."""
    check_options(given)
    recipe = Recipe(**{name: given[name] for name in Recipe.__dataclass_fields__ if given[name] is not None})
    memory_for(given["jobs"], given["memory"])  # too little is told before anything is opened
    checkpoint = opened(source, given, given["norms"] or "mean")
    target = target.resolve()
    if isinstance(target, Path) and not target.name:
        raise PlanError(f"{target}: is no place for a target; give the name of a file or a folder in it.")
    check_apart(checkpoint, source, target)
    plan = make_plan(checkpoint, recipe)
    memory = memory_for(threads_for(checkpoint, given["jobs"]), given["memory"], plan.kept)
    if isinstance(target, Remote):
        check_free(plan, target, given["overwrite"])
    else:
        check_target(plan, target, given["overwrite"])
    done = read_journal(work_of(target) / Journal.NAME, resume_key(plan), not given["allow_nonfinite"])
    check = checked(checkpoint, given, quiet=given["quiet"] or given["json"])
    raise_all(CheckpointError, map(str, check.damage if check else ()))
    finished = sum(all(key in done for key in step.keys) for step in plan.steps)
    return Request(source, target, plan, memory, given, finished, check)


def check_apart(checkpoint: Checkpoint, source: Place, target: Place) -> None:
    """Raise PlanError where making the target would write into the source, or replace a folder that holds it."""
    index = checkpoint.index
    if isinstance(source, Remote):
        here = source if index.single else index.folder
        inside = isinstance(target, Remote) and isinstance(here, Remote) and target.protocol == here.protocol
        if inside and f"{target.path}/".startswith(f"{here.path}/"):  # type: ignore[union-attr]
            raise PlanError(f"{target}: lies in the source {here}; give a target outside of it.")
        return
    target = work_of(target) if isinstance(target, Remote) else target
    folders: list[Place] = [source] if source.is_dir() else []
    folders += [] if index.single else [index.folder]
    files = {path.resolve() for file in index.files if isinstance(path := file.storage.path, Path)}
    for made in (target.resolve(), partial_of(target).resolve()):
        for folder in (folder.resolve() for folder in folders):
            if made == folder or folder in made.parents:
                raise PlanError(f"{target}: lies in the source {folder}; give a target outside of it.")
        if any(made == file or made in file.parents for file in files):
            raise PlanError(f"{target}: holds the source {source}; give a target outside of it.")

"""Carry a plan out, with nothing half-made ever visible.

All work happens in TARGET.partial/, whose journal lists the plan's fingerprint and the written slots. Run again, the
journal is only a hint: the bytes are hashed, what matches is kept, the rest is redone. How files are made and get their
names differs on a disk (publish.py: a rename), in a store (upload.py: whole objects, the manifest last) and on the
Hugging Face Hub (hub.py: one commit).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from neoxconv.core.layout import FileLayout
from neoxconv.engine import ours
from neoxconv.engine.checks import Checks, checks_of
from neoxconv.engine.hub import HubTarget
from neoxconv.engine.journal import Journal, is_of_another, read_journal
from neoxconv.engine.manifest import MANIFEST, Described, overflows
from neoxconv.engine.memory import DEFAULT_MEMORY, Budget, budget_for, threads_for
from neoxconv.engine.plan import Plan, check_sources, resume_key
from neoxconv.engine.publish import DiskTarget, room
from neoxconv.engine.steps import Progress, Work
from neoxconv.engine.target_place import target_of
from neoxconv.engine.upload import StoreTarget
from neoxconv.engine.workers import Crew, Seat
from neoxconv.engine.workplace import locked, made_in, work_of
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.storage import Place, is_far, is_shared
from neoxconv.words import size


class _Destination(Protocol):
    """Where a plan's files are made and how they get their names: on a disk or in a store."""

    @property
    def plan(self) -> Plan: ...
    @property
    def target(self) -> Place: ...
    @property
    def work(self) -> Path:
        """The folder for unfinished work."""

    @property
    def on_disk(self) -> Path:
        """What messages name where its disk is full."""

    def check(self, *, overwrite: bool) -> None:
        """Raise PlanError where the target may not be made."""

    def tidy(self) -> None:
        """Remove what a run of ours left behind that was killed after it had published; else nothing."""

    def check_room(self, crew: Crew) -> None:
        """Raise PlanError where the disk cannot hold what is still to be made on it."""

    def begin(self) -> dict[str, Described]:
        """The files, by name, that an earlier run made and that need no second look; called under the lock."""

    def make(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make the files; what the manifest says of each, as soon as that is safe."""

    def publish(self, described: Sequence[Described]) -> None:
        """Give the finished files their names, the manifest with them, and remove the folder of unfinished work."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A plan that may be carried out: its target may be made and its memory suffices; nothing is written yet."""

    plan: Plan
    target: Place
    budget: Budget
    checks: Checks
    executor: str | None
    overwrite: bool = False
    private: bool = False  # of a repository that is made

    @property
    def begins_anew(self) -> bool:
        """Whether unfinished work of another plan is thrown away: as asked, or as its source was mended since."""
        path, key = work_of(self.target) / Journal.NAME, resume_key(self.plan)
        return is_of_another(path, key, None if self.overwrite else self.plan.command)

    def count_done(self) -> int:
        """How many steps an interrupted run noted as done. Raises PlanError where it had another plan to keep."""
        if self.begins_anew:
            return 0
        key = resume_key(self.plan)
        known = read_journal(work_of(self.target) / Journal.NAME, key, self.checks)
        return sum(all(key in known for key in step.keys) for step in self.plan.steps)


@dataclass(frozen=True)
class Done:
    """A target that was made, and how many weights of each tensor were cut to the largest number of its type."""

    target: Place
    overflow: dict[str, int]


def run(
    plan: Plan,
    target: Place | str,
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    executor: str | None = None,
    private: bool = False,
    progress: Progress = lambda count: None,
) -> Place:
    """Make `target` as planned and return its path; after an interruption, continue.

    A target in an object store is sent file by file, the manifest last, and what is done is kept in NAME.partial here.
    One on the Hugging Face Hub is sent so too and becomes one commit; a repository that is missing is made, `private`
    or for all to see.
    With `verify` all that is encoded is decoded again at once and held against its weights, as `verify_weights` does.
    `executor` is dask://HOST:PORT, a scheduler whose workers see the same files, instead of threads here; `jobs` and
    `memory` are then a worker's. `progress` is called with counts of bytes written (or found written already). Raises
    PlanError before anything is written, NeoxconvError when the disk or a value stops the run, VerifyError when a
    weight is wrong; then `target` does not exist and TARGET.partial holds what is done.
    """
    conversion = prepare(
        plan,
        target,
        jobs=jobs,
        memory=memory,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        verify=verify,
        executor=executor,
        private=private,
    )
    return carry_out(conversion, progress).target


def prepare(
    plan: Plan,
    target: Place | str,
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    executor: str | None = None,
    private: bool = False,
    dry: bool = False,
    beside: Sequence[Plan] = (),
) -> Conversion:
    """The first half of `run`: everything checked and nothing written. Raises PlanError where `run` would.

    What a killed run of ours left beside its published target is taken away, unless the run is `dry`. `beside` are the
    other plans that are carried out at the same time, within the same memory.
    """
    kept = sum(each.kept for each in (plan, *beside))
    conversion = Conversion(
        plan=plan,
        target=target_of(plan, target),
        budget=budget_for(threads_for(plan.checkpoint, jobs), memory, kept, 1 + len(beside)),
        checks=checks_of(allow_nonfinite=allow_nonfinite, verify=verify),
        executor=executor,
        overwrite=overwrite,
        private=private,
    )
    if private and not is_shared(conversion.target):
        raise PlanError(f"{conversion.target}: --private is for repositories of the Hugging Face Hub (hf://).")
    destination = _destination_of(conversion)
    if not dry:
        destination.tidy()
    destination.check(overwrite=overwrite)
    return conversion


def _destination_of(conversion: Conversion) -> _Destination:
    """How the target is made where it is to be."""
    plan, target = conversion.plan, conversion.target
    if is_far(target) and target.is_shared:
        given = {"private": conversion.private, "overwrite": conversion.overwrite}
        return HubTarget(plan, target, conversion.checks, **given)
    if is_far(target):
        return StoreTarget(plan, target, conversion.checks)
    return DiskTarget(plan, Path(str(target)))


def carry_out(conversion: Conversion, progress: Progress = lambda count: None, seat: Seat | None = None) -> Done:
    """The second half of `run`, alone in its folder: make what is not made yet, and publish.

    With a `seat` it shares its threads with other runs. Raises NeoxconvError when the disk or a value stops it,
    PlanError where another run is at work there.
    """
    plan, budget = conversion.plan, conversion.budget
    plan.checkpoint.refuse_doubts()
    crew, destination = Crew(budget.jobs, conversion.executor, seat), _destination_of(conversion)
    folder = destination.work
    try:
        destination.check_room(crew)
        ours.check_work(folder)
        with locked(folder), _journal(conversion, folder) as journal:
            work = Work(
                folder=made_in(folder),
                known=journal.known,
                slab=budget.slab,
                checks=conversion.checks,
                progress=progress,
                source=plan.source,
            )
            described = destination.begin()
            for name in described:
                progress(plan.nbytes_of(name))
            left = [file for file in plan.files if file.name not in described]
            described |= {entry["name"]: entry for entry in destination.make(left, work, crew, journal)}
            check_sources(plan)
            entries = [described[file.name] for file in plan.files]
            destination.publish(entries)
    except OSError as error:
        raise NeoxconvError(_explain(error, destination)) from error
    return Done(destination.target, overflows(entries))


@contextmanager
def _journal(conversion: Conversion, folder: Path) -> Iterator[Journal]:
    """The journal of a run, which notes where what was read stops it; other work is thrown away where that is right."""
    plan = conversion.plan
    if conversion.begins_anew:
        ours.discard_work(folder)
    names = [*plan.sizes, MANIFEST]
    with Journal(folder, resume_key(plan), checks=conversion.checks, files=names, command=plan.command) as journal:
        try:
            yield journal
        except PlanError:
            raise
        except NeoxconvError:
            journal.fail()
            raise


def _explain(error: OSError, destination: _Destination) -> str:
    """An operating system's error in terms of the target, or of where one in a store is made."""
    work = destination.work
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed, free = room(destination.plan, work)
        return (
            f"{destination.on_disk}: {os.strerror(error.errno)}: {size(needed)} are still to be written and "
            f"{size(free)} are free; make room and run the same command again to continue."
        )
    kept = f"; what is done is kept in {work.name}" if work.is_dir() else ""
    return f"{error.filename or destination.target}: {error.strerror or error}{kept}."

"""A target on a disk: what must hold before it is made, its files made side by side, and the rename that publishes it.

All work is in TARGET.partial; TARGET itself is absent or whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neoxconv.core.layout import FileLayout
from neoxconv.engine import cluster, ours
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import MANIFEST, Described, beside, manifest
from neoxconv.engine.plan import Plan
from neoxconv.engine.steps import Digests, Work
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.workers import Crew, run_steps, threads
from neoxconv.engine.workplace import free_for, has_files, held, locked, made_in, nearest_folder, open_own, partial_of
from neoxconv.errors import PlanError
from neoxconv.words import size


@dataclass(frozen=True)
class DiskTarget:
    """A plan's target on a disk: a folder, or one file."""

    plan: Plan
    target: Path

    @property
    def work(self) -> Path:
        return partial_of(self.target)

    @property
    def on_disk(self) -> Path:
        return self.target

    def check(self, *, overwrite: bool) -> None:
        """Raise PlanError where the target exists (an empty folder does not count), is of the wrong kind, or where
        what would be replaced is not ours. Nothing is changed.
        """
        target = self.target
        if self.plan.single and target.is_dir():
            raise PlanError(
                f"{target}: is a folder; {self.plan.recipe.format} writes one file, "
                f"so give its name, such as {target / 'model'}.{self.plan.recipe.format}."
            )
        _check_place(target)
        if _is_occupied(target):
            if not overwrite:
                raise PlanError(f"{target}: exists already; give another name, or --overwrite to replace it.")
            self.check_replaceable()
        elif self.plan.single:
            ours.check_beside(target)
        ours.check_work(self.work)

    def check_replaceable(self) -> None:
        """Raise PlanError where the target holds anything that is not ours, or cannot be set aside."""
        if self.plan.single:
            ours.check_beside(self.target)
        elif self.target.is_dir():
            ours.check_folder(self.target)
            ours.check_aside(aside_of(self.target))
        else:
            raise PlanError(
                f"{self.target}: is a file, and {self.plan.recipe.format} writes a folder; remove the file yourself, "
                "or give another name."
            )

    def tidy(self) -> None:
        """Remove what a run of ours left behind that was killed after it had published its target; else nothing."""
        work, aside = self.work, aside_of(self.target)
        if _is_occupied(self.target) and ours.is_published(work, aside):
            with locked(work):
                if not has_files(work):
                    ours.remove_aside(aside)
                    ours.remove_work(work)

    def check_room(self, crew: Crew) -> None:
        """Raise PlanError where the disk cannot hold what is still to be written, whoever writes it."""
        needed, free = room(self.plan, self.work)
        if needed > free:
            raise PlanError(
                f"{nearest_folder(self.target)}: {size(needed)} are needed and {size(free)} are free; "
                f"free {size(needed - free)} or choose another disk."
            )

    def begin(self) -> dict[str, Described]:
        """Nothing: steps are kept one by one, by the journal."""
        return {}

    def make(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make all files side by side, so that the largest tensors of all of them start first."""
        for file in files:
            begin_file(file, work.folder)
        digests = self.write(work, crew, journal)
        for file in files:
            yield finish_file(file, work.folder, digests)

    def write(self, work: Work, crew: Crew, journal: Journal) -> Digests:
        """Write every tensor, by the crew; the digests of all slots."""
        if crew.executor:
            with cluster.connected(crew.executor) as pool:
                submit = cluster.submit_to(pool, self.plan, work)
                return run_steps(self.plan.steps, submit, journal, work.progress)
        with threads(work, crew) as submit:
            return run_steps(self.plan.steps, submit, journal)

    def publish(self, described: Sequence[Described]) -> None:
        """Give the finished files their name; what they replace is set aside first and removed last.

        Killed at any point, the next run finds its journal, hashes what it made, and publishes it.
        """
        plan, target, made, aside = self.plan, self.target, made_in(self.work), aside_of(self.target)
        _write_last(plan, made, described)
        if plan.single:
            ours.check_beside(target)
            os.replace(made / MANIFEST, beside(target))
            os.replace(made / plan.files[0].name, target)
        else:
            if _is_occupied(target):
                self.check_replaceable()  # again: things may have been added since
                ours.remove_aside(aside)
                os.replace(target, aside)
            os.replace(made, target)
        _sync(target.parent)
        if not plan.single:
            ours.remove_aside(aside)
        ours.remove_work(self.work)


def _is_occupied(target: Path) -> bool:
    """Whether anything is there; an empty folder does not count."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _check_place(target: Path) -> None:
    """Raise PlanError where nothing can be made under that name: a device, a file above it, a folder of others."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise PlanError(f"{target}: is a device or a pipe, which cannot be replaced; give another name.")
    parent = nearest_folder(target)
    if not parent.is_dir():
        raise PlanError(f"{target}: cannot be made, because {parent} is a file; give another place.")
    if not os.access(parent, os.W_OK):
        raise PlanError(f"{target}: cannot be made, because {parent} may not be written to; give another place.")


def aside_of(target: Path) -> Path:
    """Where a target lies that is being replaced."""
    return target.with_name(f".{target.name}.replaced-by-neoxconv")


def room(plan: Plan, work: Path) -> tuple[int, int]:
    """The bytes that are still to be written, and those that the disk has free."""
    return max(plan.total - held(work), 0), free_for(work)


def _write_last(plan: Plan, made: Path, described: Sequence[Described]) -> None:
    """Write the small files and the manifest of a folder whose files are `described`, and put everything on disk."""
    for name, data in plan.sidecars.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        _write(made / name, data)
    _write(made / MANIFEST, manifest(plan, described))
    for path in (*sorted(made.rglob("*")), made, made.parent):
        _sync(path)


def _write(path: Path, data: bytes) -> None:
    """A small file of ours, whole."""
    with open_own(path, "wb") as stream:
        stream.write(data)


def _sync(path: Path) -> None:
    """Ask the disk to hold a file's or a folder's contents now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

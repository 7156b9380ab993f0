"""A target in an object store: each file is made here, sent whole, noted and removed; the manifest comes last.

A store has no rename, but an object appears at once and whole. So a target is there when its manifest is; before the
files of tensors nothing is sent that a loader begins with (config.json, an index). NAME.partial in the working folder
holds the file at work, its journal, and in `sent` the manifest's entry for every file that is in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from neoxconv.core.layout import FileLayout
from neoxconv.engine import cluster, ours
from neoxconv.engine.checks import Checks
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import MANIFEST, Described, beside, manifest
from neoxconv.engine.plan import Plan
from neoxconv.engine.sent import Note, Sent, check_room_for_two, made_and_sent, notes_of
from neoxconv.engine.steps import Work
from neoxconv.engine.workers import Crew
from neoxconv.engine.workplace import work_of
from neoxconv.errors import NeoxconvError, PlanError, raise_all
from neoxconv.storage import Remote


@dataclass(frozen=True)
class StoreTarget:
    """A plan's target in a store; files that were made without one of the `checks` are no part of it."""

    plan: Plan
    target: Remote
    checks: Checks

    @property
    def work(self) -> Path:
        return work_of(self.target)

    @property
    def on_disk(self) -> Path:
        return self.work

    @cached_property
    def sent(self) -> Sent:
        """The notes of the run of this plan to this target, which has one name with others of other stores."""
        where = (self.target.protocol, self.target.path, self.target.options)
        return notes_of(self.plan, where, self.checks, self.work)

    @property
    def manifest(self) -> Remote:
        """Where its manifest goes."""
        return beside(self.target) if self.plan.single else self.target / MANIFEST

    def object_of(self, name: str) -> Remote:
        """Where one of its files goes."""
        return self.target if self.plan.single else self.target / name

    def check(self, *, overwrite: bool) -> None:
        """Raise PlanError where the target cannot be written, or holds anything that this run has not sent."""
        target = self.target
        if target.is_web:
            raise PlanError(f"{target}: a web server takes no files; give a store, such as s3://BUCKET/NAME.")
        if target.is_root:
            raise PlanError(f"{target}: names a bucket; give the name of a target in it, such as s3://BUCKET/NAME.")
        if overwrite:
            raise PlanError(
                f"{target}: --overwrite is for targets on a disk; a store cannot replace one all at once. "
                "Give another name, or remove the old one."
            )
        ours.check_work(self.work)
        if self.manifest.exists() or (target.exists() and not self.sent.begun):
            raise PlanError(
                f"{target}: exists already, and a store cannot replace it all at once; give another name, or remove it."
            )

    def tidy(self) -> None:
        """Nothing: what lies here may be of a target of the same name in another store."""

    def check_room(self, crew: Crew) -> None:
        """Raise PlanError where the disk here cannot hold the file at work and the one that is being sent."""
        if crew.executor:
            return  # the workers have disks of their own
        check_room_for_two(self.plan, self.work, self.find_sent())

    def find_sent(self) -> dict[str, Described]:
        """The files that were sent and that the store still has."""
        noted = {file.name: self.sent.find(file.name) for file in self.plan.files}
        return {name: note.file for name, note in noted.items() if note and self.is_there(note)}

    def is_there(self, note: Note) -> bool:
        """Whether the store has a file as it was sent."""
        facts = self.object_of(note.file["name"]).facts_now()
        return facts is not None and (facts.size, facts.version) == (note.file["bytes"], note.version)

    def begin(self) -> dict[str, Described]:
        """Note that what will be in the store is this run's; the files that are there already."""
        self.sent.begin()
        return self.find_sent()

    def make(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make and send the files, each noted when it is in the store. Raises CheckpointError where that fails."""
        if not crew.executor:
            yield from made_and_sent(self.plan, files, (work, crew, journal), self.send)
            return
        for described in self.make_on_workers(files, work, crew.executor):
            self.sent.add(described, self.version_of(described["name"]))
            yield described

    def send(self, described: Described, work: Work) -> None:
        """Put a file that was made into the store, note what that calls its content, and remove it here."""
        name = described["name"]
        self.object_of(name).put(work.folder / name, work.stop)
        self.sent.add(described, self.version_of(name))
        (work.folder / name).unlink()

    def version_of(self, name: str) -> str:
        """What the store calls the content of a file that it has."""
        facts = self.object_of(name).facts_now()
        return facts.version if facts else ""

    def make_on_workers(self, files: Sequence[FileLayout], work: Work, executor: str) -> Iterator[Described]:
        """Have workers of a cluster make files, each on a disk of its own, and send them."""
        origin, numbers = cluster.origin_of(self.plan), {file.name: n for n, file in enumerate(self.plan.files)}
        with cluster.connected(executor) as pool:
            futures = {}
            for file in files:
                delivery = cluster.Delivery(
                    origin=origin,
                    number=numbers[file.name],
                    target=self.object_of(file.name),
                    slab=work.slab,
                    checks=work.checks,
                )
                futures[pool.submit(cluster.deliver, delivery)] = file
            try:
                for future in as_completed(futures):
                    yield future.result()
                    work.progress(self.plan.nbytes_of(futures[future].name))
            finally:
                for future in futures:
                    future.cancel()

    def publish(self, described: Sequence[Described]) -> None:
        """Send the small files, and when all of the target is in the store its manifest; remove the work here.

        Raises NeoxconvError where an object is not what was sent.
        """
        there = self.find_sent()
        raise_all(NeoxconvError, (
            f"{self.object_of(file.name)}: is not what was sent; something else writes there. "
            "See to that, and run the same command again to continue." for file in self.plan.files
            if file.name not in there
        ))  # fmt: skip
        send_last(self, described)
        ours.remove_work(self.work)


def send_last(destination: StoreTarget, described: Sequence[Described]) -> None:
    """Send the small files of a target whose files are `described`, and after them the manifest."""
    for name, data in destination.plan.sidecars.items():
        (destination.target / name).write(data)
    destination.manifest.write(manifest(destination.plan, described))

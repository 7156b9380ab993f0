"""A target in an object store: each file is made here, sent whole, noted and removed; the manifest comes last.

A store has no rename, but an object appears at once and whole. So a target is there when its manifest is; before the
files of tensors nothing is sent that a loader begins with (config.json, an index). NAME.partial in the working folder
holds the file at work, its journal, and in `sent` the manifest's entry for every file that is in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from neoxconv.core.layout import FileLayout
from neoxconv.engine import cluster, ours
from neoxconv.engine.checks import Checks
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import MANIFEST, Described, beside, manifest
from neoxconv.engine.plan import Plan, resume_key
from neoxconv.engine.steps import Work
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.workers import Crew, run_steps, threads
from neoxconv.engine.workplace import SENT, free_for, held, made_in, open_own, work_of
from neoxconv.errors import NeoxconvError, PlanError, raise_all
from neoxconv.storage import Remote
from neoxconv.words import size

_BEGUN = ".begun"


@dataclass(frozen=True)
class _Sent:
    """Notes on the files that are in the store, in a folder; those of another run do not count.

    Neither do those of a run without one of the `checks`.
    """

    folder: Path
    key: str
    checks: Checks

    @property
    def begun(self) -> bool:
        """Whether this very run has begun before, so that what is in the store may be its own."""
        mark = self.folder / _BEGUN
        return mark.is_file() and mark.read_text() == self.key

    def begin(self) -> None:
        """Note that this run has begun."""
        self.folder.mkdir(exist_ok=True)
        _write(self.folder / _BEGUN, self.key)

    def path(self, name: str) -> Path:
        """Where the note on a file lies."""
        return self.folder / quote(name, safe="")

    def add(self, described: Described, there: Remote) -> None:
        """Note that a file is in the store, and what the store calls its content."""
        path, facts = self.path(described["name"]), there.facts_now()
        version = facts.version if facts else ""
        note = {"key": self.key, "checks": sorted(self.checks), "version": version, "file": described}
        _write(path.with_suffix(".new"), json.dumps(note))
        os.replace(path.with_suffix(".new"), path)

    def find(self, file: FileLayout, there: Remote) -> Described | None:
        """The entry of a file that was sent, if the store still has it."""
        try:
            note = json.loads(self.path(file.name).read_text())
        except (OSError, ValueError):
            return None
        if note["key"] != self.key or not self.checks.issubset(note.get("checks", ())):
            return None
        facts = there.facts_now()
        if facts is None or facts.size != file.size or facts.version != note["version"]:
            return None
        found: Described = note["file"]
        return found


def _write(path: Path, text: str) -> None:
    """A note, whole."""
    with open_own(path, "wb") as stream:
        stream.write(text.encode())


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
    def sent(self) -> _Sent:
        """The notes of the run of this plan to this target, which has one name with others of other stores."""
        where = (self.target.protocol, self.target.path, self.target.options)
        key = hashlib.sha256(f"{resume_key(self.plan)} {where}".encode()).hexdigest()
        return _Sent(self.work / SENT, key, self.checks)

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
        done = self.find_sent()
        left = sorted((file.size for file in self.plan.files if file.name not in done), reverse=True)
        needed, free = sum(left[:2]), free_for(self.work)
        if needed > free + held(made_in(self.work)):
            raise PlanError(
                f"{self.work}: two files are made here at a time, {size(needed)}, and {size(free)} are free; "
                "make room, work in another folder, or make smaller files with --shard-size or --split-size."
            )

    def find_sent(self) -> dict[str, Described]:
        """The files that were sent and that the store still has."""
        sent = self.sent
        found = {file.name: sent.find(file, self.object_of(file.name)) for file in self.plan.files}
        return {name: described for name, described in found.items() if described}

    def begin(self) -> dict[str, Described]:
        """Note that what will be in the store is this run's; the files that are there already."""
        self.sent.begin()
        return self.find_sent()

    def make(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make and send the files, each noted when it is in the store. Raises CheckpointError where that fails."""
        if crew.executor:
            made = self.make_on_workers(files, work, crew.executor)
        else:
            made = self.make_here(files, work, crew, journal)
        for described in made:
            self.sent.add(described, self.object_of(described["name"]))
            yield described

    def make_here(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make files one after the other; while one is made, the one before it is sent."""

        def post(file: FileLayout, described: Described) -> Described:
            self.object_of(file.name).put(work.folder / file.name, work.stop)
            (work.folder / file.name).unlink()
            return described

        with ThreadPoolExecutor(1) as postman, threads(work, crew) as submit:
            under_way: list[Future[Described]] = []
            for file in files:
                begin_file(file, work.folder)
                digests = run_steps(self.plan.steps_of(file), submit, journal)
                described = finish_file(file, work.folder, digests)
                yield from (future.result() for future in under_way)
                under_way = [postman.submit(post, file, described)]
            yield from (future.result() for future in under_way)

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

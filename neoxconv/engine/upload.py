"""A target in an object store: each file is made here, sent whole, noted and removed; the manifest comes last.

A store has no rename, but an object appears at once and whole. So a target is there when its manifest is; before the
files of tensors nothing is sent that a loader begins with (config.json, an index). NAME.partial in the working folder
holds the file at work, its journal, and in `sent` the manifest's entry for every file that is in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from neoxconv.core.layout import FileLayout
from neoxconv.engine import cluster
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import MANIFEST, beside, manifest
from neoxconv.engine.memory import Memory
from neoxconv.engine.plan import Plan, check_sources, resume_key
from neoxconv.engine.publish import explain
from neoxconv.engine.steps import Progress, Work
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.workers import run_steps, threads
from neoxconv.engine.workplace import held, locked, made_in, work_of
from neoxconv.errors import NeoxconvError, PlanError, raise_all
from neoxconv.storage.protocols import WEB
from neoxconv.storage.remote import Remote
from neoxconv.words import size

Described = dict[str, Any]  # the manifest's entry for a file
BEGUN = ".begun"


@dataclass(frozen=True)
class Sending:
    """How a run goes about it."""

    memory: Memory
    allow_nonfinite: bool
    executor: str | None
    progress: Progress


@dataclass(frozen=True)
class Sent:
    """Notes on the files that are in the store, in a folder; those of another run do not count.

    With `checked` neither do those of a run that let values pass that are not finite.
    """

    folder: Path
    key: str
    checked: bool

    @property
    def begun(self) -> bool:
        """Whether this very run has begun before, so that what is in the store may be its own."""
        mark = self.folder / BEGUN
        return mark.is_file() and mark.read_text() == self.key

    def begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / BEGUN).write_text(self.key)

    def path(self, name: str) -> Path:
        return self.folder / quote(name, safe="")

    def add(self, described: Described, there: Remote) -> None:
        path, facts = self.path(described["name"]), there.ask()
        version = facts.version if facts else ""
        note = {"key": self.key, "checked": self.checked, "version": version, "file": described}
        path.with_suffix(".new").write_text(json.dumps(note))
        os.replace(path.with_suffix(".new"), path)

    def find(self, file: FileLayout, there: Remote) -> Described | None:
        """The entry of a file that was sent, if the store still has it."""
        try:
            note = json.loads(self.path(file.name).read_text())
        except (OSError, ValueError):
            return None
        facts = there.ask()
        if note["key"] != self.key or note["checked"] < self.checked or facts is None:
            return None
        if facts.size != file.size or facts.version != note["version"]:
            return None
        found: Described = note["file"]
        return found


def sent_to(plan: Plan, target: Remote, checked: bool = False) -> Sent:
    """The notes of the run of a plan to a target, which has one name with others of other stores."""
    where = (target.protocol, target.path, target.options)
    key = hashlib.sha256(f"{resume_key(plan)} {where}".encode()).hexdigest()
    return Sent(work_of(target) / "sent", key, checked)


def place_of(plan: Plan, target: Remote, name: str) -> Remote:
    """Where a file of a target goes."""
    return target if plan.single else target / name


def manifest_of(plan: Plan, target: Remote) -> Remote:
    """Where its manifest goes."""
    return beside(target) if plan.single else target / MANIFEST


def check_free(plan: Plan, target: Remote, overwrite: bool) -> None:
    """Raise PlanError where the target cannot be written, or holds anything that this run has not sent."""
    if target.protocol in WEB:
        raise PlanError(f"{target}: a web server takes no files; give a store, such as s3://BUCKET/NAME.")
    if "/" not in target.shown.split("://", 1)[1].strip("/"):
        raise PlanError(f"{target}: names a bucket; give the name of a target in it, such as s3://BUCKET/NAME.")
    if overwrite or manifest_of(plan, target).exists() or (target.exists() and not sent_to(plan, target).begun):
        raise PlanError(
            f"{target}: exists already, and a store cannot replace it all at once; give another name, or remove it."
            if not overwrite
            else f"{target}: --overwrite is for targets on a disk; a store cannot replace one all at once. "
            "Give another name, or remove the old one."
        )


def check_disk(files: list[FileLayout], scratch: Path) -> None:
    """Raise PlanError where the disk here cannot hold the file at work and the one that is being sent."""
    needed = sum(sorted((file.size for file in files), reverse=True)[:2])
    free = shutil.disk_usage(scratch.parent).free
    if needed > free + held(made_in(scratch)):
        raise PlanError(
            f"{scratch}: two files are made here at a time, {size(needed)}, and {size(free)} are free; "
            "make room, work in another folder, or make smaller files with --shard-size or --split-size."
        )


def send(plan: Plan, target: Remote, sending: Sending) -> Remote:
    """Make a target in a store that `check_free` allows; after an interruption, continue."""
    scratch, sent = work_of(target), sent_to(plan, target, not sending.allow_nonfinite)
    try:
        with locked(scratch), Journal(scratch, resume_key(plan), checked=not sending.allow_nonfinite) as journal:
            done = {file.name: sent.find(file, place_of(plan, target, file.name)) for file in plan.files}
            described = {name: entry for name, entry in done.items() if entry}
            left = [file for file in plan.files if file.name not in described]
            if not sending.executor:
                check_disk(left, scratch)
            sent.begin()
            sending.progress(sum(step.nbytes for step in plan.steps if step.file.name in described))
            make = there if sending.executor else here
            for entry in make(plan, left, target, sending, journal):
                sent.add(entry, place_of(plan, target, entry["name"]))
                described[entry["name"]] = entry
            check_sources(plan)
            changed = [file for file in plan.files if not sent.find(file, place_of(plan, target, file.name))]
            raise_all(NeoxconvError, (
                f"{place_of(plan, target, file.name)}: is not what was sent; something else writes there. "
                "See to that, and run the same command again to continue." for file in changed
            ))  # fmt: skip
            finish(plan, target, [described[file.name] for file in plan.files])
            shutil.rmtree(scratch)
    except OSError as error:
        raise NeoxconvError(explain(error, plan, target)) from error
    return target


def here(
    plan: Plan, files: list[FileLayout], target: Remote, sending: Sending, journal: Journal
) -> Iterator[Described]:
    """Make files one after the other; while one is made, the one before it is sent."""
    made = made_in(journal.path.parent)
    work = Work(made, journal.known, sending.memory.slab, sending.allow_nonfinite, sending.progress, plan.source)

    def post(file: FileLayout, described: Described) -> Described:
        place_of(plan, target, file.name).put(made / file.name, work.stop)
        (made / file.name).unlink()
        return described

    with ThreadPoolExecutor(1) as postman, threads(work, sending.memory.jobs) as submit:
        under_way: list[Future[Described]] = []
        for file in files:
            begin_file(file, made)
            described = finish_file(file, made, run_steps(plan.steps_of(file), submit, journal))
            yield from (future.result() for future in under_way)
            under_way = [postman.submit(post, file, described)]
        yield from (future.result() for future in under_way)


def there(
    plan: Plan, files: list[FileLayout], target: Remote, sending: Sending, journal: Journal
) -> Iterator[Described]:
    """Have workers of a cluster make files and send them."""
    if not sending.executor:
        return
    origin, numbers = cluster.origin_of(plan), {file.name: number for number, file in enumerate(plan.files)}
    with cluster.connected(sending.executor) as pool:
        futures = {
            pool.submit(
                cluster.deliver,
                cluster.Delivery(
                    origin,
                    numbers[file.name],
                    place_of(plan, target, file.name),
                    sending.memory.slab,
                    sending.allow_nonfinite,
                ),
            ): file
            for file in files
        }
        try:
            for future in as_completed(futures):
                yield future.result()
                sending.progress(sum(step.nbytes for step in plan.steps_of(futures[future])))
        finally:
            for future in futures:
                future.cancel()


def finish(plan: Plan, target: Remote, described: list[Described]) -> None:
    """Send the small files, and when all of that is in the store the manifest."""
    for name, data in plan.sidecars.items():
        (target / name).write(data)
    manifest_of(plan, target).write(manifest(plan, described))

"""Files of a target far away: made here one after the other, sent, and noted, so that none is made twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from neoxconv.core.layout import FileLayout
from neoxconv.engine.checks import Checks
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import Described
from neoxconv.engine.plan import Plan, resume_key
from neoxconv.engine.steps import Work
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.workers import Crew, run_steps, threads
from neoxconv.engine.workplace import SENT, free_for, held, made_in, open_own
from neoxconv.errors import PlanError
from neoxconv.words import size

_BEGUN = ".begun"
Hands = tuple[Work, Crew, Journal]  # what makes a file: its work, who does it, and the journal of its steps


@dataclass(frozen=True)
class Note:
    """A file that was sent, as the manifest has it; `version` is what shows that the store still has it."""

    file: Described
    version: str


@dataclass(frozen=True)
class Sent:
    """Notes on the files that were sent, in a folder; those of another run do not count.

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

    def add(self, described: Described, version: str) -> None:
        """Note that a file was sent."""
        path = self.path(described["name"])
        note = {"key": self.key, "checks": sorted(self.checks), "version": version, "file": described}
        _write(path.with_suffix(".new"), json.dumps(note))
        os.replace(path.with_suffix(".new"), path)

    def find(self, name: str) -> Note | None:
        """The note on a file."""
        try:
            note = json.loads(self.path(name).read_text())
        except (OSError, ValueError):
            return None
        if note["key"] != self.key or not self.checks.issubset(note.get("checks", ())):
            return None
        return Note(note["file"], note["version"])


def notes_of(plan: Plan, where: object, checks: Checks, work: Path) -> Sent:
    """The notes of the run of a plan to a place far away, whose work folder it may share with one of the same name."""
    return Sent(work / SENT, hashlib.sha256(f"{resume_key(plan)} {where}".encode()).hexdigest(), checks)


def _write(path: Path, text: str) -> None:
    """A note, whole."""
    with open_own(path, "wb") as stream:
        stream.write(text.encode())


def made_and_sent(
    plan: Plan, files: Sequence[FileLayout], hands: Hands, send: Callable[[Described, Work], None]
) -> Iterator[Described]:
    """Make files one after the other; while one is made, the one before it is sent, noted, and removed here."""
    work, crew, journal = hands

    def post(described: Described) -> Described:
        send(described, work)
        return described

    with ThreadPoolExecutor(1) as postman, threads(work, crew) as submit:
        under_way: list[Future[Described]] = []
        for file in files:
            begin_file(file, work.folder)
            digests = run_steps(plan.steps_of(file), submit, journal)
            described = finish_file(file, work.folder, digests)
            yield from (future.result() for future in under_way)
            under_way = [postman.submit(post, described)]
        yield from (future.result() for future in under_way)


def check_room_for_two(plan: Plan, work: Path, done: Collection[str]) -> None:
    """Raise PlanError where the disk cannot hold the file at work and the one that is being sent."""
    left = sorted((file.size for file in plan.files if file.name not in done), reverse=True)
    needed, free = sum(left[:2]), free_for(work)
    if needed > free + held(made_in(work)):
        raise PlanError(
            f"{work}: two files are made here at a time, {size(needed)}, and {size(free)} are free; "
            "make room, work in another folder, or make smaller files with --shard-size or --split-size."
        )

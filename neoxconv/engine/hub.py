"""A target in a repository of the Hugging Face Hub: large files are sent as they are made, one commit publishes them.

NAME.partial in the working folder holds the file at work, the journal, and in `sent` a note on every file that the
Hub's storage has. An interrupted run asks the storage for those, and makes what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from neoxconv.core.layout import FileLayout
from neoxconv.engine import ours
from neoxconv.engine.checks import Checks
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import MANIFEST, Described, beside, manifest
from neoxconv.engine.plan import Plan
from neoxconv.engine.sent import Note, Sent, check_room_for_two, made_and_sent, notes_of
from neoxconv.engine.steps import Work
from neoxconv.engine.workers import Crew
from neoxconv.engine.workplace import made_in, work_of
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.storage import Remote, commits
from neoxconv.storage.commits import Large
from neoxconv.storage.hub import Entry, Repository, head, listing, repository
from neoxconv.storage.requests import FILE, Absent, retrying
from neoxconv.version import __version__


@dataclass(frozen=True)
class HubTarget:
    """A plan's target in a repository, which is made where it is missing: for all to see, or `private`."""

    plan: Plan
    target: Remote
    checks: Checks
    private: bool = False
    overwrite: bool = False

    @property
    def work(self) -> Path:
        return work_of(self.target)

    @property
    def on_disk(self) -> Path:
        return self.work

    @cached_property
    def where(self) -> Repository:
        """The repository and the path in it."""
        return repository(self.target.path)

    @cached_property
    def sent(self) -> Sent:
        """The notes of the run of this plan to this target."""
        return notes_of(self.plan, self.where, self.checks, self.work)

    def path_of(self, name: str) -> str:
        """Where in the repository one of its files goes."""
        return self.where.inside if self.plan.single else "/".join(filter(None, (self.where.inside, name)))

    @property
    def manifest(self) -> str:
        """Where in the repository its manifest goes."""
        return repository(beside(self.target).path).inside if self.plan.single else self.path_of(MANIFEST)

    def check(self, *, overwrite: bool) -> None:
        """Raise PlanError where the target cannot be written, or the repository has files of the same names."""
        target, where = self.target, self.where
        if where.revision:
            raise PlanError(f"{target}: names a revision; a target is committed to the main branch, so leave @ out.")
        if not commits.has_token():
            raise PlanError(f"{target}: needs a token that may write; log in with `hf auth login`, or set HF_TOKEN.")
        ours.check_work(self.work)
        if now := self.head():
            if self.private and not now[1]:
                raise PlanError(
                    f"{target}: the repository is there and public; --private is for one that is made. "
                    "Change it on its page at the Hub, or give another name."
                )
            self.check_free(now[0], overwrite=overwrite)

    def head(self) -> tuple[str, bool] | None:
        """The repository's newest commit, and whether it is private; None where there is none."""
        try:
            return retrying(self.target, lambda: head(self.where))
        except Absent as error:
            if error.refused:
                raise
            return None

    def files_at(self, commit: str) -> Mapping[str, Entry]:
        """What a commit holds, by path."""
        found = retrying(self.target, lambda: listing(replace(self.where, revision=commit)))
        return {f"{folder}/{name}".strip("/"): entry for folder, held in found.items() for name, entry in held.items()}

    def check_free(self, commit: str, *, overwrite: bool) -> None:
        """Raise PlanError where a commit has what would be replaced, and may not be."""
        held, wanted = self.files_at(commit), [*map(self.path_of, self.plan.sizes), self.manifest]
        taken = [path for path in wanted if path in held]
        folders = [path for path in taken if held[path]["type"] != FILE]
        in_the_way = held.get(self.where.inside, {}).get("type") == FILE and not self.plan.single
        if folders or in_the_way:
            raise PlanError(f"{self.target}: a file and a folder would have one name; give another.")
        if taken and not overwrite:
            more = f" and {len(taken) - 1} more" if taken[1:] else ""
            raise PlanError(
                f"{self.target}: the repository has {taken[0]}{more} already; give another name or a folder in it "
                f"({self.target}/NAME), or --overwrite to commit new ones."
            )

    def tidy(self) -> None:
        """Nothing: what lies here may be of a target of the same name elsewhere."""

    def check_room(self, crew: Crew) -> None:
        """Raise PlanError where the disk here cannot hold the file at work and the one that is being sent."""
        if crew.executor:
            raise PlanError(
                f"{self.target}: a cluster cannot send to the Hub; leave --executor out, or convert to a disk and "
                "upload the folder with `hf upload`."
            )
        check_room_for_two(self.plan, self.work, self.find_sent())

    def find_sent(self) -> dict[str, Described]:
        """The files that were sent and that the storage still has."""
        noted = self.noted()
        try:
            there = retrying(self.target, lambda: commits.kept(self.where, self.large_of(noted)))
        except Absent:  # the repository was removed
            there = set()
        return {name: note.file for name, note in noted.items() if self.path_of(name) in there}

    def noted(self) -> dict[str, Note]:
        """The notes on the files that were sent to the storage, by their names; small ones wait for the commit."""
        notes = {file.name: self.sent.find(file.name) for file in self.plan.files}
        return {name: note for name, note in notes.items() if note and note.version}

    def large_of(self, noted: Mapping[str, Note]) -> dict[str, Large]:
        """Those files as the storage knows them, by their paths in the repository."""
        return {self.path_of(name): Large(note.version, note.file["bytes"]) for name, note in noted.items()}

    def begin(self) -> dict[str, Described]:
        """Make the repository where it is missing; the files that its storage has already."""
        self.sent.begin()
        retrying(self.target, lambda: commits.make(self.where, private=self.private), "written")
        return self.find_sent()

    def make(self, files: Sequence[FileLayout], work: Work, crew: Crew, journal: Journal) -> Iterator[Described]:
        """Make and send the files, each noted when the storage has it. Raises CheckpointError where that fails."""
        yield from made_and_sent(self.plan, files, (work, crew, journal), self.send)

    def send(self, described: Described, work: Work) -> None:
        """Send a file that was made, note its SHA-256, and remove it here; a small one stays for the commit."""
        name = described["name"]
        file = work.folder / name
        large = retrying(self.target, lambda: commits.send(self.where, self.path_of(name), file), "written")
        self.sent.add(described, large.sha256 if large else "")
        if large:
            file.unlink()

    def publish(self, described: Sequence[Described]) -> None:
        """Commit all files at once, and remove the work here.

        Raises PlanError where others have committed files of these names meanwhile, NeoxconvError where the repository
        does not hold afterwards what was sent.
        """
        noted = self.noted()
        large = self.large_of(noted)
        small = {self.path_of(name): data for name, data in self.plan.sidecars.items()}
        here = [file.name for file in self.plan.files if file.name not in noted]
        local = {self.path_of(name): made_in(self.work) / name for name in here}
        content = {**local, **small, self.manifest: manifest(self.plan, described)}
        message = " ".join(filter(None, (f"neoxconv {__version__}:", self.plan.recipe.format, self.plan.recipe.type)))

        def commit() -> None:
            """Commit after what is there now: where another commit comes between, it is looked at and tried again."""
            now = self.head()
            if now:
                self.check_free(now[0], overwrite=self.overwrite)
            commits.commit(self.where, content, large, message=message, parent=now[0] if now else "")

        try:
            retrying(self.target, commit, "written")
        except NeoxconvError:
            if not self.is_published(large):  # else only the answer was lost
                raise
        if not self.is_published(large):
            raise NeoxconvError(
                f"{self.target}: the commit lacks files that were sent; see to .gitignore in the repository, "
                "and run the same command again."
            )
        ours.remove_work(self.work)

    def is_published(self, large: Mapping[str, Large]) -> bool:
        """Whether the repository's newest commit has all files: by size, and large ones by SHA-256."""
        now = self.head()
        held = self.files_at(now[0]) if now else {}
        sizes = {self.path_of(name): size for name, size in self.plan.sizes.items()}
        return self.manifest in held and all(
            path in held
            and held[path].get("size") == size
            and (path not in large or held[path]["sha256"] == large[path].sha256)
            for path, size in sizes.items()
        )

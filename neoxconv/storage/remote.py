"""A file or folder that fsspec reaches, with the part of pathlib's interface that readers use.

A `Remote` holds no connection, so it can be shared by threads and sent to other processes. As text it is a URL without
credentials: neither `user:password@` nor what follows a question mark (a signature) is in it; requests have both.
"""

from __future__ import annotations

import io
import posixpath
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.storage.blocks import Blocks
from neoxconv.storage.hub import HUB, HUB_FILES, repository
from neoxconv.storage.protocols import LARGEST, WEB, entries, facts_at, read_range, write_object
from neoxconv.storage.requests import FILE, FOLDER, Absent, Facts, changed, retrying

_SMALL = 80 << 10  # bytes: what the end of a zip is looked for in, and more
_DEEPEST, _MOST_PLACES = 8, 1 << 16  # of folders in one another; of files and folders in all
THREADS = 16  # requests at the same time


@dataclass
class _Cache:
    """What was learnt of the places in one source: nothing is asked twice, and of headers a few blocks are kept.

    Of `bands` of tensors nothing is kept, unless several targets are made of them at once.
    """

    facts: dict[str, Facts | None] = field(default_factory=dict)
    folders: dict[str, dict[str, Facts]] = field(default_factory=dict)
    headers: Blocks = field(default_factory=lambda: Blocks(16 << 10, 256))
    bands: Blocks = field(default_factory=lambda: Blocks(256 << 10, 0))


@dataclass(frozen=True, order=True, repr=False)
class Remote:
    """The place `path`, as fsspec's file system of that protocol takes it; `shown` is its URL in messages.

    `query` is what requests to a web server carry behind every path; `options` are those of the file system.
    """

    shown: str
    protocol: str
    path: str
    query: str = field(default="", kw_only=True)
    options: tuple[tuple[str, Any], ...] = field(default=(), kw_only=True)
    cache: _Cache = field(default_factory=_Cache, compare=False, kw_only=True)

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"Remote({self.shown!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Remote, query=self.query, options=self.options), (self.shown, self.protocol, self.path)

    @property
    def fs(self) -> Any:
        """The file system, which fsspec makes once for each process; of the Hub ours."""
        if self.protocol == HUB:
            return HUB_FILES
        import fsspec

        return fsspec.filesystem(self.protocol, **dict(self.options))

    @property
    def address(self) -> str:
        """What requests ask for."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def name(self) -> str:
        name = self.shown.rpartition("/")[2]
        return repository(self.path).name.rpartition("/")[2] if self.protocol == HUB and self.is_root else name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Remote:
        """The folder that holds it; of a server, a bucket or a repository itself."""
        if self.is_root:
            return self
        shown, path = (text.rpartition("/")[0] for text in (self.shown, self.path))
        return replace(self, shown=shown, path=path)

    def __truediv__(self, name: str) -> Remote:
        names = [inner for inner in name.split("/") if inner not in ("", ".")]
        return replace(self, shown="/".join([self.shown, *names]), path="/".join([self.path, *names]))

    def with_name(self, name: str) -> Remote:
        return self.parent / name

    def absolute(self) -> Remote:
        return self

    def anew(self) -> Remote:
        """The same place, with nothing known of it: fsspec forgets too what it was told of the store."""
        retrying(self, lambda: self.fs.invalidate_cache(), "reached")  # ftp and the like connect here
        return replace(self, cache=_Cache())

    def resolve(self) -> Remote:
        """The place itself: a store has neither a working folder nor links."""
        head, shown = self.shown.split("://", 1)
        return replace(self, shown=f"{head}://{posixpath.normpath(shown)}")

    def facts(self) -> Facts | None:
        """What is here, asked once; None for nothing. Raises CheckpointError where the store does not tell."""
        known = self.cache.facts
        if self.path not in known:
            above = self.cache.folders.get(self.parent.path)
            known[self.path] = self.facts_now() if above is None or self.is_unlisted else above.get(self.name)
        return known[self.path]

    @property
    def is_unlisted(self) -> bool:
        """Whether no listing tells that nothing is here: a web server's may lack what it has, and a root is in none."""
        return self.is_web or self.is_root

    @property
    def is_web(self) -> bool:
        """Whether it is on a plain web server, which takes no files."""
        return self.protocol in WEB

    @property
    def is_root(self) -> bool:
        """Whether it is a server, a bucket or a repository itself."""
        if self.protocol == HUB:
            return not repository(self.path).inside
        above = self.shown.rpartition("/")[0]
        return above.endswith("/") or not above

    @property
    def is_moving(self) -> bool:
        """Whether it is in a repository, at no commit of it."""
        return self.protocol == HUB and not repository(self.path).commit

    @property
    def moving(self) -> Remote:
        """The same place as something to write to: of a repository its main branch."""
        return replace(self, path=self.shown.partition("://")[2]) if self.protocol == HUB else self

    @property
    def is_shared(self) -> bool:
        """Whether others put files beside ours, as in a repository, which has some that the Hub makes."""
        return self.protocol == HUB

    @property
    def origin(self) -> dict[str, str]:
        """Where in the world it is: of the Hub, where a commit never changes, its URL and the commit."""
        if self.protocol != HUB:
            return {}
        where = repository(self.path)
        return {"url": f"{HUB}://{replace(where, revision='').path}", "revision": where.commit}

    def facts_now(self) -> Facts | None:
        """What is here now."""
        try:
            return retrying(self, lambda: facts_at(self.fs, self.address))
        except Absent as error:
            if error.refused:
                raise
            return None

    def exists(self) -> bool:
        """Whether anything is here. Raises CheckpointError where the store does not tell."""
        return self.facts() is not None

    def is_file(self) -> bool:
        """Whether a file is here that can be seen."""
        return self.kind == FILE

    def is_dir(self) -> bool:
        """Whether a folder is here that can be seen."""
        return self.kind == FOLDER

    @property
    def kind(self) -> str:
        listed = None if self.is_root else self.cache.folders.get(self.parent.path, {}).get(self.name)
        if listed:
            return listed.kind
        try:
            found = self.facts()
        except Absent:
            return ""
        return found.kind if found else ""

    def iterdir(self) -> Iterator[Remote]:
        """What is in the folder, in the order of names. Raises CheckpointError where the store does not tell."""
        folders = self.cache.folders
        if self.path not in folders:
            folders[self.path] = retrying(self, lambda: entries(self.fs, self.address))
        return (self / name for name in folders[self.path])

    def glob(self, pattern: str) -> Iterator[Remote]:
        """What the folder holds under names of that pattern; nothing where there is none to be seen."""
        try:
            return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))
        except Absent:
            return iter(())

    def rglob(self, pattern: str) -> Iterator[Remote]:
        """The same for the folders in it too.

        Raises CheckpointError where they have no end: a server may show a folder inside of itself.
        """
        inside, seen = [(path, 1) for path in self.glob("*")], 0
        while inside:
            path, depth = inside.pop(0)
            seen += 1
            if depth > _DEEPEST or seen > _MOST_PLACES:
                raise CheckpointError(f"{self}: folders in it have no end, or far too many files; give another folder.")
            if fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                inside += [(inner, depth + 1) for inner in path.glob("*")]

    def read_bytes(self) -> bytes:
        facts = self.facts() or Facts(FILE)
        return self.read(0, facts.size or 0, facts)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read(self, offset: int, length: int, known: Facts, ahead: int = 0) -> bytes:
        """Bytes of the file that is `known`, of which `ahead` more will be wanted next.

        Few at a time come from blocks that are fetched once, and so do more of them where several readers take turns.
        Raises CheckpointError where the store does not give them, or has another file by now.
        """
        end = offset + length
        blocks = self.cache.headers if length <= _SMALL else self.cache.bands
        if not blocks.most:
            return self.fetch(offset, end, known, ahead)
        wanted = end + ahead

        def fetch(start: int, stop: int) -> bytes:
            return self.fetch(start, stop, known, 0 if blocks is self.cache.headers else max(wanted - stop, 0))

        return blocks.read(self.path, range(offset, end), known.size or 0, fetch)

    def keep_bands(self, nbytes: int) -> None:
        """Keep the last bytes that were read of files of this source, so many, as several readers take turns."""
        self.cache.bands.keep(nbytes)

    def fetch(self, start: int, stop: int, known: Facts, ahead: int = 0) -> bytes:
        """Bytes from the store, LARGEST at a time."""
        cuts = ((cut, min(cut + LARGEST, stop)) for cut in range(start, stop, LARGEST))

        def read(cut: int, to: int) -> bytes:
            rest = stop + ahead - to
            return read_range(self.fs, self.address, start=cut, stop=to, known=known, ahead=rest)

        try:
            return b"".join(retrying(self, partial(read, *cut)) for cut in cuts)
        except Absent as error:
            raise error if error.refused else CheckpointError(f"{self}: was there when it was opened.") from None

    def put(self, file: Path, stop: threading.Event) -> None:
        """Make this the object with a file's bytes; nothing appears before it is whole, or where `stop` is set.

        Raises CheckpointError where the store does not take it.
        """

        def send() -> None:
            with open(file, "rb") as source:
                write_object(self.fs, self.address, source, size=file.stat().st_size, stop=stop)

        retrying(self, send, "written")

    def write(self, data: bytes) -> None:
        """Make this the object with these bytes. Raises CheckpointError where the store does not take it."""
        source, never = io.BytesIO(data), threading.Event()
        retrying(self, lambda: write_object(self.fs, self.address, source, size=len(data), stop=never), "written")

    def changed(self, known: Facts) -> bool:
        """Whether the store, asked anew, has another file here."""
        now = self.anew().facts_now()
        return now is None or changed(known, now)

"""Files and folders, here or far away: what is asked of both in one way, and the few things that differ.

A place is a `pathlib.Path` on this machine, or a `Remote` in a store. Whoever has one need not know which: what pathlib
offers is asked of the place itself, what pathlib lacks or does otherwise of a function here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

from neoxconv.storage.remote import THREADS, Remote

Item = TypeVar("Item")
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound="Place")


class Place(Protocol):
    """A file or a folder, there or not: the part of pathlib's interface that is used."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def parent(self: Kind) -> Kind: ...
    def __truediv__(self: Kind, name: str, /) -> Kind: ...
    def __lt__(self, other: Any, /) -> bool: ...
    def with_name(self: Kind, name: str, /) -> Kind: ...
    def absolute(self: Kind) -> Kind: ...
    def resolve(self: Kind) -> Kind: ...
    def exists(self) -> bool: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def iterdir(self: Kind) -> Iterator[Kind]: ...
    def glob(self: Kind, pattern: str, /) -> Iterator[Kind]: ...
    def rglob(self: Kind, pattern: str, /) -> Iterator[Kind]: ...
    def read_bytes(self) -> bytes: ...
    def read_text(self, encoding: str = ...) -> str: ...


def is_here(path: Place | None) -> TypeGuard[Path]:
    """Whether a place is on this machine, where other programs find it too."""
    return isinstance(path, Path)


def is_far(path: Place | None) -> TypeGuard[Remote]:
    """Whether a place is in a store or on a server."""
    return isinstance(path, Remote)


def is_file(path: Place) -> bool:
    """Whether a file is there; no error for a name that none can have."""
    return os.path.isfile(path) if isinstance(path, Path) else path.is_file()


def is_folder(path: Place) -> bool:
    """Whether a folder is there; no error for a name that none can have."""
    return os.path.isdir(path) if isinstance(path, Path) else path.is_dir()


def without_dots(path: Place) -> Place:
    """The place by its whole name, without `.` and `..`, whose parents are the folders above it; links stay."""
    return Path(os.path.abspath(path)) if isinstance(path, Path) else path


def holds(folder: Place, path: Place) -> bool:
    """Whether a place is `folder` itself or lies in it, links followed."""
    if isinstance(folder, Remote):
        return (
            isinstance(path, Remote)
            and path.protocol == folder.protocol
            and f"{path.path}/".startswith(f"{folder.path}/")
        )
    if isinstance(path, Remote):
        return False
    return Path(str(folder)).resolve() in (resolved := Path(str(path)).resolve(), *resolved.parents)


def origin_of(path: Place) -> dict[str, str]:
    """The URL of a place and the commit that is read there, of the Hub; nothing of others, which may change."""
    return path.origin if isinstance(path, Remote) else {}


def is_shared(path: Place) -> bool:
    """Whether others put files beside a target's."""
    return isinstance(path, Remote) and path.is_shared


def keep_bands(path: Place, nbytes: int) -> None:
    """Keep so many of the last bytes that were read of a source far away; of one here the system keeps them."""
    if isinstance(path, Remote):
        path.keep_bands(nbytes)


def anew(path: Place) -> Place:
    """The place with nothing kept of what its store said of it before."""
    return path.anew() if isinstance(path, Remote) else path


def at_once(where: Place) -> int:
    """How many threads read a source best: the processors, 8 at most; far away more, which mostly wait."""
    return THREADS if isinstance(where, Remote) else min(os.cpu_count() or 1, 8)


def together(function: Callable[[Item], Result], items: Iterable[Item], where: Place) -> list[Result]:
    """The function's results in the order of the items: of a source far away many at a time, else one by one."""
    if not isinstance(where, Remote):
        return [function(item) for item in items]
    context = copy_context()  # of which threads know nothing by themselves: that files are watched
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda item: context.copy().run(function, item), items))

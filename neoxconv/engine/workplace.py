"""Where a run works, and that it works there alone.

The lock is the operating system's, on a file in TARGET.partial: it ends with the process that holds it, however that
ends, so a stale one does not exist. The file says which process it is.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from neoxconv.errors import PlanError
from neoxconv.storage import Place, is_here

LOCK = "lock"
SENT = "sent"  # notes on the files that are in a store


def partial_of(target: Path) -> Path:
    """Where a target is made."""
    return target.with_name(target.name + ".partial")


def work_of(target: Place) -> Path:
    """Where a run works on a target: beside it, or for one in a store in the working folder."""
    return partial_of(target if is_here(target) else Path.cwd() / target.name)


def made_in(work: Path) -> Path:
    """Where in it the target's files lie; beside them are the journal and the lock."""
    return work / "target"


def has_files(work: Path) -> bool:
    """Whether any file of a target is there; else a run was killed before its first one, or after its last rename."""
    return any(path.is_file() for path in made_in(work).rglob("*"))


def held(work: Path) -> int:
    """The bytes of disk that unfinished work takes."""
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file()) if work.exists() else 0


def nearest_folder(path: Path) -> Path:
    """What exists already of the path to a target or to its work."""
    return next(folder for folder in path.parents if folder.exists())


def free_for(work: Path) -> int:
    """The bytes that are free on the disk where work is, or will be."""
    return shutil.disk_usage(nearest_folder(work)).free


def open_own(path: Path, mode: str) -> IO[bytes]:
    """A file of ours opened in a binary mode; a link in its place is not followed. Raises OSError."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """The folder `work`, made where it is missing, for this process alone.

    Raises PlanError naming the process that has it. File systems without locks are used without.
    """
    descriptor = hold(work)
    try:
        yield
    finally:
        os.close(descriptor)


def hold(work: Path) -> int:
    """The descriptor of the lock, held.

    A run that ends removes its folder with the lock's file in it, at any moment of ours. Between our `mkdir` and our
    `open` the folder may go: there is nothing to open, and we begin again. Between `open` and `_take` the file may go:
    we then hold the lock of a file that nobody else can find, while a third run makes a new one. So after locking we
    look whether the file of that name is still the one that we hold, and begin again where it is not.
    """
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            if work.is_symlink():
                raise PlanError(f"{work}: is in the way: a link, not the unfinished work of a conversion; rename it.")
            descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the other run has just finished
            continue
        try:
            _take(descriptor, work)
            if os.path.samestat(os.fstat(descriptor), os.stat(work / LOCK)):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except FileNotFoundError:  # it was removed while we locked it
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, work: Path) -> None:
    """Lock an open file, or raise PlanError where another process has."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
        raise PlanError(
            f"{work}: another run is at work there, process {holder}; wait until it ends, or stop it."
        ) from error
    except OSError:
        return

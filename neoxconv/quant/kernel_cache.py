"""Where the kernels' machine code is kept between runs: a folder that can be written, named by the kernels' sources.

numba knows that a kernel is stale by the text of the file it stands in, but kernels are inlined from file to file: the
digest of all of them tells. Its own choice of a folder fails where the package and the home folder cannot be written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
_ROOM = 4 << 20  # bytes: what all kernels together take; numba raises OSError where a disk is full


def folder_for(chosen: str, numba_version: str) -> Path | None:
    """The folder that can hold machine code made by this numba of the kernels as they are; None: there is none.

    The first that will do of the folder that the user has `chosen` (NUMBA_CACHE_DIR; "" for none), the user's cache
    and the temporary folder. What lies there is run, so the latter two must be the user's alone.
    """
    name = digest(SOURCES, numba_version)
    return next((root / name for root in _roots(chosen) if name and holds(root / name)), None)


def digest(sources: Path, numba_version: str) -> str:
    """Which code the kernels' files give; "" where there are no files to read."""
    try:
        texts = [(file.relative_to(sources).as_posix(), file.read_bytes()) for file in sorted(sources.rglob("*.py"))]
    except OSError:
        return ""
    return hashlib.sha256(repr((numba_version, texts)).encode()).hexdigest()[:16] if texts else ""


def _roots(chosen: str) -> Iterator[Path]:
    """The folders to try, in order."""
    if chosen:
        yield Path(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is none, says its specification
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and _is_private(private := Path(cache) / "neoxconv" / "kernels"):
        yield private
    try:
        private = Path(tempfile.gettempdir()) / f"neoxconv-kernels-{os.geteuid()}"
    except OSError:  # no folder for temporary files
        return
    if _is_private(private):
        yield private


def _is_private(folder: Path) -> bool:
    """Whether a folder, made where it is absent, is this user's and no other can write or look into it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # of a link itself
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def holds(folder: Path) -> bool:
    """Whether a folder, made where it is absent, has room for all kernels."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError:
        return False
    return True

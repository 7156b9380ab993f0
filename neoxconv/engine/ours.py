"""What on a disk is ours, and its removal: only what our own manifest or journal lists is ever removed or replaced.

A target's folder is ours where its manifest is and lists every file in it. TARGET.partial is ours where it is a real
folder with nothing in it but our lock, our journal, our notes on what was sent, and in `target` files that the journal
lists. Links are never ours. Whatever else there is gets named, and nothing is touched.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

from neoxconv.engine.journal import NEW, Journal, is_journal, listed_files
from neoxconv.engine.manifest import MANIFEST, beside, our_files
from neoxconv.engine.workplace import LOCK, SENT, has_files, made_in
from neoxconv.errors import PlanError

_NAMED = 5  # strangers in a message
_LOCK_TEXT = re.compile(rb"(\d+ on .{0,300})?")
_NOTE = b'{"key": "'  # how a note on a file that was sent begins
_BEGUN = ".begun"
_KEY = re.compile(rb"[0-9a-f]{0,64}")


def check_folder(target: Path) -> None:
    """Raise PlanError unless a folder is a target of ours with nothing added, so that it may be replaced."""
    names = our_files(target / MANIFEST) if _is_plain(target / MANIFEST) else None
    if names is None:
        raise PlanError(
            f"{target}: is a folder without our {MANIFEST}, so it may hold other things; "
            "--overwrite replaces only what neoxconv made. Remove it yourself, or give another name."
        )
    if added := list(_strangers(target, {*names, MANIFEST})):
        raise PlanError(
            f"{target}: holds what neoxconv did not make: {_first(added)}; --overwrite would remove it. "
            "Move it away, or give another name."
        )


def check_beside(target: Path) -> None:
    """Raise PlanError where the place of a single file's manifest is taken by something that is not such a one."""
    path = beside(target)
    if _exists(path) and not (_is_plain(path) and our_files(path) is not None):
        raise PlanError(
            f"{path}: is in the way of the manifest of {target.name}, and none of neoxconv's; rename it, "
            "or give another name."
        )


def check_work(work: Path) -> None:
    """Raise PlanError unless TARGET.partial is absent or ours."""
    if not _exists(work):
        return
    if not _is_folder(work):
        raise PlanError(f"{work}: is in the way: a file or a link, not the unfinished work of a conversion; rename it.")
    if found := list(_strangers_in_work(work)):
        raise PlanError(
            f"{work}: is in the way: it holds what is not the unfinished work of a conversion: {_first(found)}; "
            "rename it."
        )


def check_aside(aside: Path) -> None:
    """Raise PlanError unless the place where an old target is set aside is free, or has one of ours."""
    if _exists(aside) and not _is_folder(aside):
        raise PlanError(f"{aside}: is in the way, and none of neoxconv's folders; rename it.")
    if _exists(aside) and any(aside.iterdir()):
        check_folder(aside)


def _is_set_aside(aside: Path) -> bool:
    """Whether a folder was set aside by us."""
    try:
        check_aside(aside)
    except PlanError:
        return False
    return _exists(aside)


def is_published(work: Path, aside: Path) -> bool:
    """Whether TARGET.partial is there, ours, and without files of a target, as a run leaves it that has published."""
    try:
        check_work(work)
        check_aside(aside)
    except PlanError:
        return False
    return _is_folder(work) and not has_files(work) and not (work / SENT).exists()


def remove_aside(aside: Path) -> None:
    """Remove a folder that was set aside, its manifest last, so that it is known to be ours until it is gone.

    One that is not ours is left alone.
    """
    if not _is_set_aside(aside):
        return
    _empty(aside, keep=MANIFEST)
    (aside / MANIFEST).unlink(missing_ok=True)
    aside.rmdir()


def discard_work(work: Path) -> None:
    """Empty TARGET.partial but for its lock, which is held: the journal last, by which the rest is known to be ours.

    Raises PlanError, and removes nothing, where it is not ours.
    """
    check_work(work)
    for folder in (made_in(work), work / SENT):
        if folder.exists():
            _empty(folder)
            folder.rmdir()
    for name in (NEW, Journal.NAME):
        (work / name).unlink(missing_ok=True)


def remove_work(work: Path) -> None:
    """Remove TARGET.partial, the lock's file last. Raises PlanError, and removes nothing, where it is not ours."""
    discard_work(work)
    (work / LOCK).unlink(missing_ok=True)
    work.rmdir()


def _is_plain(path: Path) -> bool:
    """Whether a regular file is there, and no link to one."""
    return stat.S_ISREG(_mode(path))


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _exists(path: Path) -> bool:
    """Whether anything is there, a link that leads nowhere too."""
    return _mode(path) != 0


def _mode(path: Path) -> int:
    """What is there by that name, links not followed; 0 for nothing."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _strangers(folder: Path, names: Collection[str], inside: str = "") -> Iterator[str]:
    """What lies in a folder and is not a regular file of one of these names, or a folder on the way to one."""
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for path in sorted(_entries(folder)):
        name = f"{inside}{path.name}"
        if _is_folder(path) and name in above:
            yield from _strangers(path, names, f"{name}/")
        elif not (_is_plain(path) and name in names) and _exists(path):
            yield name


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where another run has just removed it."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _strangers_in_work(work: Path) -> Iterator[str]:
    """What in TARGET.partial is not ours; what another run removes meanwhile does not count."""
    names = listed_files(work / Journal.NAME) if _is_plain(work / Journal.NAME) else ()
    for path in sorted(_entries(work)):
        if path.name == made_in(work).name and _is_folder(path):
            yield from (f"{path.name}/{name}" for name in _strangers(path, names))
        elif path.name == SENT and _is_folder(path):
            yield from (f"{SENT}/{note.name}" for note in sorted(_entries(path)) if not _is_note(note))
        elif not (path.name in _OWN and _OWN[path.name](path)) and _exists(path):
            yield path.name


def _is_lock(path: Path) -> bool:
    return _is_plain(path) and _LOCK_TEXT.fullmatch(_head(path, 400)) is not None


def _is_journal(path: Path) -> bool:
    return _is_plain(path) and is_journal(path)


def _is_note(path: Path) -> bool:
    """Whether a file in `sent` is one of our notes, one cut short too."""
    if not _is_plain(path):
        return False
    if path.name == _BEGUN:
        return _KEY.fullmatch(_head(path, 100)) is not None
    head = _head(path, len(_NOTE))
    return _NOTE.startswith(head)


def _head(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where another run has just removed it."""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except FileNotFoundError:
        return b""


_OWN: dict[str, Callable[[Path], bool]] = {LOCK: _is_lock, Journal.NAME: _is_journal, NEW: _is_journal}


def _empty(folder: Path, keep: str = "") -> None:
    """Remove everything in a folder that was found to be ours but the file `keep`; links are not followed."""
    for path in folder.iterdir():
        if _is_folder(path):
            _empty(path)
            path.rmdir()
        elif path.name != keep:
            path.unlink()


def _first(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

"""Where a target is made and how it gets its name: what must hold before, what is put on disk, and the rename.

All work is in TARGET.partial; TARGET itself is absent or whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neoxconv.engine.manifest import MANIFEST, beside, manifest
from neoxconv.engine.plan import Plan
from neoxconv.engine.workplace import has_files, held, locked, made_in, partial_of, work_of
from neoxconv.errors import PlanError
from neoxconv.storage.remote import Place, Remote
from neoxconv.words import size


def nearest_folder(target: Path) -> Path:
    """What exists already of the path to a target."""
    return next(folder for folder in target.parents if folder.exists())


def check_target(plan: Plan, target: Path, overwrite: bool) -> None:
    """Raise PlanError where the target exists (an empty folder does not count) or is of the wrong kind."""
    if plan.single and target.is_dir():
        raise PlanError(
            f"{target}: is a folder; {plan.recipe.format} writes one file, "
            f"so give its name, such as {target / 'model'}.{plan.recipe.format}."
        )
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise PlanError(f"{target}: is a device or a pipe, which cannot be replaced; give another name.")
    parent = nearest_folder(target)
    if not parent.is_dir():
        raise PlanError(f"{target}: cannot be made, because {parent} is a file; give another place.")
    if not os.access(parent, os.W_OK):
        raise PlanError(f"{target}: cannot be made, because {parent} may not be written to; give another place.")
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        tidy(target)
        raise PlanError(f"{target}: exists already; give another name, or --overwrite to replace it.")
    if occupied and target.is_dir() and not (target / MANIFEST).is_file():
        raise PlanError(
            f"{target}: is a folder without our {MANIFEST}, so it may hold other things; "
            "--overwrite replaces only what neoxconv made. Remove it yourself, or give another name."
        )


def aside_of(target: Path) -> Path:
    """Where a target lies that is being replaced."""
    return target.with_name(f".{target.name}.replaced-by-neoxconv")


def tidy(target: Path) -> None:
    """Remove what a run left behind that was killed after it had published its target."""
    work = partial_of(target)
    if work.is_dir() and not has_files(work):
        with locked(work):
            remove(aside_of(target))
            shutil.rmtree(work)


def check_space(plan: Plan, target: Path) -> None:
    """Raise PlanError where the disk cannot hold what is still to be written."""
    needed, free = room(plan, target)
    if needed > free:
        raise PlanError(
            f"{nearest_folder(target)}: {size(needed)} are needed and {size(free)} are free; "
            f"free {size(needed - free)} or choose another disk."
        )


def room(plan: Plan, target: Place) -> tuple[int, int]:
    """The bytes that are still to be written, and those that the disk has free."""
    work = work_of(target)
    return max(plan.total - held(work), 0), shutil.disk_usage(nearest_folder(work)).free


def explain(error: OSError, plan: Plan, target: Place) -> str:
    """An operating system's error in terms of the target, or of where one in a store is made."""
    work = work_of(target)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed, free = room(plan, target)
        where = work if isinstance(target, Remote) else target
        return (
            f"{where}: {os.strerror(error.errno)}: {size(needed)} are still to be written and {size(free)} are free; "
            "make room and run the same command again to continue."
        )
    kept = f"; what is done is kept in {work.name}" if work.is_dir() else ""
    return f"{error.filename or target}: {error.strerror or error}{kept}."


def settle(plan: Plan, made: Path, described: Sequence[Mapping[str, Any]]) -> None:
    """Write the small files and the manifest of a folder whose files are `described`, and put everything on disk."""
    for name, data in plan.sidecars.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    (made / MANIFEST).write_bytes(manifest(plan, described))
    for path in (*sorted(made.rglob("*")), made, made.parent):
        sync(path)


def sync(path: Path) -> None:
    """Ask the disk to hold a file's or a folder's contents now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(plan: Plan, work: Path, target: Path) -> None:
    """Give the finished files their name; what they replace is set aside first and removed last.

    Killed at any point, the next run finds its journal, hashes what it made, and publishes it.
    """
    made, aside = made_in(work), aside_of(target)
    if plan.single:
        os.replace(made / MANIFEST, beside(target))
        os.replace(made / plan.files[0].name, target)
    else:
        if target.exists():
            remove(aside)
            os.replace(target, aside)
        os.replace(made, target)
    sync(target.parent)
    if aside.is_file():
        beside(target).unlink(missing_ok=True)
    remove(aside)
    shutil.rmtree(work)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""A file beside the main business: a report, an importance matrix."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.storage import Place, holds


def check_side_file(path: Path, inputs: Iterable[Place | None], overwrite: bool = True) -> None:
    """Raise PlanError unless a file beside the main business may be written: a report, an importance matrix.

    It may be neither one of the `inputs` nor in a folder among them.
    """
    if path.is_dir():
        raise PlanError(f"{path}: is a folder; give the name of a file.")
    if path.exists() and not path.is_file():
        raise PlanError(f"{path}: is a device or a pipe, which cannot be replaced; give the name of a file.")
    if path.exists() and not overwrite:
        raise PlanError(f"{path}: exists already; give another name, or --overwrite.")
    if not path.resolve().parent.is_dir():
        raise PlanError(f"{path.parent}: is no folder; make it first.")
    if not os.access(path.resolve().parent, os.W_OK):
        raise PlanError(f"{path}: cannot be made, because {path.parent} may not be written to; give another place.")
    for given in inputs:
        if given and holds(given, path):
            raise PlanError(f"{path}: would be written into {given}, which is read; give another name.")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, of a name that nothing had; finished it takes its place, else it vanishes.

    Raises NeoxconvError where the disk does not take it.
    """
    partial = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
        partial = Path(name)
        os.fchmod(descriptor, 0o666 & ~_umask())
        os.close(descriptor)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise NeoxconvError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def _umask() -> int:
    """The rights that new files are not given, which can only be read by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

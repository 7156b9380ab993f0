"""Files that are read whole, and what is too large to be: bounded in memory, also where a file has no end."""

from __future__ import annotations

import os
from pathlib import Path

from neoxconv.errors import CheckpointError

_LARGEST_TEXT = 64 << 20  # bytes of a text, of questions or of token ids that are read whole
_ROUND = 1 << 20  # bytes that are read at once of what does not tell its size


def read_bounded(path: Path, most: int | None = None) -> bytes:
    """All bytes of a file, pipe or device of `most` bytes at most (LARGEST_TEXT).

    Raises CheckpointError where it cannot be read or has more: before it is read where it tells its size, else when
    more than that has come.
    """
    most = _LARGEST_TEXT if most is None else most
    data = bytearray()
    try:
        with open(path, "rb", buffering=0) as file:
            check_size(path, os.fstat(file.fileno()).st_size, most)
            while piece := file.read(_ROUND):
                data += piece
                check_size(path, len(data), most, "or more, as far as it was read")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give another file.") from error
    return bytes(data)


def check_size(path: Path, size: int, most: int | None = None, more: str = "") -> None:
    """Raise CheckpointError where a file of `size` bytes has more than `most` (LARGEST_TEXT)."""
    most = _LARGEST_TEXT if most is None else most
    if size > most:
        found = f"{size} bytes {more}".rstrip()
        raise CheckpointError(f"{path}: has {found}, expected {most} at most; give a part of it.")

"""A file of a plan on disk: begun with what is known before its tensors, finished with what is known after them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from neoxconv.core.layout import Digest, FileLayout
from neoxconv.engine.manifest import Described, describe_file
from neoxconv.engine.plan import slot_key
from neoxconv.engine.workplace import open_own


def begin_file(file: FileLayout, folder: Path) -> None:
    """The file in `folder` at its full size (sparse), with the pieces that are known; tensors in it are left alone."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path, "r+b" if path.exists() else "w+b") as stream:
        stream.truncate(file.size)
        for offset, piece in file.pieces:
            stream.seek(offset)
            stream.write(piece)


def finish_file(file: FileLayout, folder: Path, digests: Mapping[str, Digest]) -> Described:
    """Fill the ranges that need the digests of the file's tensors; the manifest's entry for the whole file."""
    written = [digests[slot_key(file, slot)] for slot in file.slots]
    with open_own(folder / file.name, "r+b") as stream:
        for late in file.late:
            stream.seek(late.offset)
            stream.write(late.make(written))
    return describe_file(file, folder, digests)

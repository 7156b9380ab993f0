"""Byte ranges of a file, here or in a store far away.

A `Storage` holds no open file, so it can be shared by threads and sent to other processes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from neoxconv.dtypes import Bytes
from neoxconv.errors import CheckpointError
from neoxconv.storage.places import Place  # until imports are rewritten
from neoxconv.storage.places import is_file as is_file
from neoxconv.storage.places import is_folder as is_folder
from neoxconv.storage.protocols import LARGEST
from neoxconv.storage.remote import Remote
from neoxconv.storage.requests import FILE, Facts

# What git-lfs leaves in place of a file that it has not fetched, and what no such file reaches (its docs/spec.md).
_POINTER, _LARGEST_POINTER = b"version https://git-lfs", 1024  # bytes


Watch = Callable[[Place, int, Bytes], None]  # of a file's bytes from an offset on, each time that some are read
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Files that are opened meanwhile tell `watch` of what is read of them, then and later."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


@dataclass(frozen=True)
class Storage:
    """A source file of `size` bytes at `path`; `version` is what a store calls its content."""

    path: Place
    size: int
    version: str = ""
    watch: Watch | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, offset: int, length: int, ahead: int = 0) -> Bytes:
        """`length` bytes from `offset` on, as uint8; the `ahead` that follow them will be wanted next.

        Raises CheckpointError where the file does not hold them all.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {offset + length} are wanted but the file has {self.size}. "
                "It is cut short or damaged; download it again."
            )
        data = np.empty(length, np.uint8)
        if isinstance(self.path, Remote):
            data[:] = np.frombuffer(self.path.read(offset, length, self.facts, ahead), np.uint8)
        else:
            self._read_into(data, offset)
        if self.watch:
            self.watch(self.path, offset, data)
        return data

    def _read_into(self, data: Bytes, offset: int) -> None:
        """Fill `data` with the bytes of a file on a disk."""
        view, done, length = data.data, 0, data.size
        try:
            with open(str(self.path), "rb", buffering=0) as file:
                while done < length:
                    count = os.preadv(file.fileno(), [view[done:]], offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{self.path}: ends at {offset + done} but had {self.size} bytes when opened; "
                            "wait until it is whole, and run again."
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}).") from error

    @property
    def facts(self) -> Facts:
        """What a store said of the file when it was opened."""
        return Facts(FILE, self.size, self.version)

    @property
    def state(self) -> str | int:
        """What is another where the file's content is: as the store said, or the time of its last change now."""
        return self.version if isinstance(self.path, Remote) else os.stat(str(self.path)).st_mtime_ns

    def has_changed(self) -> bool:
        """Whether a store has another file by now."""
        return isinstance(self.path, Remote) and self.path.changed(self.facts)

    def text(self, offset: int = 0, length: int | None = None) -> bytes:
        """The same bytes as an immutable string, for headers; the whole file by default.

        Raises CheckpointError where git-lfs has left a pointer in place of the file: all that is read begins here.
        """
        data = self.read(offset, self.size - offset if length is None else length).tobytes()
        if offset == 0 and self.size < _LARGEST_POINTER and _POINTER.startswith(data[: len(_POINTER)]):
            self._check_no_pointer()
        return data

    def _check_no_pointer(self) -> None:
        """Raise CheckpointError where a small file is a pointer of git-lfs."""
        if self.read(0, min(len(_POINTER), self.size)).tobytes() == _POINTER:
            raise CheckpointError(f"{self.path}: is a git-lfs pointer, not the file itself; run `git lfs pull`.")


def open_storage(path: Place) -> Storage:
    """The file at `path`, ready to be read. Raises CheckpointError where there is none."""
    if isinstance(path, Remote):
        return _open_remote(path)
    try:
        size = os.stat(str(path)).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from error
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give one.")
    return Storage(path, size, watch=_WATCH.get())


def _open_remote(path: Remote) -> Storage:
    """The file at a URL."""
    facts = path.facts()
    if facts is None or facts.kind != FILE:
        raise CheckpointError(
            f"{path}: {'cannot be found' if facts is None else 'is not a file'}; correct the address."
        )
    if facts.size is None:
        raise CheckpointError(f"{path}: the server does not tell its size; download it, or put it on another server.")
    return Storage(path, facts.size, facts.version, _WATCH.get())


def size_of(path: Place) -> int:
    """The bytes of a file, which need not be readable."""
    return path.stat().st_size if isinstance(path, Path) else open_storage(path).size


def stream_of(path: Place) -> BinaryIO:
    """A file as a stream."""
    return opener_of(path)()


def opener_of(path: Place) -> Callable[[], BinaryIO]:
    """What opens a file as a stream, as often as it is called; a store is asked for it once."""
    if isinstance(path, Path):
        return lambda: open(path, "rb")
    file = open_storage(path)
    return lambda: cast(BinaryIO, io.BufferedReader(Stream(file), LARGEST))


class Stream(io.RawIOBase):
    """A file as a stream: for pickles that lie one after the other, and for what is far away."""

    def __init__(self, file: Storage) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.file.size - self.position))
        buffer[:count] = self.file.text(self.position, count)
        self.position += count
        return count


def write_all(descriptor: int, data: Bytes, offset: int) -> None:
    """Write all of `data` at `offset`; one pwrite may write less."""
    view = data.data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count

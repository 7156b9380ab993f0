"""Byte ranges of a file. A `Storage` holds no open file, so it can be shared by threads and sent to other processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neoxconv.dtypes import Bytes
from neoxconv.errors import CheckpointError


@dataclass(frozen=True)
class Storage:
    """A source file of `size` bytes at `path`."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, offset: int, length: int) -> Bytes:
        """`length` bytes from `offset` on, as uint8. Raises CheckpointError where the file does not hold them all."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {offset + length} are wanted but the file has {self.size}. "
                "It is cut short or damaged; download it again."
            )
        data = np.empty(length, np.uint8)
        view, done = data.data, 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                while done < length:
                    count = os.preadv(file.fileno(), [view[done:]], offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{self.path}: ends at {offset + done} but had {self.size} bytes when opened."
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}).") from error
        return data

    def text(self, offset: int = 0, length: int | None = None) -> bytes:
        """The same bytes as an immutable string, for headers; the whole file by default."""
        return self.read(offset, self.size - offset if length is None else length).tobytes()


def open_storage(path: Path) -> Storage:
    """The file at `path`, ready to be read. Raises CheckpointError where there is none."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from error
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file.")
    return Storage(path, status.st_size)

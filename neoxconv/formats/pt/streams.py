"""Streams that pickles are read from: a file's bytes, and a guard that bounds what is asked of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from neoxconv.storage import Storage

MAX_STEPS = 2_000_000
MAX_READ = 64 << 20
CHUNK = 1 << 20


class Stream(io.RawIOBase):
    """A file as a stream, for pickles that lie one after the other."""

    def __init__(self, file: Storage) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.file.size - self.position)
        buffer[:count] = self.file.text(self.position, count)
        self.position += count
        return count


class Bounded:
    """A stream of which nobody reads more than 64 MiB at once, nor less than asked, nor without end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.steps = stream, 0

    def spend(self, steps: int) -> None:
        """Count work; raises ValueError where it is more than any checkpoint asks for."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError("it asks for more work than any checkpoint")

    def read(self, count: int) -> bytes:
        self.spend(1)
        if not 0 <= count <= MAX_READ:
            raise ValueError(f"an item claims {count} bytes")
        data: bytes = self.stream.read(min(count, CHUNK))  # which takes all the memory that it may return
        if len(data) < count:
            data += b"".join(self.chunks(count - len(data)))
        return data

    def chunks(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, piece by piece; raises EOFError where the stream ends before."""
        while count:
            data = self.stream.read(min(count, CHUNK))
            if not data:
                raise EOFError("it ends early")
            yield data
            count -= len(data)

    def readline(self) -> bytes:
        self.spend(1)
        line: bytes = self.stream.readline(1 << 16)
        return line

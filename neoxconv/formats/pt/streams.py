"""The guard of streams that pickles are read from: it bounds what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_STEPS = 2_000_000  # reads and other work
_MAX_READ = 64 << 20  # bytes of one item
_MAX_LINE = 1 << 16  # bytes
_CHUNK = 1 << 20  # bytes read at once


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
        """The next `count` bytes. Raises ValueError for more than 64 MiB, EOFError where the stream ends before."""
        self.spend(1)
        if not 0 <= count <= _MAX_READ:
            raise ValueError(f"an item claims {count} bytes")
        data: bytes = self.stream.read(min(count, _CHUNK))  # which takes all the memory that it may return
        if len(data) < count:
            data += b"".join(self.chunks(count - len(data)))
        return data

    def chunks(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, piece by piece; raises EOFError where the stream ends before."""
        while count:
            data = self.stream.read(min(count, _CHUNK))
            if not data:
                raise EOFError("it ends early")
            yield data
            count -= len(data)

    def readline(self) -> bytes:
        """The next line, or the first 64 KiB of it."""
        self.spend(1)
        line: bytes = self.stream.readline(_MAX_LINE)
        return line

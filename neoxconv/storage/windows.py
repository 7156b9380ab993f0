"""Long ranges of files far away, read by and by: a request for each range, and never more of it here than is wanted.

Tensors are read in bands of one or two MiB, and a store that counts requests would be asked tens of thousands of times.
So where a thread has read IN_A_ROW bytes without a gap, what it will want next is asked for with what it wants, up to
LONGEST bytes, and taken from the connection as it is read: what is not taken waits in the network's own buffers. Rows
in another order (query, key and value of GGUF) are read in runs that are shorter, and nothing more is asked for.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from neoxconv.storage.requests import Unusable

LONGEST = 64 << 20  # bytes of one request
IN_A_ROW = 2 << 20  # bytes
_MOST = 64  # connections that wait for their readers; huggingface_hub's client has 100
_KNOWN = 4096  # reads of which it is known where they ended
_IDLE = 10.0  # seconds after which another may have a connection's place
Open = Callable[[str, int, int], AbstractContextManager[Iterator[bytes]]]  # of a path's bytes from one to another


@dataclass
class _Window:
    """A thread's last read of a file: it ended at `position`, and bytes up to `stop` are on their way."""

    position: int
    stop: int
    row: int = 0  # bytes that were read before `position` without a gap
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    left: bytes = b""  # of the last chunk
    connection: ExitStack = field(default_factory=ExitStack)
    since: float = field(default_factory=time.monotonic)

    def take(self, count: int) -> bytes:
        """The next bytes. Raises Unusable where fewer come."""
        pieces, missing = [self.left[:count]], count - len(self.left[:count])
        self.left = self.left[count:]
        while missing:
            chunk = next(self.chunks, b"")
            if not chunk:
                raise Unusable(f"{count} bytes from {self.position} on were asked for, and {count - missing} came")
            pieces.append(chunk[:missing])
            missing, self.left = missing - len(pieces[-1]), chunk[missing:]
        self.position += count
        self.row += count
        return b"".join(pieces)


class Windows:
    """Reads of many threads in many files; `opened` is how a range is asked for."""

    def __init__(self, opened: Open) -> None:
        self.opened, self.lock = opened, threading.Lock()
        self.waiting: OrderedDict[tuple[int, str], _Window] = OrderedDict()  # those not read from now

    def read(self, path: str, start: int, stop: int, end: int) -> bytes:
        """Bytes `start` to `stop` of a file, of which this thread may read on up to `end`."""
        key = threading.get_ident(), path
        with self.lock:
            window = self.waiting.pop(key, None)
        window = self._going_on(window, path, start, stop, end)
        try:
            data = window.take(stop - start)
        except BaseException:
            window.connection.close()
            raise
        if window.position == window.stop:
            next(window.chunks, b"")  # only then it may be used again
            window.connection.close()
        self._keep(key, window)
        return data

    def _going_on(self, window: _Window | None, path: str, start: int, stop: int, end: int) -> _Window:
        """The window that holds bytes `start` to `stop`: the last one where they are in it, else one asked for now."""
        row = window.row if window and window.position == start else 0
        if window and row and stop <= window.stop:
            return window
        if window:
            window.connection.close()
        length = stop - start
        wide = row >= IN_A_ROW and self._has_room()
        most = max(length, LONGEST // length * length) if wide else length  # whole reads
        found = _Window(start, min(max(end, stop), start + most), row)
        found.chunks = found.connection.enter_context(self.opened(path, start, found.stop))
        return found

    def _has_room(self) -> bool:
        """Whether one more connection may wait for its reader; one that has waited long makes room for it."""
        with self.lock:
            open_now = [key for key, window in self.waiting.items() if window.position < window.stop]
            if len(open_now) < _MOST:
                return True
            if time.monotonic() - self.waiting[open_now[0]].since < _IDLE:
                return False
            oldest = self.waiting.pop(open_now[0])
        oldest.connection.close()
        return True

    def _keep(self, key: tuple[int, str], window: _Window) -> None:
        """Note where a thread's read of a file ended."""
        window.since = time.monotonic()
        with self.lock:
            self.waiting[key] = window
            if len(self.waiting) > _KNOWN:
                self.waiting.popitem(last=False)

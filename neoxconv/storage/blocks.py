"""Blocks of files far away that are kept for a while, as they are read again: headers, and bands of several readers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Blocks:
    """The last blocks that were read of files, `most` of them of `size` bytes: what is kept is not fetched again."""

    size: int
    most: int
    kept: OrderedDict[tuple[str, int], bytes] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=threading.Lock)

    def read(self, path: str, wanted: range, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes of a file of `size`; the blocks that are not kept come in one request."""
        first = wanted.start // self.size * self.size
        found = {start: self.kept.get((path, start)) for start in range(first, wanted.stop, self.size)}
        missing = [start for start, data in found.items() if data is None]
        if missing:
            end = min(missing[-1] + self.size, size)
            data = fetch(missing[0], end)
            found |= {start: data[start - missing[0] :][: self.size] for start in range(missing[0], end, self.size)}
        with self.lock:
            for start, block in found.items():
                self.kept[path, start] = block or b""
                self.kept.move_to_end((path, start))
            self._forget()
        return b"".join(block or b"" for block in found.values())[wanted.start - first :][: len(wanted)]

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes from now on."""
        with self.lock:
            self.most = nbytes // self.size
            self._forget()

    def _forget(self) -> None:
        """Let go of the oldest blocks that are too many."""
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)

"""A bar on stderr."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, what: str, quiet: bool, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A bar on stderr with counts, rate and time left, moved on by calls from any thread; none where nobody looks."""
    if quiet or not sys.stderr or not sys.stderr.isatty():  # there is no stderr where it was closed
        yield lambda count: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    width, height = shutil.get_terminal_size()  # tqdm shows nothing where a terminal says that it has none
    bar = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", unit_divisor=1024, ncols=width, nrows=height)
    with bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance

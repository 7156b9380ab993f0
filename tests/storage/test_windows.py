"""Long ranges read by and by: few requests, every byte once, none of it kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from neoxconv.storage import windows
from neoxconv.storage.requests import Unusable
from neoxconv.storage.windows import Windows

DATA = bytes(range(251)) * 400
END = len(DATA)


class Store:
    """Ranges of DATA, which come in pieces of 64 bytes; what was asked for, what was given, and what is still open."""

    def __init__(self) -> None:
        self.asked, self.lengths, self.open, self.broken = list[tuple[int, int]](), list[int](), 0, False

    @property
    def given(self) -> int:
        return sum(self.lengths)

    @contextmanager
    def opened(self, path: str, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        self.asked.append((start, stop))
        self.open += 1
        try:
            yield self.pieces(start, stop)
        finally:
            self.open -= 1

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        for a in range(start, stop, 64):
            piece = DATA[a : min(a + 64, stop)]
            if self.broken:
                return
            self.lengths.append(len(piece))
            yield piece


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(windows, "IN_A_ROW", 2000)
    return Store()


def read(reader: Windows, cuts: list[int], end: int) -> bytes:
    return b"".join(reader.read("x", start, stop, end) for start, stop in pairwise(cuts))


def test_what_is_read_on_and_on_takes_few_requests(store: Store) -> None:
    reader = Windows(store.opened)
    cuts = [*range(100, END - 50, 1000), END - 50]
    assert read(reader, cuts, END - 50) == DATA[100 : END - 50]
    assert store.asked == [(100, 1100), (1100, 2100), (2100, END - 50)]
    assert store.given == END - 150 and store.open == 0


def test_a_request_has_an_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "LONGEST", 10_000)
    assert read(Windows(store.opened), list(range(0, 50_001, 1000)), 50_000) == DATA[:50_000]
    assert len(store.asked) == 2 + 5 and store.given == 50_000


def test_of_what_is_read_here_and_there_nothing_more_is_asked_for(store: Store) -> None:
    reader = Windows(store.opened)
    for start in (0, 5000, 300, 90_000, 91_000, 10):
        assert reader.read("x", start, start + 1000, END) == DATA[start : start + 1000]
    assert store.given == 6000 and store.open == 0


def test_a_request_ends_where_a_read_does(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rest of it would be asked for twice."""
    monkeypatch.setattr(windows, "LONGEST", 5_500)
    assert read(Windows(store.opened), list(range(0, 30_001, 1000)), 30_000) == DATA[:30_000]
    assert store.given == 30_000


def test_bytes_come_no_sooner_than_they_are_read(store: Store) -> None:
    reader = Windows(store.opened)
    read(reader, [0, 1000, 2000, 3000], END)
    assert 3000 <= store.given < 3000 + 64 and store.open == 1


def test_a_connection_that_breaks_is_asked_for_the_rest(store: Store) -> None:
    reader = Windows(store.opened)
    read(reader, [0, 1000, 2000, 3000], END)
    store.broken = True
    with pytest.raises(Unusable, match=r"1000 bytes from 3000 on were asked for, and \d+ came"):
        reader.read("x", 3000, 4000, END)
    assert store.open == 0
    store.broken = False
    assert read(reader, [3000, 4000, 5000], END) == DATA[3000:5000]


def test_threads_read_one_file_each_for_itself(store: Store) -> None:
    reader, found, ready = Windows(store.opened), dict[int, bytes](), threading.Barrier(4)

    def work(first: int) -> None:
        ready.wait()  # else one thread ends before the next, which gets its number
        found[first] = read(reader, list(range(first, first + 20_001, 500)), first + 20_000)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 20_000, 40_000, 60_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(data == DATA[first : first + 20_000] for first, data in found.items()) and len(found) == 4
    assert len(store.asked) == 4 * 5 and store.given == 80_000


def test_connections_that_wait_are_few(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_MOST", 2)
    reader = Windows(store.opened)
    for path, start in ((path, start) for start in range(0, 10_000, 1000) for path in "abcd"):
        assert reader.read(path, start, start + 1000, END) == DATA[start : start + 1000]
    assert store.open == 2
    monkeypatch.setattr(windows, "_IDLE", 0.0)
    for start in range(10_000, 13_000, 1000):
        reader.read("c", start, start + 1000, END)
    assert store.open == 2

"""Files that are read whole: those that have no end, or are far too large, are refused in bounded memory."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from neoxconv.errors import CheckpointError
from neoxconv.storage import read_bounded


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert read_bounded(tmp_path / "x", 100) == b"x" * 100


def test_one_byte_more_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 101)
    with pytest.raises(CheckpointError, match=r"x: has 101 bytes, expected 100 at most"):
        read_bounded(tmp_path / "x", 100)


def test_a_device_without_end_is_read_so_far_and_no_further() -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"/dev/zero: has \d+ bytes or more"):
        read_bounded(Path("/dev/zero"), 4 << 20)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 70_000, 1 << 20])
def test_a_pipe_is_read_to_its_end(size: int, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * size,))
    writer.start()
    assert read_bounded(pipe) == b"x" * size
    writer.join()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
            read_bounded(path)

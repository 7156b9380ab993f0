"""A calibration that is stopped, damaged or in somebody's way: the same command goes on, or says what is wrong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv.formats.gguf.read import read_header
from neoxconv.storage import open_storage
from tests.helpers import PowerCut, cli, digests
from tests.toy import toy

CHANGES = ("pwrite", "fsync", "replace", "truncate", "unlink")  # calls that change the disk


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", (np.arange(4 * 32) * 7 % 512).reshape(4, 32))
    return toy(tmp_path, hidden=64, layers=2)


def calibrate(source: Path, name: str = "cal.gguf", *words: str) -> int:
    tokens = source.parent / "tokens.npy"
    return cli("calibrate", source, "-o", source.parent / name, "--tokens", tokens, "--covariance", "--quiet", *words)


def stopping(patch: pytest.MonkeyPatch, at: int, stop: Callable[[], BaseException]) -> list[str]:
    """Let the call `at` of those that change the disk fail; returns what has been called."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*words: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) > at:
                raise stop()
            return call(*words, **named)

        return made

    for name in CHANGES:
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return calls


def test_wherever_it_is_stopped_it_goes_on_to_the_same_bytes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate(source) == 0
    whole = digests(source.parent / "cal.gguf")
    with monkeypatch.context() as patch:
        calls = stopping(patch, 10**6, PowerCut)
        assert calibrate(source, "counted.gguf") == 0
    count = len(calls)
    assert count > 30
    for at in sorted({*range(0, count, 4), count - 2, count - 1}):
        name = f"cut{at}.gguf"
        with monkeypatch.context() as patch:
            stopping(patch, at, PowerCut)
            with pytest.raises(PowerCut):
                calibrate(source, name)
        if not (source.parent / name).exists():
            assert calibrate(source, name) == 0
        assert digests(source.parent / name) == whole, at
        assert at >= count - 1 or not list(source.parent.glob(f"{name}.*"))


def test_a_full_disk_is_told_and_gone_on_from(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(source) == 0
    for at in (3, 17, 30):
        with monkeypatch.context() as patch:
            stopping(patch, at, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            assert calibrate(source, "full.gguf") == 1
        told = capsys.readouterr().err
        assert "No space left on device" in told and "full.gguf" in told and "unexpected" not in told
    assert calibrate(source, "full.gguf") == 0
    assert digests(source.parent / "full.gguf") == digests(source.parent / "cal.gguf")


def test_too_small_a_disk_is_told_beforehand(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from neoxconv.verify.logits import needs

    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert calibrate(source) == 1
    assert "make room" in capsys.readouterr().err
    assert sorted(path.name for path in source.parent.iterdir() if path.name.startswith("cal")) == []


def cut_in_layer_1(source: Path, monkeypatch: pytest.MonkeyPatch, name: str = "cal.gguf") -> tuple[Path, Path]:
    """What a run leaves that is stopped in its last layer: the unfinished file, and the streams beside it."""
    from neoxconv.verify.logits.stream import Side

    run = Side.layer

    def cut(self: Side, number: int, *words: Any, **named: Any) -> Any:
        if number == 1:
            raise PowerCut
        return run(self, number, *words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Side, "layer", cut)
        with pytest.raises(PowerCut):
            calibrate(source, name)
    made = source.parent / name
    return made.with_name(name + ".partial"), made.with_name(name + ".streams")


@pytest.mark.parametrize(("field", "value"), [
    ("layers", -1), ("layers", 3), ("layers", "1"), ("layers", None), ("digests", []), ("digests", {}),
    ("sha256", "0" * 64), ("key", "other"),
])  # fmt: skip
def test_what_unfinished_work_says_is_not_believed(
    field: str, value: object, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(source, "whole.gguf") == 0
    _, streams = cut_in_layer_1(source, monkeypatch)
    line, data = streams.read_bytes().split(b"\n", 1)
    streams.write_bytes(json.dumps(json.loads(line) | {field: value}).encode() + b"\n" + data)
    if calibrate(source) == 0:
        assert digests(source.parent / "cal.gguf") == digests(source.parent / "whole.gguf")
    else:
        told = capsys.readouterr().err
        assert "remove it" in told and "unexpected" not in told


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: data + b"more", lambda data: data[:9]])
def test_streams_of_another_size_are_not_read(
    damage: Callable[[bytes], bytes],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, streams = cut_in_layer_1(source, monkeypatch)
    streams.write_bytes(damage(streams.read_bytes()))
    assert calibrate(source) == 1
    assert "remove it" in capsys.readouterr().err


def test_links_are_not_followed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, _ = cut_in_layer_1(source, monkeypatch)
    mine = source.parent / "mine"
    mine.write_bytes(partial.read_bytes())
    before = digests(mine)
    partial.unlink()
    partial.symlink_to(mine)
    assert calibrate(source) == 1
    assert digests(mine) == before


def test_two_at_once_are_kept_apart(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    partial, _ = cut_in_layer_1(source, monkeypatch)
    with open(partial, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert calibrate(source) == 1
        assert "another run is at work" in capsys.readouterr().err
    assert calibrate(source) == 0


def test_a_calibration_of_other_files_is_noted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(source) == 0
    other = toy(tmp_path / "other", hidden=64, layers=2, seed=1, dtype="BF16")
    words = ("--to", "gguf", "--type", "q4_0", "--calibration", source.parent / "cal.gguf", "--dry-run")
    assert cli("convert", source, tmp_path / "a.gguf", *words) == 0
    assert "made of other files" not in capsys.readouterr().out
    assert cli("convert", other, tmp_path / "b.gguf", *words) == 0
    assert "made of other files" in capsys.readouterr().out


def hollow(path: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A calibration that claims tensors of these shapes, of which no byte takes room."""
    from neoxconv.formats.calibration import names as c
    from neoxconv.formats.gguf import write

    entries = [c.vector(name, int(np.prod(shape))) for name, shape in tensors.items()]
    entries = [
        entry.__class__(entry.name, entry.name, entry.tensor.__class__(shape, *_rest(entry.tensor)), entry.encoding)
        for entry, shape in zip(entries, tensors.values(), strict=True)
    ]
    names = ["blk.0.ffn_up.weight"]
    told = {"general.type": "imatrix", c.OF: names, c.IN: names, c.SHA256: ["1" * 64]}
    (file,) = write.layout("calibration", told, entries, None)
    with open(path, "wb") as stream:
        stream.truncate(file.size)
        for offset, data in file.pieces:
            stream.seek(offset)
            stream.write(data)
    read_header(open_storage(path))
    return path


def _rest(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tensor.read, tensor.native


@pytest.mark.parametrize("shapes", [
    {"in_sum2": (10**9,), "counts": (1,), "moments": (64,)},
    {"in_sum2": (64,), "counts": (10**9,), "moments": (64 * 65 // 2,)},
    {"in_sum2": (64,), "counts": (1,), "moments": (10**9,)},
    {"in_sum2": (64,), "counts": (1,), "moments": (64 * 65 // 2, 2)},
    {"in_sum2": (64, 2), "counts": (1,), "moments": (64 * 65 // 2,)},
])  # fmt: skip
def test_what_a_file_claims_takes_no_memory(
    shapes: dict[str, tuple[int, ...]], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tracemalloc

    made = hollow(tmp_path / "cal.gguf", {f"blk.0.ffn_up.weight.{name}": shape for name, shape in shapes.items()})
    tracemalloc.start()
    words = ("--to", "gguf", "--type", "q4_0", "--calibration", made)
    assert cli("convert", source, tmp_path / "m.gguf", *words) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    assert "unexpected" not in capsys.readouterr().err

"""Runs that are killed, doubled, or meet a disk that fails: nothing is lost, and the same command finishes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine.plan import Plan
from neoxconv.engine.publish import aside_of
from neoxconv.engine.workplace import LOCK, partial_of
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError
from tests.helpers import digests
from tests.oracles import ROOT
from tests.small_disk import CANNOT_MOUNT
from tests.toy import toy


def planned(folder: Path) -> Plan:
    return make_plan(open_checkpoint(toy(folder)), Recipe("hf"))


def test_a_run_killed_anywhere_is_finished_by_the_next() -> None:
    """Ten kills before the first byte, while writing and while publishing, over every kind of target."""
    command = [sys.executable, "-m", "tests.kills", "--kills", "30", "--timed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert min(counts[:3]) >= 10


def test_two_at_once_do_no_harm(tmp_path: Path) -> None:
    plan, target = planned(tmp_path), tmp_path / "x"
    whole = run(plan, tmp_path / "whole")
    seen: list[str] = []

    def second(count: int) -> None:
        if not seen:
            with pytest.raises(PlanError) as caught:
                run(plan, target)
            seen.append(str(caught.value))

    run(plan, target, progress=second, jobs=1)
    assert f"process {os.getpid()} on " in seen[0] and "wait until it ends" in seen[0]
    assert digests(target) == digests(whole) and not partial_of(target).exists()


def test_a_lock_without_its_process_is_no_obstacle(tmp_path: Path) -> None:
    plan, target = planned(tmp_path), tmp_path / "x"
    partial_of(target).mkdir()
    (partial_of(target) / LOCK).write_text("4242 on another machine")
    assert digests(run(plan, target)) == digests(run(plan, tmp_path / "y"))


def test_file_systems_without_locks_are_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert (run(planned(tmp_path), tmp_path / "x") / "config.json").is_file()


def test_what_a_killed_run_left_after_publishing_is_taken_away(tmp_path: Path) -> None:
    plan, target = planned(tmp_path), tmp_path / "x"
    run(plan, target)
    for left in (partial_of(target), aside_of(target)):
        left.mkdir()
    with pytest.raises(PlanError, match="exists already"):
        run(plan, target)
    assert not partial_of(target).exists() and not aside_of(target).exists()


def failing(function: Callable[..., Any], after: int, number: int) -> Callable[..., Any]:
    """`function`, which fails with an error of the operating system from call `after` on."""
    calls: list[int] = []

    def call(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return function(*given, **options)

    return call


@pytest.mark.parametrize(
    ("name", "number", "kind", "said"),
    [
        ("pwrite", errno.ENOSPC, NeoxconvError, "No space left on device: "),
        ("pwrite", errno.EDQUOT, NeoxconvError, "make room and run the same command again to continue"),
        ("pwrite", errno.EIO, NeoxconvError, "Input/output error"),
        ("fsync", errno.EIO, NeoxconvError, "Input/output error"),
        ("preadv", errno.EIO, CheckpointError, "cannot be read (Input/output error)"),
    ],
)
def test_a_disk_that_fails_is_told_and_the_same_command_continues(
    name: str, number: int, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    plan, target = planned(tmp_path), tmp_path / "x"
    whole = digests(run(plan, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, failing(getattr(os, name), 7, number))
        with pytest.raises(kind) as caught:
            run(plan, target)
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not target.exists()
    assert digests(run(plan, target)) == whole


def test_a_real_disk_that_is_too_small_fills_up_or_is_read_only() -> None:
    """A tmpfs in a mount namespace of its own."""
    if not shutil.which("unshare"):
        pytest.skip("no tmpfs can be mounted here")
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.small_disk"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    if "unshare:" in done.stderr or done.returncode == CANNOT_MOUNT:
        pytest.skip("no tmpfs can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("No space left on device: ") == 1 and done.stdout.count("are needed and 0 bytes are") == 1
    assert done.stderr.count("are needed and 512.00 KiB are free") == 1
    assert done.stderr.count("may not be written to; give another place") == 4


def test_a_source_that_vanishes_is_named(tmp_path: Path) -> None:
    plan, target = planned(tmp_path), tmp_path / "x"
    for file in sorted((tmp_path / "toy").rglob("layer_03*")):
        file.rename(file.with_suffix(".away"))
    with pytest.raises((CheckpointError, NeoxconvError), match=r"layer_03.*No such file"):
        run(plan, target)
    assert not target.exists()

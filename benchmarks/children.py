"""Commands run as child processes, with wall time, processor time and peak memory of each."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Seconds of wall and processor time, and peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str]) -> Cost:
    """Run a command to its end; raises where it fails."""
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def neoxconv(*arguments: str) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "neoxconv", *arguments]


def fresh(target: Path, command: list[str]) -> list[str]:
    """The command, once its target is out of the way."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.with_name(f"{target.name}.manifest.json").unlink(missing_ok=True)
    return command


def in_turns(runs: int, *makers: Callable[[], Cost]) -> list[list[Cost]]:
    """Each maker `runs` times, in turns, so that a machine that changes speed changes it for all."""
    results: list[list[Cost]] = [[] for _ in makers]
    for _ in range(runs):
        for costs, maker in zip(results, makers, strict=True):
            costs.append(maker())
    return results


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratios(ours: Sequence[Cost], theirs: Sequence[Cost]) -> list[float]:
    """Their wall time over ours, run by run."""
    return [b.wall / a.wall for a, b in zip(ours, theirs, strict=True)]


def show(name: str, costs: Sequence[Cost]) -> None:
    """One line on a command's runs: medians of times, the largest peak."""
    wall, cpu = median([cost.wall for cost in costs]), median([cost.cpu for cost in costs])
    print(f"  {name:34} {wall:7.2f} s wall  {cpu:7.2f} s cpu  {max(c.peak for c in costs) / 1e6:8.0f} MB peak")

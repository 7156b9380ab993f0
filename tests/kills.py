"""Kill conversions at random moments, and check that nothing is half-made and that the same command finishes.

    python -m tests.kills [--kills 200] [--timed 20] [--seed 0]

A child process counts its calls that change the disk (writes, syncs, renames, deletions, ...) and kills itself with
SIGKILL before a chosen one: before the first byte, while writing, or while publishing, a third of the kills each. After
each kill the target must be absent or whole, the old one or the new, and an old one must not be lost. Then the run goes
on, is killed again up to twice, and must end with the bytes of a run that nothing interrupted, writing no tensor again
that its journal holds. `--timed`: as many more, of the command line itself, at random times.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine.checks import FINITE
from neoxconv.engine.journal import Journal, read_journal
from neoxconv.engine.manifest import beside
from neoxconv.engine.plan import Plan, resume_key
from neoxconv.engine.publish import DiskTarget, aside_of
from neoxconv.engine.workplace import has_files, partial_of
from neoxconv.errors import PlanError
from tests.helpers import digests
from tests.toy import toy

CHANGES = ("pwrite", "fsync", "replace", "unlink", "rmdir", "mkdir", "truncate", "open")
PHASES = ("before the first byte", "while writing", "while publishing")
REFUSED = 98  # the target exists already
WORDS = {"shard_size": "--shard-size", "split_size": "--split-size", "type": "--type"}


@dataclass(frozen=True)
class Case:
    """A conversion, and whether it replaces an older target."""

    recipe: Recipe
    overwrite: bool = False

    @property
    def name(self) -> str:
        return f"{self.recipe.format}{' --overwrite' * self.overwrite}{' split' * bool(self.recipe.split_size)}"


CASES = (
    Case(Recipe("hf", shard_size=100_000)),
    Case(Recipe("hf"), overwrite=True),
    Case(Recipe("safetensors")),
    Case(Recipe("safetensors"), overwrite=True),
    Case(Recipe("slim")),
    Case(Recipe("gguf", type="Q8_0")),
    Case(Recipe("gguf", type="F16", split_size=100_000), overwrite=True),
    Case(Recipe("bnb", type="NF4", double_quant=True)),
    Case(Recipe("float8", scale="tensor")),
)


class Disk:
    """Counts the calls that change the disk, and kills this process before number `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.calls, self.lock = fatal, list[str](), threading.Lock()
        for name in CHANGES:
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                if len(self.calls) == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.calls.append(name)
            return function(*arguments, **options)

        return call


def in_child(task: Callable[[], int]) -> int:
    """The exit status of a fork of this process that does the task; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs, and with it the trial
        code = 99
        try:
            code = task()
        except PlanError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Trial:
    """A case with its plan and what an uninterrupted run makes; `changes` are the calls of such a run."""

    case: Case
    plan: Plan
    target: Path
    expected: dict[str, str]
    old: dict[str, str]
    changes: list[str]

    def convert(self, fatal: int | None, report: Path | None = None) -> int:
        """Run in a child, which is killed before change number `fatal`; it reports how many tensors it wrote."""

        def task() -> int:
            from neoxconv.engine import steps

            written, write_step = [], steps.write_step
            steps.write_step = lambda *given: (written.append(1), write_step(*given))[1]  # type: ignore[assignment]
            Disk(fatal)
            run(self.plan, self.target, jobs=2, overwrite=self.case.overwrite)
            if report:
                report.write_text(str(len(written)))
            return 0

        return in_child(task)

    def check(self) -> None:
        """Nothing is half-made, and nothing old is lost."""
        there = whole(self.target)
        assert there in ({}, self.expected, self.old), f"{self.case.name}: half a target"
        aside = whole(aside_of(self.target))
        if self.case.overwrite:
            assert there or aside == self.old, f"{self.case.name}: the old target is lost"

    def finish(self, report: Path) -> None:
        """The same command ends with the same bytes, and writes nothing again that is done."""
        done = len(self.noted()) if self.target_is_unfinished() else None
        if whole(self.target) != self.expected or self.target_is_unfinished():
            assert self.convert(None, report) == 0, f"{self.case.name}: does not continue"
            slots = sum(len(step.slots) for step in self.plan.steps)
            single = slots == len(self.plan.steps)
            if done is not None and single:
                assert int(report.read_text()) <= slots - done, f"{self.case.name}: wrote again what was done"
        assert whole(self.target) == self.expected, f"{self.case.name}: other bytes"
        with contextlib.suppress(PlanError):  # it exists; what a killed run left beside it is taken away
            DiskTarget(self.plan, self.target).tidy()
        left = {path.name for path in self.target.parent.iterdir()} - {self.target.name, beside(self.target).name}
        assert not left, f"{self.case.name}: left {left}"

    def target_is_unfinished(self) -> bool:
        return has_files(partial_of(self.target))

    def noted(self) -> dict[str, Any]:
        return dict(read_journal(partial_of(self.target) / Journal.NAME, resume_key(self.plan), frozenset([FINITE])))

    def moment(self, phase: str, chance: random.Random) -> int:
        """A change of an uninterrupted run in this phase."""
        first = self.changes.index("pwrite")
        last = len(self.changes) - self.changes[::-1].index("pwrite")
        spans = dict(zip(PHASES, ((0, first), (first, last), (last, len(self.changes))), strict=True))
        return chance.randrange(*spans[phase])


def whole(target: Path) -> dict[str, str]:
    """The SHA-256 of a target's files; nothing where it is absent."""
    return digests(target) if target.exists() else {}


def prepare(case: Case, source: Path, folder: Path) -> Trial:
    """The plan of a case, and what it makes when nothing interrupts it."""
    folder.mkdir()
    plan, target = make_plan(open_checkpoint(source), case.recipe), folder / "target"
    older = make_plan(open_checkpoint(source, norms="rank0"), case.recipe)
    old = digests(run(older, target)) if case.overwrite else {}
    calls = folder / "calls"

    def counting() -> int:
        disk = Disk(None)
        run(plan, folder / "x" / "target", jobs=2)
        calls.write_text(" ".join(disk.calls))
        return 0

    run(plan, folder / "x" / "target")  # loads the kernels, or compiles them
    expected = digests(folder / "x" / "target")
    shutil.rmtree(folder / "x")
    assert in_child(counting) == 0
    changes = calls.read_text().split()
    shutil.rmtree(folder / "x")
    calls.unlink()
    return Trial(case, plan, target, expected, old, changes)


def renew(trial: Trial, source: Path) -> None:
    """The state before: the old target, or none."""
    for path in trial.target.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if trial.case.overwrite:
        run(make_plan(open_checkpoint(source, norms="rank0"), trial.case.recipe), trial.target)


def at_random(trials: list[Trial], source: Path, kills: int, chance: random.Random) -> Counter[str]:
    """Kill at calls that change the disk; how many kills there were in each phase."""
    survived: Counter[str] = Counter()
    report = source.parent / "report"
    for trial in itertools.cycle(trials):
        if sum(survived.values()) >= kills:
            return survived
        renew(trial, source)
        for _ in range(chance.randint(1, 3)):
            phase = PHASES[sum(survived.values()) % len(PHASES)]
            status = trial.convert(trial.moment(phase, chance))
            assert status in (0, REFUSED, -signal.SIGKILL), f"{trial.case.name}: ended with {status}"
            if status != -signal.SIGKILL:
                break  # it needed fewer calls this time, or was published before, and is done
            survived[phase] += 1
            trial.check()
        trial.finish(report)
    raise AssertionError("there are no cases")


def by_the_clock(trials: list[Trial], source: Path, kills: int, chance: random.Random) -> int:
    """Kill the command itself at random times; how many kills hit it."""
    hit = 0
    for number in range(kills):
        trial = trials[number % len(trials)]
        renew(trial, source)
        recipe = trial.plan.recipe
        options = [word for name, option in WORDS.items() if getattr(recipe, name) not in (None, 5_000_000_000)
                   for word in (option, str(getattr(recipe, name)))]  # fmt: skip
        options += ["--double-quant"] * recipe.double_quant + (["--scale", recipe.scale] if recipe.scale else [])
        command = [sys.executable, "-m", "neoxconv", "convert", str(source), str(trial.target), "--to", recipe.format,
                   *options, "--quiet", *(["--overwrite"] if trial.case.overwrite else [])]  # fmt: skip
        child = subprocess.Popen(command)
        time.sleep(chance.uniform(0.2, 1.6))
        child.kill()
        hit += child.wait() == -signal.SIGKILL
        trial.check()
        trial.finish(source.parent / "report")
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = toy(folder / "source")
        trials = [prepare(case, source, folder / str(number)) for number, case in enumerate(CASES)]
        survived = at_random(trials, source, given.kills, chance)
        for phase in PHASES:
            print(f"{survived[phase]:5} kills survived {phase}")
        print(f"{by_the_clock(trials, source, given.timed, chance):5} kills survived at random times")


if __name__ == "__main__":
    main()

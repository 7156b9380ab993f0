"""What N workers buy: a measured run's step times, replayed over N workers for models of 20B, 175B and 1T parameters.

    python -m benchmarks.scale [--layers 1] [--disk 1GB] [--network 1.25GB] [--folder DIR]

A checkpoint of 20B widths is converted by one thread, step by step timed. That gives seconds for each weight of every
kind of tensor and encoding; a model of any size is a list of such steps. They are given to workers as the engine does:
the largest first, each to the first that is free. No run ends before the bytes are moved: a star stands where the disk
or the network that all workers share (--disk, --network, bytes a second) takes longer than they do, two where both do.
The same replay for the threads of this machine is held against a run with so many.
"""

from __future__ import annotations

import argparse
import heapq
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neoxconv import Recipe, make_plan, open_checkpoint
from neoxconv.arch.gpt_neox.config import PRESETS
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.cli.formats import hollow_checkpoint
from neoxconv.cli.values import byte_count
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint
from neoxconv.engine import steps, workers
from neoxconv.engine.plan import Plan, Step
from neoxconv.engine.run import run
from neoxconv.engine.steps import Digests, Work
from neoxconv.synthetic import Synthetic, write_checkpoint
from neoxconv.targets import TARGETS

B20 = PRESETS["20B"]
MODELS = {
    "20B": B20,
    "175B": replace(B20, layers=96, hidden=12288, heads=96, ff=4 * 12288),
    "1T": replace(B20, layers=128, hidden=25600, heads=160, ff=4 * 25600),
}
RECIPES = {
    "hf F16": Recipe("hf"),
    "gguf Q8_0": Recipe("gguf", type="Q8_0"),
    "gguf Q4_K_M": Recipe("gguf", type="Q4_K_M"),
    "bnb NF4": Recipe("bnb", type="NF4"),
}
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Kind = tuple[str, str]  # a tensor's name without its layer, and its encoding
Rates = dict[Kind, float]  # seconds a weight


@dataclass(frozen=True)
class Task:
    """A step as the replay sees it."""

    seconds: float
    nbytes: int  # written
    read: int  # from 16-bit shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--disk", type=byte_count, default=10**9, help="bytes a second of the shared disk")
    parser.add_argument("--network", type=byte_count, default=1_250_000_000, help="bytes a second to an object store")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-", dir=given.folder))
    try:
        wide = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=50432, tp=2, pp=1, context=2048)
        source = open_checkpoint(write_checkpoint(folder / "source", wide))
        os.sync()
        for name, recipe in RECIPES.items():
            report(name, recipe, source, folder, (given.disk, given.network))
    finally:
        shutil.rmtree(folder)


def report(name: str, recipe: Recipe, source: Checkpoint, folder: Path, limits: tuple[int, int]) -> None:
    """Measure one target, hold the replay against a run, and print a line for each model."""
    plan, threads = make_plan(source, recipe), os.cpu_count() or 1
    rates, alone = measured(plan, folder / "target")
    predicted = replay(tasks_of([step.entry for step in plan.steps], rates), threads)
    _, together = measured(plan, folder / "target", threads)
    print(f"\n{name}: {alone:.2f} s with one thread; with {threads} replayed {predicted:.2f} s, run {together:.2f} s")
    print(f"{'minutes':8}{'GB':>8}", *(f"{n:>7}" for n in WORKERS), "  workers")
    for model, config in MODELS.items():
        tasks = tasks_of(TARGETS[recipe.format].entries(hollow_checkpoint(GPT_NEOX, config), recipe), rates)
        written = sum(task.nbytes for task in tasks)
        floors = [(written + sum(task.read for task in tasks)) / limit for limit in limits]
        cells = [cell(replay(tasks, workers), floors) for workers in WORKERS]
        print(f"{model:8}{written / 1e9:8.0f}", *(f"{text:>7}" for text in cells))


def tasks_of(held: Sequence[Entry], rates: Rates) -> list[Task]:
    """What a target's entries cost; kinds that were not measured, as the others of their encoding."""
    by_encoding = {encoding: rate for (_, encoding), rate in sorted(rates.items(), key=lambda item: item[1])}
    return [
        Task(rates.get(kind_of(e), by_encoding[e.encoding.name]) * weights(e), e.nbytes, 2 * weights(e)) for e in held
    ]


def cell(seconds: float, floors: Sequence[float]) -> str:
    """Minutes, with a star for every device that takes longer than the workers."""
    return f"{max(seconds, *floors) / 60:.3g}{'*' * sum(floor > seconds for floor in floors)}"


def measured(plan: Plan, target: Path, jobs: int = 1) -> tuple[Rates, float]:
    """Seconds for a weight of every kind in a run, and of the run, the files on disk at its end."""
    seconds: dict[Kind, float] = defaultdict(float)
    total: dict[Kind, int] = defaultdict(int)

    def timed(work: Work, step: Step, run_step: Callable[[Work, Step], Digests] = steps.run_step) -> Digests:
        begin = time.perf_counter()
        digests = run_step(work, step)
        seconds[kind_of(step.entry)] += time.perf_counter() - begin
        total[kind_of(step.entry)] += weights(step.entry)
        return digests

    workers.run_step, kept = timed, workers.run_step
    try:
        run(plan, target, jobs=1)  # loads the kernels, fills the page cache
        remove(target)
        seconds.clear()
        total.clear()
        begin = time.perf_counter()
        run(plan, target, jobs=jobs)
        wall = time.perf_counter() - begin
    finally:
        workers.run_step = kept
        remove(target)
    return {kind: seconds[kind] / total[kind] for kind in seconds}, wall


def remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    target.with_name(f"{target.name}.manifest.json").unlink(missing_ok=True)


def replay(tasks: Iterable[Task], workers: int) -> float:
    """Seconds until the last of `workers` is done, the largest steps first, each to the first that is free."""
    free = [0.0] * workers
    for task in sorted(tasks, key=lambda task: -task.nbytes):
        heapq.heapreplace(free, free[0] + task.seconds)
    return max(free)


def kind_of(entry: Entry) -> Kind:
    """What steps that cost the same for each weight have in common."""
    return ".".join(part for part in entry.unified.split(".") if not part.isdigit()), entry.encoding.name


def weights(entry: Entry) -> int:
    return entry.tensor.rows * entry.tensor.columns


if __name__ == "__main__":
    main()

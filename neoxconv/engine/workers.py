"""Who takes a run's steps: threads of this process here, the workers of a cluster in cluster.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from neoxconv.engine.journal import Journal
from neoxconv.engine.plan import Step
from neoxconv.engine.steps import Digests, Progress, Work, run_step
from neoxconv.quant.feedback.shared import SHARED

Submit = Callable[[Step], Future[Digests]]


@dataclass(frozen=True)
class Crew:
    """Who does a run's work: `jobs` threads of this process, or where an `executor` is named a cluster's workers."""

    jobs: int
    executor: str | None = None


@contextmanager
def threads(work: Work, jobs: int) -> Iterator[Submit]:
    """What gives steps to threads of this process, which stop when it is left."""
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield lambda step: pool.submit(run_step, work, step)
            finally:
                work.stop.set()
    finally:
        SHARED.forget()


def run_steps(steps: Sequence[Step], submit: Submit, journal: Journal, done: Progress = lambda count: None) -> Digests:
    """The digests of all slots, each noted as soon as its step is done, whose bytes `done` is then told.

    The largest steps start first, so that none is left alone at the end, each with those that share something with it.
    """
    futures = {submit(step): step.nbytes for step in in_order(steps)}
    digests: Digests = {}
    try:
        for future in as_completed(futures):
            for key, digest in future.result().items():
                journal.add(key, digest)
                digests[key] = digest
            done(futures[future])
    finally:
        for future in futures:
            future.cancel()
    return digests


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The largest steps first, each followed by those that share something with it."""
    sharing: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: -step.nbytes):
        sharing.setdefault(step.entry.shares, []).append(step)
    return [step for group in sharing.values() for step in group]

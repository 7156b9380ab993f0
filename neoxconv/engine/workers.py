"""Who takes a run's steps: threads of this process here, the workers of a cluster in cluster.py.

Several runs may share their threads. The steps that read one tensor are then taken abreast, a band of rows of each in
turn: what one has read the others find at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from neoxconv.engine.journal import Journal
from neoxconv.engine.plan import Step
from neoxconv.engine.steps import Digests, Progress, Work, begin_step, run_step
from neoxconv.quant.feedback.shared import SHARED

Futures = dict[Future[Digests], Step]
Submit = Callable[[Sequence[Step]], Futures]


@dataclass(frozen=True)
class Crew:
    """Who does a run's work: `jobs` threads of this process, or where an `executor` is named a cluster's workers.

    With a `seat` the threads are those that several runs share.
    """

    jobs: int
    executor: str | None = None
    seat: Seat | None = None


@contextmanager
def threads(work: Work, crew: Crew) -> Iterator[Submit]:
    """What gives steps to threads of this process, which stop when it is left."""
    if crew.seat:
        with crew.seat.taken(work) as submit:
            yield submit
        return
    try:
        with ThreadPoolExecutor(crew.jobs) as pool:
            try:
                yield lambda steps: {pool.submit(run_step, work, step): step for step in steps}
            finally:
                work.stop.set()
    finally:
        SHARED.forget()


def run_steps(steps: Sequence[Step], submit: Submit, journal: Journal, done: Progress = lambda count: None) -> Digests:
    """The digests of all slots, each noted as soon as its step is done, whose bytes `done` is then told."""
    futures = submit(in_order(steps))
    digests: Digests = {}
    try:
        for future in as_completed(futures):
            for key, digest in future.result().items():
                journal.add(key, digest)
                digests[key] = digest
            done(futures[future].nbytes)
    finally:
        for future in futures:
            future.cancel()
    return digests


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The largest steps first, so that none is left alone at the end, each followed by those that share something."""
    sharing: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: -step.nbytes):
        sharing.setdefault(step.entry.shares, []).append(step)
    return [step for group in sharing.values() for step in group]


@dataclass(frozen=True)
class _Task:
    """A step that a run has asked for, and what becomes of it."""

    work: Work
    step: Step
    future: Future[Digests]


class Joint:
    """Threads that several runs share, each from a seat of its own. They begin when no run is waited for any more."""

    def __init__(self, jobs: int, runs: int) -> None:
        self.pool, self.lock = ThreadPoolExecutor(jobs), threading.Lock()
        self.seats = [Seat(self) for _ in range(runs)]
        self.awaited = set(self.seats)
        self.tasks: list[_Task] = []
        self.stopped = False

    def add(self, seat: Seat, tasks: Sequence[_Task]) -> None:
        """Take what the run on a seat asks for, which is waited for no longer; with the last of them, begin."""
        with self.lock:
            if seat not in self.awaited:
                return
            self.awaited.remove(seat)
            self.tasks += tasks
            ready = not self.awaited
        if self.stopped:
            self.stop()
        elif ready:
            for group in self.groups():
                self.pool.submit(_take_abreast, group)

    def groups(self) -> list[list[_Task]]:
        """The tasks of each of the source's tensors."""
        groups: dict[str, list[_Task]] = {}
        for task in self.tasks:
            groups.setdefault(task.step.entry.unified, []).append(task)
        first = in_order([group[0].step for group in groups.values()])
        return [groups[step.entry.unified] for step in first]

    def stop(self) -> None:
        """Have every run end at its next band of rows."""
        self.stopped = True
        with self.lock:
            tasks = [*self.tasks]
        for task in tasks:
            task.work.stop.set()
            _forgo(task.future)

    def close(self) -> None:
        """Wait for the threads and end them."""
        self.pool.shutdown()
        SHARED.forget()


@dataclass(frozen=True, eq=False)
class Seat:
    """A run's place among those that share threads."""

    joint: Joint

    @contextmanager
    def taken(self, work: Work) -> Iterator[Submit]:
        """What gives the run's steps to the threads; what is not done yet stops when it is left."""

        def submit(steps: Sequence[Step]) -> Futures:
            tasks = [_Task(work, step, Future()) for step in steps]
            self.joint.add(self, tasks)
            return {task.future: task.step for task in tasks}

        try:
            yield submit
        finally:
            work.stop.set()

    def leave(self) -> None:
        """Say that the run will ask for nothing more."""
        self.joint.add(self, ())


_TURN = threading.Lock()  # a future may be told once only that it was cancelled


def _is_wanted(future: Future[Digests]) -> bool:
    """Whether a step is still asked for, which then is under way."""
    with _TURN:
        return not future.cancelled() and future.set_running_or_notify_cancel()


def _forgo(future: Future[Digests]) -> None:
    """Cancel a step that is not under way, and wake the run that waits for it."""
    with _TURN:
        if not future.cancelled() and future.cancel():
            future.set_running_or_notify_cancel()


def _take_abreast(tasks: Sequence[_Task]) -> None:
    """Take steps of one tensor, a band of rows of each in turn. One that fails does not stop the others."""
    under_way = {task.future: begin_step(task.work, task.step) for task in tasks if _is_wanted(task.future)}
    while under_way:
        for future, writing in list(under_way.items()):
            try:
                next(writing)
            except StopIteration as end:
                del under_way[future]
                future.set_result(end.value)
            except BaseException as error:
                del under_way[future]
                future.set_exception(error)

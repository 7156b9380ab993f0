"""Carry a plan out, with nothing half-made ever visible.

All work happens in TARGET.partial/, whose journal lists the plan's fingerprint and the written slots. Run again, the
journal is only a hint: the bytes are hashed, what matches is kept, the rest is redone. A rename publishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from neoxconv import cluster
from neoxconv.errors import CheckpointError, NeoxconvError, raise_all
from neoxconv.journal import Journal
from neoxconv.plan import Plan, memory_for, threads_for
from neoxconv.publish import check_space, check_target, explain, finish, publish
from neoxconv.remote import Remote, together
from neoxconv.steps import Digests, Progress, Work, run_step
from neoxconv.workplace import locked, made_in, partial_of

Submit = Callable[[int], Future[Digests]]  # of the number of a step
DEFAULT_MEMORY = 512 << 20


def run(
    plan: Plan,
    target: Path | str,
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    executor: str | None = None,
    progress: Progress = lambda count: None,
) -> Path:
    """Make `target` as planned and return its path; after an interruption, continue.

    `executor` is dask://HOST:PORT, a scheduler whose workers see the same files, instead of threads here; `jobs` and
    `memory` are then a worker's. `progress` is called with counts of bytes written (or found written already). Raises
    PlanError before anything is written, NeoxconvError when the disk or a value stops the run; then `target` does not
    exist and TARGET.partial holds what is done.
    """
    target = Path(target).resolve()
    shares = memory_for(threads_for(plan.checkpoint, jobs), memory, plan.kept)
    check_target(plan, target, overwrite)
    folder = partial_of(target)
    try:
        check_space(plan, target)
        with locked(folder), Journal(folder, resume_key(plan), checked=not allow_nonfinite) as journal:
            made = made_in(folder)
            prepare_files(plan, made)
            work = Work(made, journal.known, shares.slab, allow_nonfinite, progress)
            if executor:
                with cluster.connected(executor, plan, work) as submit:
                    digests = run_steps(plan, submit, journal, progress)
            else:
                with threads(plan, work, shares.jobs) as submit:
                    digests = run_steps(plan, submit, journal)
            check_sources(plan)
            finish(plan, made, digests)
            publish(plan, folder, target)
    except OSError as error:
        raise NeoxconvError(explain(error, plan, target)) from error
    return target


def resume_key(plan: Plan) -> str:
    """What unfinished work must agree in: the plan, and sources unchanged since; headers say nothing of the weights."""
    states = [file.storage.state for file in plan.checkpoint.index.files]
    return hashlib.sha256(f"{plan.fingerprint} {states}".encode()).hexdigest()


def check_sources(plan: Plan) -> None:
    """Raise CheckpointError where a file far away is not the one that was opened; not every store tells on reading."""
    files = [file.storage for file in plan.checkpoint.index.files if isinstance(file.storage.path, Remote)]
    changed = together(lambda file: file.has_changed(), files, plan.checkpoint.index.folder)
    raise_all(CheckpointError, (
        f"{file.path}: has changed while it was read; convert again from a source that stays."
        for file, differs in zip(files, changed, strict=True) if differs
    ))  # fmt: skip


def prepare_files(plan: Plan, made: Path) -> None:
    """Every file at its full size (sparse), with the pieces that are known; sidecars whole."""
    made.mkdir(exist_ok=True)
    for file in plan.files:
        path = made / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "w+b") as stream:
            stream.truncate(file.size)
            for offset, piece in file.pieces:
                stream.seek(offset)
                stream.write(piece)
    for name, data in plan.sidecars.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)


@contextmanager
def threads(plan: Plan, work: Work, jobs: int) -> Iterator[Submit]:
    """What gives steps to threads of this process, which stop when it is left."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield lambda number: pool.submit(run_step, work, plan.steps[number])
        finally:
            work.stop.set()


def run_steps(plan: Plan, submit: Submit, journal: Journal, finished: Progress = lambda count: None) -> Digests:
    """The digests of all slots, each noted as soon as its step is done, whose bytes `finished` is then told.

    The largest steps start first, so that none is left alone at the end.
    """
    futures = {submit(n): n for n in sorted(range(len(plan.steps)), key=lambda n: -plan.steps[n].nbytes)}
    digests: Digests = {}
    try:
        for future in as_completed(futures):
            for key, digest in future.result().items():
                journal.add(key, digest)
                digests[key] = digest
            finished(plan.steps[futures[future]].nbytes)
    finally:
        for future in futures:
            future.cancel()
    return digests

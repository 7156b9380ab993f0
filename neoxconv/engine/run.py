"""Carry a plan out, with nothing half-made ever visible.

All work happens in TARGET.partial/, whose journal lists the plan's fingerprint and the written slots. Run again, the
journal is only a hint: the bytes are hashed, what matches is kept, the rest is redone. A rename publishes.
"""

from __future__ import annotations

from neoxconv.engine import cluster
from neoxconv.engine.journal import Journal
from neoxconv.engine.memory import memory_for, threads_for
from neoxconv.engine.plan import Plan, check_sources, resume_key
from neoxconv.engine.publish import check_space, check_target, explain, publish, settle
from neoxconv.engine.steps import Progress, Work
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.upload import Sending, check_free, send
from neoxconv.engine.workers import run_steps, threads
from neoxconv.engine.workplace import locked, made_in, partial_of
from neoxconv.errors import NeoxconvError
from neoxconv.storage.address import place
from neoxconv.storage.remote import Place, Remote

DEFAULT_MEMORY = 512 << 20


def run(
    plan: Plan,
    target: Place | str,
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    executor: str | None = None,
    progress: Progress = lambda count: None,
) -> Place:
    """Make `target` as planned and return its path; after an interruption, continue.

    A target in an object store is sent file by file, the manifest last, and what is done is kept in NAME.partial here.
    `executor` is dask://HOST:PORT, a scheduler whose workers see the same files, instead of threads here; `jobs` and
    `memory` are then a worker's. `progress` is called with counts of bytes written (or found written already). Raises
    PlanError before anything is written, NeoxconvError when the disk or a value stops the run; then `target` does not
    exist and TARGET.partial holds what is done.
    """
    target = place(target).resolve()
    shares = memory_for(threads_for(plan.checkpoint, jobs), memory, plan.kept)
    if isinstance(target, Remote):
        check_free(plan, target, overwrite)
        return send(plan, target, Sending(shares, allow_nonfinite, executor, progress))
    check_target(plan, target, overwrite)
    folder = partial_of(target)
    try:
        check_space(plan, target)
        with locked(folder), Journal(folder, resume_key(plan), checked=not allow_nonfinite) as journal:
            made = made_in(folder)
            for file in plan.files:
                begin_file(file, made)
            work = Work(made, journal.known, shares.slab, allow_nonfinite, progress, plan.source)
            if executor:
                with cluster.connected(executor) as pool:
                    digests = run_steps(plan.steps, cluster.steps_there(pool, plan, work), journal, progress)
            else:
                with threads(work, shares.jobs) as submit:
                    digests = run_steps(plan.steps, submit, journal)
            check_sources(plan)
            settle(plan, made, [finish_file(file, made, digests) for file in plan.files])
            publish(plan, folder, target)
    except OSError as error:
        raise NeoxconvError(explain(error, plan, target)) from error
    return target

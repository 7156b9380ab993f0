"""A run on a Dask cluster whose workers see the same files: each makes the plan once, and then takes steps.

What travels to a worker is how the plan is made and a step's number, never an open file or a weight; what comes back
are digests. Dask queues, retries and replaces workers that die: a step done twice writes the same bytes twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from neoxconv.checkpoint import reopen
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.model import Opening
from neoxconv.plan import Plan, make_plan
from neoxconv.recipe import Recipe
from neoxconv.remote import Remote
from neoxconv.steps import Digests, Work, run_step

SCHEME = "dask://"
PATIENCE = 10  # seconds until a scheduler must have answered
RETRIES = 2  # of a step that failed on a worker


@dataclass(frozen=True)
class Origin:
    """How a plan is made, and its fingerprint, which must come of it everywhere."""

    opening: Opening
    recipe: Recipe
    fingerprint: str


@dataclass(frozen=True)
class Errand:
    """One step for a worker: its number, and what it needs of the run."""

    origin: Origin
    number: int
    folder: Path
    known: Digests
    slab: int
    allow_nonfinite: bool


@contextmanager
def connected(address: str, plan: Plan, work: Work) -> Iterator[Callable[[int], Future[Digests]]]:
    """What takes a step's number to the workers of the scheduler at `address`; raises PlanError where there is none."""
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise PlanError("--executor dask://HOST:PORT needs Dask: pip install 'neoxconv[dask]'.") from error
    try:
        client: Any = Client(f"tcp://{address.removeprefix(SCHEME)}", timeout=PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise PlanError(f"{address}: no Dask scheduler answers there; start one with `dask scheduler`.") from error
    origin = origin_of(plan)
    with client:
        pool: Executor = client.get_executor(pure=False, retries=RETRIES)

        def submit(number: int) -> Future[Digests]:
            known = {key: work.known[key] for key in plan.steps[number].keys if key in work.known}
            errand = Errand(origin, number, work.folder, known, work.slab, work.allow_nonfinite)
            return pool.submit(do, errand)

        try:
            yield submit
        except KilledWorker as error:
            raise NeoxconvError(
                f"{address}: one step ended its worker each time; look for `memory` in the workers' logs, "
                "and give them a smaller --memory."
            ) from error


def origin_of(plan: Plan) -> Origin:
    """How a plan was made, in paths that hold in any working directory."""
    opening, recipe = plan.checkpoint.opening, plan.recipe
    path = opening.path if isinstance(opening.path, Remote) else opening.path.absolute()
    opening = replace(opening, path=path, config=tuple(path.absolute() for path in opening.config))
    files = {name: path.absolute() for name in ("tokenizer", "imatrix") if (path := getattr(recipe, name))}
    return Origin(opening, replace(recipe, **files), plan.fingerprint)


def do(errand: Errand) -> Digests:
    """Take a step, on a worker."""
    with MAKING:
        plan = plan_of(errand.origin)
    work = Work(errand.folder, errand.known, errand.slab, errand.allow_nonfinite)
    try:
        return run_step(work, plan.steps[errand.number])
    except FileNotFoundError as error:
        raise NeoxconvError(
            f"{error.filename}: is not there on a worker; the workers of a cluster must see source and target "
            "under the same paths."
        ) from error


MAKING = threading.Lock()  # one thread of a worker makes the plan, the others wait for it


@lru_cache(maxsize=1)
def plan_of(origin: Origin) -> Plan:
    """The plan made anew; raises PlanError where this machine comes to another one."""
    plan = make_plan(reopen(origin.opening), origin.recipe)
    if plan.fingerprint != origin.fingerprint:
        raise PlanError(
            f"{origin.opening.path}: a worker comes to another plan; it must see the same files and have the same "
            "version of neoxconv."
        )
    return plan

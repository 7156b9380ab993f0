"""A run on a Dask cluster: each worker makes the plan once, and then takes steps, or whole files for an object store.

What travels to a worker is how the plan is made and a number, never an open file or a weight; what comes back are
digests. Dask queues, retries and replaces workers that die: a step done twice writes the same bytes twice.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from neoxconv.core.model import Opening
from neoxconv.engine.checks import Checks
from neoxconv.engine.manifest import Described
from neoxconv.engine.plan import Plan, Step, make_plan
from neoxconv.engine.steps import Digests, Work, run_step
from neoxconv.engine.target_file import begin_file, finish_file
from neoxconv.engine.workers import Submit
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.sources.checkpoint import reopen
from neoxconv.storage import Remote, anew, is_here
from neoxconv.targets.recipe import Recipe

_SCHEME = "dask://"
PATIENCE = 10  # seconds until a scheduler must have answered
_RETRIES = 2  # of what failed on a worker


@dataclass(frozen=True)
class _Origin:
    """How a plan is made, and what must come of it everywhere; `versions` are those of a store's files."""

    opening: Opening
    recipe: Recipe
    fingerprint: str
    versions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One step for a worker, in files that it sees: its number, and what it needs of the run."""

    origin: _Origin
    number: int
    folder: Path
    known: Digests
    slab: int
    checks: Checks


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One file for a worker, which makes it on a disk of its own and sends it to `target`."""

    origin: _Origin
    number: int
    target: Remote
    slab: int
    checks: Checks


@contextmanager
def connected(address: str) -> Iterator[Executor]:
    """The workers of the scheduler at `address`; raises PlanError where there is none."""
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise PlanError("--executor dask://HOST:PORT needs Dask: pip install 'neoxconv[dask]'.") from error
    try:
        client: Any = Client(f"tcp://{address.removeprefix(_SCHEME)}", timeout=PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise PlanError(f"{address}: no Dask scheduler answers there; start one with `dask scheduler`.") from error
    with client:
        try:
            yield client.get_executor(pure=False, retries=_RETRIES)
        except (CancelledError, CommClosedError) as error:
            raise NeoxconvError(
                f"{address}: the scheduler is gone; start it and run the same command again to continue."
            ) from error
        except KilledWorker as error:
            raise NeoxconvError(
                f"{address}: one step ended its worker each time; look for `memory` in the workers' logs, "
                "and give them a smaller --memory."
            ) from error


def submit_to(pool: Executor, plan: Plan, work: Work) -> Submit:
    """What gives steps to workers that see the same files under the same paths."""
    origin = origin_of(plan)

    def send(step: Step) -> Future[Digests]:
        errand = Errand(
            origin=origin,
            number=step.number,
            folder=work.folder,
            known={key: work.known[key] for key in step.keys if key in work.known},
            slab=work.slab,
            checks=work.checks,
        )
        return pool.submit(run_errand, errand)

    return lambda steps: {send(step): step for step in steps}


def origin_of(plan: Plan) -> _Origin:
    """How a plan was made, in paths that hold in any working directory."""
    opening, recipe = plan.checkpoint.opening, plan.recipe
    config = tuple(path.absolute() for path in opening.config)
    opening = replace(opening, path=opening.path.absolute(), config=config)
    found = {"tokenizer": recipe.tokenizer, "imatrix": recipe.imatrix, "calibration": recipe.calibration}
    files: Any = {name: path.absolute() for name, path in found.items() if is_here(path)}
    return _Origin(opening, replace(recipe, **files), plan.fingerprint, _versions_of(plan))


def _versions_of(plan: Plan) -> tuple[str, ...]:
    """What stores call the contents of a plan's source files; nothing of files on a disk."""
    return tuple(file.storage.version for file in plan.checkpoint.index.files)


def run_errand(errand: Errand) -> Digests:
    """Take a step, on a worker."""
    plan = _plan_of(errand.origin)
    work = Work(
        folder=errand.folder,
        known=errand.known,
        slab=errand.slab,
        checks=errand.checks,
        source=plan.source,
    )
    with _naming_the_worker():
        return run_step(work, plan.steps[errand.number])


def deliver(delivery: Delivery) -> Described:
    """Make a file and send it, on a worker: the manifest's entry for it."""
    plan = _plan_of(delivery.origin)
    file = plan.files[delivery.number]
    with _naming_the_worker(), tempfile.TemporaryDirectory(prefix="neoxconv-") as made:
        folder = Path(made)
        begin_file(file, folder)
        work = Work(
            folder=folder,
            known={},
            slab=delivery.slab,
            checks=delivery.checks,
            source=plan.source,
        )
        digests = {key: digest for step in plan.steps_of(file) for key, digest in run_step(work, step).items()}
        described = finish_file(file, folder, digests)
        delivery.target.put(folder / file.name, work.stop)
    return described


@contextmanager
def _naming_the_worker() -> Iterator[None]:
    """Errors of the operating system in words that say on which machine."""
    try:
        yield
    except FileNotFoundError as error:
        raise NeoxconvError(
            f"{error.filename}: is not there on worker {socket.gethostname()}; the workers of a cluster must see "
            "source and target under the same paths."
        ) from error
    except OSError as error:
        raise NeoxconvError(
            f"{error.filename or tempfile.gettempdir()} on worker {socket.gethostname()}: {error.strerror or error}; "
            "see to it there, and run the same command again to continue."
        ) from error


_MAKING = threading.Lock()  # one thread of a worker makes the plan, the others wait for it


def _plan_of(origin: _Origin) -> Plan:
    """The plan of a run, on a worker."""
    with _MAKING:
        return _rebuild_plan(origin)


@lru_cache(maxsize=1)
def _rebuild_plan(origin: _Origin) -> Plan:
    """The plan made anew; raises PlanError where this machine comes to another one."""
    opening = replace(origin.opening, path=anew(origin.opening.path))
    plan = make_plan(reopen(opening), origin.recipe)
    if (plan.fingerprint, _versions_of(plan)) != (origin.fingerprint, origin.versions):
        raise PlanError(
            f"{origin.opening.path}: a worker comes to another plan; it must see the same files and have the same "
            "version of neoxconv."
        )
    return plan

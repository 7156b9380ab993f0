"""Many targets of one source, which is read once.

Each target has a run of its own, with its lock and its journal, and is published by itself as soon as it is whole; what
stops one does not stop the others. The runs share threads, which take the steps that read one tensor abreast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from neoxconv.engine.manifest import read_manifest
from neoxconv.engine.memory import DEFAULT_MEMORY, KEPT
from neoxconv.engine.plan import Plan
from neoxconv.engine.publish import room
from neoxconv.engine.run import Conversion, Done, carry_out, prepare
from neoxconv.engine.steps import Progress
from neoxconv.engine.workers import Joint, Seat
from neoxconv.engine.workplace import has_files, nearest_folder, work_of
from neoxconv.errors import NeoxconvError, PlanError, raise_all
from neoxconv.storage import Place, is_far, is_file, is_here, keep_bands, size_of
from neoxconv.words import size

Outcome = Done | NeoxconvError
Kind = TypeVar("Kind", bound=Place)


def run_all(
    plans: Mapping[Path, Plan],
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    progress: Progress = lambda count: None,
) -> list[Path]:
    """Make every target as planned, reading the source once, and return their paths; after an interruption, continue.

    The plans are of one open checkpoint. Targets that the same plans made already are left as they are. Raises what
    `run` raises; targets that nothing stops are made all the same.
    """
    left = {target: plan for target, plan in plans.items() if overwrite or not is_made(plan, target)}
    conversions = prepare_all(
        left, jobs=jobs, memory=memory, overwrite=overwrite, allow_nonfinite=allow_nonfinite, verify=verify
    )
    errors = [outcome for outcome in carry_out_all(conversions, progress) if isinstance(outcome, NeoxconvError)]
    if errors:
        raise type(errors[0])(*map(str, errors))
    return list(plans)


def prepare_all(plans: Mapping[Kind, Plan], **options: Any) -> list[Conversion]:
    """What `prepare` makes of plans that are carried out at the same time, with its options."""
    return [
        prepare(plan, target, **options, beside=[other for other in plans.values() if other is not plan])
        for target, plan in plans.items()
    ]


def is_made(plan: Plan, target: Place) -> bool:
    """Whether the same plan made the target: its files are there, each of its size, and nothing is at work on it."""
    if not target.exists() or (is_here(target) and has_files(work_of(target))):
        return False
    found = read_manifest(target)
    if found is None or found.get("fingerprint") != plan.fingerprint:
        return False
    files = [(target if plan.single else target / file["name"], file["bytes"]) for file in found["files"]]
    return all(is_file(path) and size_of(path) == nbytes for path, nbytes in files)


def carry_out_all(conversions: Sequence[Conversion], progress: Progress = lambda count: None) -> list[Outcome]:
    """Carry conversions of one open checkpoint out: on this disk by these threads together, else one after another.

    Raises PlanError where a disk cannot hold all of them, before any begins.
    """
    here = [each for each in conversions if not (each.executor or is_far(each.target))]
    _check_room(here)
    outcomes = dict(zip((each.target for each in here), _side_by_side(here, progress), strict=True))
    for each in conversions:
        if each.target not in outcomes:
            outcomes[each.target] = _outcome(each, progress)
    return [outcomes[each.target] for each in conversions]


def _side_by_side(conversions: Sequence[Conversion], progress: Progress) -> list[Outcome]:
    """What came of each, all of them run at the same time."""
    if not conversions:
        return []
    budget = conversions[0].budget  # all have the same
    joint = Joint(budget.jobs, len(conversions))
    _keep_bands(conversions[0].plan, budget.jobs * KEPT * budget.slab)
    with ThreadPoolExecutor(len(conversions)) as pool:
        try:
            seated = zip(conversions, joint.seats, strict=True)
            futures = [pool.submit(_outcome, each, progress, seat) for each, seat in seated]
            return [future.result() for future in futures]
        finally:
            joint.stop()
            joint.close()
            _keep_bands(conversions[0].plan, 0)


def _keep_bands(plan: Plan, nbytes: int) -> None:
    """Keep so many of the last bytes that were read of a plan's source, if that is far away."""
    for file in plan.checkpoint.index.files:
        keep_bands(file.storage.path, nbytes)


def _outcome(conversion: Conversion, progress: Progress, seat: Seat | None = None) -> Outcome:
    """What came of one conversion."""
    try:
        return carry_out(conversion, progress, seat)
    except NeoxconvError as error:
        return error
    finally:
        if seat:
            seat.leave()


def _check_room(conversions: Sequence[Conversion]) -> None:
    """Raise PlanError where a disk cannot hold all that is still to be written on it."""
    needed: Counter[int] = Counter()
    places: dict[int, tuple[Path, int]] = {}
    for each in conversions:
        work = work_of(each.target)
        left, free = room(each.plan, work)
        disk = nearest_folder(work).stat().st_dev
        needed[disk] += left
        places[disk] = nearest_folder(work), free
    raise_all(PlanError, (
        f"{folder}: {size(needed[disk])} are needed for all targets together and {size(free)} are free; "
        f"free {size(needed[disk] - free)} or choose another disk."
        for disk, (folder, free) in places.items() if needed[disk] > free
    ))  # fmt: skip

"""Where a plan's target is made: the place that was named, or a file of the default name in the folder that was."""

from __future__ import annotations

from neoxconv.engine.manifest import MANIFEST, our_files
from neoxconv.engine.plan import Plan
from neoxconv.errors import PlanError
from neoxconv.storage import Place, Remote, is_far, is_folder, is_here, place


def target_of(plan: Plan, target: Place | str) -> Place:
    """The place itself that a target is to have: for a single file one in `target` where that is a folder.

    A folder is a text that ends with a slash, one that is there already and no target of ours, and a repository of the
    Hub. Raises PlanError where the place has no name, as `/` has none.
    """
    where = place(target)
    if plan.single and (str(target).endswith("/") or _is_for_others(where)):
        where = where / plan.name
    where = where.resolve()
    if not where.name:
        raise PlanError(f"{where}: is no place for a target; give the name of a file or a folder in it.")
    return where.moving if is_far(where) else where


def _is_for_others(where: Place) -> bool:
    """Whether it is a repository, or a folder on this machine that is there and no target of ours."""
    if isinstance(where, Remote):
        return where.is_shared and where.is_root
    return is_here(where) and is_folder(where) and our_files(where / MANIFEST) is None

"""The errors that neoxconv raises: each message names the file and the tensor, expected and found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 10


class NeoxconvError(Exception):
    """Any failure that the user can understand and act on; the command line prints it as one line."""


class CheckpointError(NeoxconvError):
    """The input is missing, damaged, contradictory or not understood."""


class PlanError(NeoxconvError):
    """The request cannot be carried out; nothing has been written."""


class VerifyError(NeoxconvError):
    """The result is not what it should be."""


def raise_all(kind: type[NeoxconvError], problems: Iterable[str]) -> None:
    """Raise `kind` with up to ten of `problems`, one a line; do nothing when there are none."""
    found = list(problems)
    if found:
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise kind("\n".join(found[:SHOWN] + more))

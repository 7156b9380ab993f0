"""What is looked at in every step of a run, by names that journals keep.

What an earlier run wrote without one of the checks does not count.
"""

from __future__ import annotations

FINITE = "finite"  # a value that is infinite or no number stops the run
DECODED = "decoded"  # what was encoded is decoded again and held against its weights

Checks = frozenset[str]


def checks_of(*, allow_nonfinite: bool, verify: bool) -> Checks:
    """The checks that a run's options ask for."""
    wanted = {FINITE: not allow_nonfinite, DECODED: verify}
    return frozenset(name for name, asked in wanted.items() if asked)

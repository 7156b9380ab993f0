"""The errors that neoxconv raises: each message names the file and the tensor, expected and found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 10  # problems of one error
LONGEST = 700  # characters of a problem; of a longer one the first HEAD and the last TAIL are shown
HEAD, _TAIL = 500, 100


class NeoxconvError(Exception):
    """Any failure that the user can understand and act on. Each argument is a problem, printed as one line."""

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))


class CheckpointError(NeoxconvError):
    """The input is missing, damaged, contradictory or not understood."""


class UntoldError(CheckpointError):
    """The files leave a question open that an option answers: the option's name, and what it can be."""

    def __init__(self, problem: str, option: str = "", choices: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.option, self.choices = option, choices


class PlanError(NeoxconvError):
    """The request cannot be carried out; nothing has been written."""


class VerifyError(NeoxconvError):
    """The result is not what it should be."""


def escaped(text: object) -> str:
    """A text with everything spelt out that ends a line or that a terminal obeys."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def one_line(problem: object) -> str:
    """A text that may hold what a file says, without anything that ends a line or that a terminal obeys, not too long.

    A name in a file could otherwise print a verdict of its own.
    """
    text = escaped(problem)
    return text if len(text) <= LONGEST else f"{text[:HEAD]} ... {text[-_TAIL:]}"


def raise_all(kind: type[NeoxconvError], problems: Iterable[str]) -> None:
    """Raise `kind` with up to ten of `problems`, one a line; do nothing when there are none."""
    found = list(problems)
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise kind(*found[:_SHOWN], *more)

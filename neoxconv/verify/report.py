"""What a verification found, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neoxconv.errors import NeoxconvError, one_line
from neoxconv.storage import Place


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file or tensor, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


@dataclass(frozen=True)
class TensorError:
    """How a target's tensor differs from the source's, with the source's values as they are before rounding.

    `largest` is absolute; `relative` is the root mean square error over the root mean square of the weights.
    """

    name: str
    encoding: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Report:
    """The outcome of one level of verification; it passed when there are no findings."""

    level: str
    checked: str
    findings: tuple[Finding, ...]
    tensors: tuple[TensorError, ...] = ()
    lines: tuple[str, ...] = ()  # a table for people
    facts: Mapping[str, Any] = field(default_factory=dict)  # more of it, for machines
    ran: bool = True  # False where the level could not be carried out, as the findings say

    @property
    def passed(self) -> bool:
        return not self.findings

    @property
    def relative(self) -> float:
        """The largest relative error of any tensor."""
        return max((tensor.relative for tensor in self.tensors), default=0.0)


def findings_of(target: Place, error: NeoxconvError) -> tuple[Finding, ...]:
    """A finding for each problem that an error tells; most name the file themselves."""
    parts = [str(problem).partition(": ") for problem in error.args]
    return tuple(Finding(where, what) if what else Finding(str(target), where) for where, _, what in parts)


def layer_name(number: int) -> str:
    """What a layer is called; -1 is the embedding."""
    return f"layer {number}" if number >= 0 else "the embedding"


def together(reports: Sequence[Report]) -> Report:
    """Reports of one level as one, which ran where all of them did, or where one found something."""
    return Report(
        reports[0].level,
        "; ".join(report.checked for report in reports),
        tuple(finding for report in reports for finding in report.findings),
        lines=tuple(line for report in reports for line in report.lines),
        facts={name: value for report in reports for name, value in report.facts.items()},
        ran=all(report.ran for report in reports) or any(report.findings for report in reports),
    )


def verdicts(reports: Iterable[Report]) -> str:
    """Which levels ran, and what came of each."""
    return ", ".join(f"{report.level} {verdict(report)}" for report in reports)


def verdict(report: Report) -> str:
    """A level's outcome in a word or two."""
    if not report.ran:
        return "not checked"
    return "ok" if report.passed else "differ"

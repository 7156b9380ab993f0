"""What `verify` found of its targets, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.storage import Place
from neoxconv.verify.report import Report, TensorError, verdicts
from neoxconv.verify.subject import described
from neoxconv.words import first_of, plural, size, table

_FIGURES = ("type", "kl", "top1", "top5", "perplexity")  # of the logits level


@dataclass(frozen=True)
class Outcome:
    """What every level found of a target; `basis` says how the source was read."""

    target: Place
    basis: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    error: str = ""  # why the last level could not be carried out, which is no fault of the target
    model: Checkpoint | None = None  # the target, where it could be opened

    @property
    def passed(self) -> bool:
        return not self.error and all(report.passed for report in self.reports)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """What each level found, as plain values."""
        return [
            {
                "target": str(self.target),
                "level": report.level,
                "passed": report.passed,
                "checked": report.checked,
                "findings": [str(finding) for finding in report.findings],
                "relative_error": report.relative,
                **report.facts,
            }
            for report in self.reports
        ]

    @property
    def row(self) -> dict[str, Any]:
        """The target in a line of a table, as plain values; KL where the logits level ran, in nats."""
        figures = self.reports[-1].facts if self.reports else {}
        return {
            "target": str(self.target),
            "passed": self.passed,
            **self.basis,
            **(described(self.model) if self.model else {}),
            **{name: figures[name] for name in _FIGURES if name in figures},
            **({"error": self.error} if self.error else {}),
        }

    @property
    def listing(self) -> list[str]:
        """The outcome in lines."""
        lines = [table("<<", [*self.basis.items()])] if self.basis else []
        for report in self.reports:
            lines += [f"  {report.level}: {report.checked}", *findings(report), *report.lines]
            lines += [errors(report)] if report.tensors else []
        return lines

    @property
    def verdict(self) -> str:
        """Which levels ran, and whether they passed."""
        return f"{'PASS' if self.passed else 'FAIL'}: {verdicts(self.reports) or 'not checked'}"


@dataclass(frozen=True)
class Outcomes:
    """What was found of all targets, in their order."""

    each: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.each)

    @property
    def error(self) -> str:
        """What could not be carried out; empty where all could."""
        return "\n".join(dict.fromkeys(outcome.error for outcome in self.each if outcome.error))

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain values: a row for each target, and a list of every target's levels."""
        failure = {"error": self.error, "code": 1} if self.error else {}
        rows = [outcome.row for outcome in self.each]
        levels = [level for outcome in self.each for level in outcome.levels]
        return {"passed": self.passed, "targets": rows, "levels": levels, **failure}

    @property
    def listing(self) -> str:
        """All of it in lines, the last of which is the verdict; of several targets a table before it."""
        if len(self.each) == 1:
            return "\n".join([*self.each[0].listing, self.verdict])
        parts = ["\n".join([str(outcome.target), *outcome.listing, f"  {outcome.verdict}"]) for outcome in self.each]
        return "\n\n".join([*parts, f"{_side_by_side([outcome.row for outcome in self.each])}\n{self.verdict}"])

    @property
    def verdict(self) -> str:
        """The verdict in a line."""
        if len(self.each) == 1:
            return self.each[0].verdict
        wrong = [outcome.target.name for outcome in self.each if not outcome.passed]
        told = f"{len(wrong)} of {len(self.each)} targets: {', '.join(wrong)}" if wrong else ""
        return f"FAIL: {told}" if wrong else f"PASS: {plural(len(self.each), 'target')}"


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> str:
    """The targets in a table, with their predictions where these were compared."""
    lines = [("target", "type", "size", "bits/weight", "KL divergence, nats", "same first choice", "verdict")]
    for row in rows:
        kl = f"{row['kl']['mean']:.3g} +- {row['kl']['error']:.2g}" if "kl" in row else ""
        sizes = (size(row["bytes"]), f"{row['bits_per_weight']:.2f}") if "bytes" in row else ("", "")
        top1 = f"{100 * row['top1']:.2f} %" if "top1" in row else ""
        name, right = row["target"].rpartition("/")[2], "ok" if row["passed"] else "FAIL"
        lines.append((name, row.get("type", ""), *sizes, kl, top1, right))
    told = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return table("<" + ">" * (len(told) - 2) + "<", list(zip(*told, strict=True)))


def findings(report: Report) -> list[str]:
    """What is wrong, up to twenty lines of it."""
    return first_of(report.findings)


def errors(report: Report) -> str:
    """The worst tensor of each encoding: relative and largest absolute error."""
    worst: dict[str, TensorError] = {}
    for tensor in sorted(report.tensors, key=lambda tensor: tensor.relative):
        worst[tensor.encoding] = tensor
    rows = [(name, f"{t.relative:.3g}", f"{t.largest:.3g}", t.name) for name, t in sorted(worst.items())]
    return table("<>><", [("encoding", "relative error", "largest", "in the worst tensor"), *rows])

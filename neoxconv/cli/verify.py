"""The levels of verification that a command asks for, and their outcome for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, opened
from neoxconv.core.model import Checkpoint
from neoxconv.engine.manifest import read_manifest
from neoxconv.engine.memory import threads_for
from neoxconv.engine.side_file import check_side_file
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError, VerifyError
from neoxconv.sources.checkpoint import open_checkpoint, read_index
from neoxconv.sources.coverage import is_partial
from neoxconv.storage.remote import Place
from neoxconv.verify import verify_bytes, verify_weights
from neoxconv.verify.report import Finding, Report, TensorError, verdicts
from neoxconv.words import first_of, table


@dataclass(frozen=True)
class Outcome:
    """What every level found; `basis` says how the source was read."""

    basis: Mapping[str, str]
    reports: tuple[Report, ...]

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)

    @property
    def facts(self) -> dict[str, Any]:
        """The outcome as plain values."""
        levels = [
            {
                "level": report.level,
                "passed": report.passed,
                "checked": report.checked,
                "findings": [str(finding) for finding in report.findings],
                "relative_error": report.relative,
                **report.facts,
            }
            for report in self.reports
        ]
        return {"passed": self.passed, "levels": levels, **self.basis}

    @property
    def listing(self) -> str:
        """The outcome in lines, the last of which is the verdict."""
        lines = [table("<<", [*self.basis.items()])] if self.basis else []
        for report in self.reports:
            lines += [f"  {report.level}: {report.checked}", *findings(report), *report.lines]
            lines += [errors(report)] if report.tensors else []
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Which levels ran, and whether they passed."""
        return f"{'PASS' if self.passed else 'FAIL'}: {verdicts(self.reports)}"


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


def audit(paths: Sequence[Place], level: str, given: Given) -> Outcome:
    """The levels up to `level` on the last path: bytes (where it has a manifest), then weights against the first."""
    target = paths[-1]
    if level == "bytes":
        return Outcome({}, (check_bytes(target, given),))
    manifest = read_manifest(target) if target.exists() else None
    reports: tuple[Report, ...] = (check_bytes(target, given),) if manifest else ()
    norms, whence = policy("norms", "mean", manifest, given)
    weights, told = policy("weights", "stored", manifest, given)
    source = opened(paths[0], given, norms, weights)
    settings = given["preset"] or ", ".join(path.name for path in source.index.configs) or "the source's own"
    basis = {"norms": f"{norms} ({whence})" if len(source.index.ranks) > 1 else "one rank", "configuration": settings}
    basis |= {"weights": f"{weights} ({told})"} if weights != "stored" else {}
    if given["html"]:
        check_side_file(given["html"], (*paths, given["text"], given["tokens"], given["data"]))
    try:
        made = open_target(target, given)
        reports = (*reports, check_weights(source, made, given))
    except CheckpointError as error:
        if all(report.passed for report in reports):
            raise
        return Outcome(basis, (*reports, Report("weights", "cannot be opened", problems(target, error))))
    if level == "logits" and is_partial(made.index):
        raise PlanError(
            f"{target}: holds a part of the model only (--only), which predicts nothing; leave --level out."
        )
    if level == "logits":
        reports = (*reports, check_logits(source, made, target, reports, given))
    return Outcome(basis, reports)


def policy(name: str, default: str, manifest: Mapping[str, Any] | None, given: Given) -> tuple[str, str]:
    """How the target's norms were joined, or which weights it was made of, and who says so."""
    if given[name]:
        return given[name], "as asked"
    if manifest and name in manifest:
        return str(manifest[name]), "from the manifest"
    return default, "the default"


def check_bytes(target: Place, given: Given) -> Report:
    """The first level, with a bar."""
    manifest = read_manifest(target) if target.exists() else None
    total = sum(file["bytes"] for file in manifest["files"]) if manifest else 0
    with progress_bar(total, "bytes", given["json"] or given["quiet"]) as progress:
        return verify_bytes(target, progress=progress)


def check_logits(source: Checkpoint, made: Checkpoint, target: Place, before: Sequence[Report], given: Given) -> Report:
    """The third level, with a bar that counts layers; a page where one was asked for."""
    from neoxconv.verify.logits.level import compare

    quiet = given["json"] or given["quiet"]
    with progress_bar(2 * (source.config.layers + 1), "layers", quiet, "layer") as progress:
        try:
            return compare(source, made, target, before, given, progress)
        except VerifyError as error:
            return Report("logits", "cannot be compared", problems(target, error))


def problems(target: Place, error: NeoxconvError) -> tuple[Finding, ...]:
    """A finding for each problem that an error tells; most name the file themselves."""
    parts = [str(problem).partition(": ") for problem in error.args]
    return tuple(Finding(where, what) if what else Finding(str(target), where) for where, _, what in parts)


def check_weights(source: Checkpoint, made: Checkpoint, given: Given) -> Report:
    """The second level, with a bar."""
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with progress_bar(total, "weights", given["json"] or given["quiet"]) as progress:
        threads = max(threads_for(checkpoint, given["jobs"]) for checkpoint in (source, made))
        return verify_weights(source, made, jobs=threads, progress=progress)


def open_target(target: Place, given: Given) -> Checkpoint:
    """The target as a checkpoint; one without settings of its own gets the source's preset."""
    preset = None if read_index(target, ()).settings else given["preset"]
    return open_checkpoint(target, preset=preset, partial=True)

"""What the page of a verification shows, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neoxconv.errors import NeoxconvError
from neoxconv.verify.logits.compare import Position, Predictions
from neoxconv.verify.logits.outcome import Outcome, strange
from neoxconv.verify.report import Report, layer_name, verdicts
from neoxconv.verify.subject import Subject, described, fingerprint, manifest_digest, name_of
from neoxconv.version import __version__

_CONTEXT = 40  # tokens shown before a position
_Spell = Callable[[Sequence[int]], str]


def page_facts(
    subjects: Sequence[Subject],
    outcomes: Sequence[Outcome],
    failed: Mapping[int, Report | NeoxconvError],
    *,
    text: str,
    spell: _Spell,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the page shows of a source and its targets, in their order; `failed` are those without an outcome.

    `left_out` says of others why they could not be checked at all.
    """
    source, left = subjects[0].source, iter(outcomes)
    reference = described(source) | {"place": str(source.index.where), "fingerprint": fingerprint(source)}
    targets = [
        _without(each, str(failed[at])) if at in failed else _of_outcome(next(left), text, spell)
        for at, each in enumerate(subjects)
    ]
    for target in targets:
        target["compression"] = reference["stored"] / target["stored"] if target["stored"] else None
    shape = outcomes[0].predictions.tokens.shape if outcomes else (0, 0)
    return {
        "version": __version__,
        "model": name_of(source),
        "text": text,
        "sequences": shape[0],
        "length": shape[1],
        "engine": outcomes[0].predictions.engine if outcomes else "none",
        "remark": strange(outcomes[0].predictions, text) if outcomes else "",
        "left_out": list(left_out),
        "passed": all(target["passed"] for target in targets) and not left_out,
        "reference": reference,
        "targets": targets,
    }


def _known(subject: Subject, reports: Sequence[Report]) -> dict[str, Any]:
    """What is known of a target without its predictions."""
    manifest = subject.manifest or {}
    findings = [
        {"level": report.level, "where": finding.where, "what": finding.what}
        for report in reports
        for finding in report.findings
    ]
    tensors = [
        {"name": tensor.name, "encoding": tensor.encoding, "relative": tensor.relative}
        for report in reports
        for tensor in report.tensors
    ]
    return described(subject.candidate) | {
        "place": str(subject.target),
        "name": subject.target.name,
        "basis": dict(subject.basis or {}),
        "made_by": manifest.get("neoxconv"),
        "manifest": manifest_digest(subject.target),
        "verdict": verdicts(reports),
        "findings": findings,
        "passed": not findings,
        "tensors": tensors,
    }


def _without(subject: Subject, why: str) -> dict[str, Any]:
    """A target whose predictions were not compared, and why."""
    undone = Report("logits", "", (), ran=False)
    return _known(subject, (*subject.before, undone)) | {"passed": False, "failed": why}


def _of_outcome(outcome: Outcome, text: str, spell: _Spell) -> dict[str, Any]:
    """A target and what came of it."""
    predictions = outcome.predictions
    broken = predictions.broken if outcome.findings else None
    return _known(outcome.subject, (*outcome.subject.before, outcome.report(text))) | {
        **outcome.figures,
        "largest_difference": predictions.figures.largest_difference,
        "rms_probability": predictions.figures.rms_probability,
        "layers": [asdict(layer) for layer in predictions.layers],
        "broken": None if broken is None else {"layer": broken, "name": layer_name(broken)},
        "kl_values": predictions.divergences.tolist(),
        "worst": [_position(position, predictions, spell) for position in predictions.worst],
        "limits": [asdict(limit) | {"passed": limit.passed} for limit in outcome.limits],
        "task": asdict(outcome.exam) if outcome.exam else None,
    }


def _position(at: Position, predictions: Predictions, spell: _Spell) -> dict[str, Any]:
    """A position in context: what comes before it, what follows, what each side expected."""
    row = predictions.tokens[at.sequence].tolist()
    return {
        "kl": at.divergence,
        "sequence": at.sequence,
        "position": at.position,
        "before": spell(row[max(0, at.position - _CONTEXT) : at.position + 1]),
        "token": spell(row[at.position + 1 : at.position + 2]),
        "reference": [[spell([word]), share] for word, share in at.reference],
        "candidate": [[spell([word]), share] for word, share in at.candidate],
    }

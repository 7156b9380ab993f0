"""`verify --level logits`: the comparison, its verdict, and what people and machines are told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.engine.side_file import whole
from neoxconv.errors import PlanError
from neoxconv.storage import Place
from neoxconv.targets.stand_in import as_the_targets
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.bisect import bisect
from neoxconv.verify.logits.compare import Logits, Position, Predictions, check_sizes, compare_predictions
from neoxconv.verify.logits.limits import Limit, judged, type_of
from neoxconv.verify.logits.tokens import speller, tokens_for
from neoxconv.verify.logits.trial import Engine, Sample, Trial
from neoxconv.verify.page.page import page
from neoxconv.verify.report import Finding, Report, verdicts
from neoxconv.verify.tasks.exam import examine
from neoxconv.words import table

_LAYERS_SHOWN = 12
_CONTEXT = 40  # tokens shown before a position


def verify_logits(
    source: Checkpoint,
    candidate: Checkpoint,
    trial: Trial,
    *,
    target: Place,
    before: Sequence[Report] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """The report of the third level on `candidate`, which lies at `target`; `before` are those of the other levels.

    `progress` is told of every layer of a side, and of the heads. Raises VerifyError where the two cannot be compared
    or the engine dies, PlanError or CheckpointError where the trial cannot be done.
    """
    source.refuse_doubts()
    source = _as_short(source, candidate)
    tokens, text = tokens_for(_within_windows(source, candidate, trial.sample), trial.sample)
    check_sizes(source, candidate)
    _check_window(tokens.shape[1], source, candidate, trial.sample)
    engine, device = trial.engine, trial.device
    logits = _logits_of(engine, target, candidate, tokens)
    predictions = compare_predictions(
        source, candidate, tokens, device=device, progress=progress, engine=engine.name, logits=logits
    )
    limits = judged(predictions, source, candidate, trial.limits)
    findings = _found_wrong(predictions, limits, target)
    if trial.bisect and findings and engine.native:
        suspect = bisect(as_the_targets(source, candidate), candidate, predictions.broken, tokens, device=device)
        findings.append(Finding("bisect", str(suspect)))
    facts = predictions.facts | {"text": text, "limits": [asdict(limit) for limit in limits]}
    told = lines(predictions, limits)
    if trial.task:
        exam = examine(source, candidate, trial.task, target=target, engine=engine, device=device)
        facts["task"] = asdict(exam)
        told.append(table("<<<", [(f"task on {exam.data}", "reference", "target"), *exam.rows]))
    checked = f"{len(tokens)} x {tokens.shape[1]} tokens of {text}, {type_of(candidate)} by {engine.name}"
    report = Report("logits", checked, tuple(findings), lines=tuple(told), facts=facts)
    if trial.html:
        shown = _page_facts(source, predictions, limits, target=target, reports=(*before, report))
        with whole(trial.html) as partial:
            partial.write_text(page({"text": text} | shown), "utf-8")
    return report


def _as_short(source: Checkpoint, candidate: Checkpoint) -> Checkpoint:
    """The source with the target's context where that is shorter: a family that stands in may have room for less."""
    context = min(source.config.context, candidate.config.context)
    return replace(source, config=replace(source.config, context=context))


def _common(source: Checkpoint, candidate: Checkpoint) -> int | None:
    """Tokens in a row up to which the two are one function, though one of them has another window; None for all."""
    windows = source.config.window, candidate.config.window
    return None if windows[0] == windows[1] else min(filter(None, windows))


def _within_windows(source: Checkpoint, candidate: Checkpoint, sample: Sample) -> Checkpoint:
    """The source with no more context than the two have in common, where sequences are cut from a text."""
    common = None if sample.tokens else _common(source, candidate)
    context = min(source.config.context, common or source.config.context)
    return replace(source, config=replace(source.config, context=context))


def _check_window(length: int, source: Checkpoint, candidate: Checkpoint, sample: Sample) -> None:
    """Raise PlanError where token ids in longer rows were given."""
    most = _common(source, candidate)
    if most is not None and length > most:
        raise PlanError(
            f"{sample.tokens}: has rows of {length} tokens; source and target have another window, so that they are "
            f"equal up to {most} tokens only. Give rows of at most {most}."
        )


def _logits_of(engine: Engine, target: Place, candidate: Checkpoint, tokens: Numbers) -> Logits | None:
    """Another engine's logits of the target; None for the native engine, which makes them layer by layer."""
    if engine.native:
        return None
    with program(engine, target, candidate) as ask:
        return ask(tokens)


def _found_wrong(predictions: Predictions, limits: Sequence[Limit], target: Place) -> list[Finding]:
    """The limits that do not hold; if any, also where it begins, as far as that stands out."""
    findings = [Finding(str(target), str(limit)) for limit in limits if not limit.passed]
    if findings and predictions.broken is not None:
        where = f"layer {predictions.broken}" if predictions.broken >= 0 else "the embedding"
        findings.append(Finding(where, "is the first whose output differs clearly more than the others'"))
    return findings


def lines(predictions: Predictions, limits: Sequence[Limit]) -> list[str]:
    """The figures as tables."""
    f = predictions.figures
    ratio = f"{f.perplexity.ratio:.6f} +- {f.perplexity.ratio_error:.6f}"
    rows = [
        ("KL divergence", f"mean {f.mean:.3g}, median {f.median:.3g}, 99 % {f.p99:.3g}, largest {f.largest:.3g}"),
        ("limit", "; ".join(str(limit) for limit in limits)),
        ("same first choice", f"{100 * f.top1:.2f} %; of the first five {100 * f.top5:.2f} %"),
        ("largest difference", f"{f.largest_difference:.3g} of a logit"),
        ("perplexity", f"{f.perplexity.reference:.4f} and {f.perplexity.candidate:.4f}, ratio {ratio}"),
        ("right token", f"its probability changes by {100 * f.rms_probability:.3g} % (RMS)"),
    ]
    result = [table("<<", rows)]
    if predictions.layers:
        result.append(table("<>>", [("after", "relative error", "cosine"), *_layer_rows(predictions)]))
    return result


def _layer_rows(predictions: Predictions) -> list[tuple[str, str, str]]:
    """The layers' errors; of many layers some, the broken one and the last included."""
    layers = predictions.layers
    step = max(1, len(layers) // _LAYERS_SHOWN)
    shown = [x for i, x in enumerate(layers) if i % step == 0 or x is layers[-1] or x.layer == predictions.broken]
    names = {-1: "embedding"}
    return [(names.get(x.layer, f"layer {x.layer}"), f"{x.error:.3g}", f"{x.cosine:.9f}") for x in shown]


def _page_facts(
    source: Checkpoint,
    predictions: Predictions,
    limits: Sequence[Limit],
    *,
    target: Place,
    reports: Sequence[Report],
) -> dict[str, Any]:
    """What the page shows, as plain values; `reports` are those of all levels."""
    f, spell = predictions.figures, speller(source)
    findings = [f"{report.level}: {finding}" for report in reports for finding in report.findings]
    return predictions.facts | {
        "source": str(source.index.folder),
        "target": str(target),
        "passed": not findings,
        "verdict": verdicts(reports),
        "kl": {"mean": f.mean, "median": f.median, "p99": f.p99, "max": f.largest},
        "kl_values": predictions.divergences.tolist(),
        "tensors": [
            {"name": tensor.name, "encoding": tensor.encoding, "relative": tensor.relative}
            for report in reports
            for tensor in report.tensors
        ],
        "worst": [_position_facts(position, predictions, spell) for position in predictions.worst],
        "limits": [asdict(limit) | {"passed": limit.passed} for limit in limits],
        "findings": findings,
    }


def _position_facts(at: Position, predictions: Predictions, spell: Callable[[Sequence[int]], str]) -> dict[str, Any]:
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

"""`verify --level logits`: the comparison, its verdict, and what people and machines are told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.engine.side_file import whole
from neoxconv.storage.remote import Place
from neoxconv.verify.logits.bisect import bisect
from neoxconv.verify.logits.compare import Position, Predictions, check_sizes, compare_predictions
from neoxconv.verify.logits.engines import ENGINES
from neoxconv.verify.logits.limits import Limit, check, type_of
from neoxconv.verify.logits.tokens import LENGTH, speller, tokens_for
from neoxconv.verify.page.page import page
from neoxconv.verify.report import Finding, Report, verdicts
from neoxconv.verify.tasks.exam import examine
from neoxconv.words import table

LAYERS_SHOWN = 12
CONTEXT = 40  # tokens shown before a position


def compare(
    source: Checkpoint,
    candidate: Checkpoint,
    target: Place,
    before: Sequence[Report],
    given: Mapping[str, Any],
    progress: Callable[[int], None],
) -> Report:
    """The report of the third level; `before` are those of the others, `given` the options."""
    tokens, text = tokens_for(source, given["text"], given["tokens"], given["length"] or LENGTH, given["sequences"])
    check_sizes(source, candidate)
    engine, device = given["engine"], given["device"] or "cpu"
    logits = ENGINES[engine](target, candidate, tokens) if engine != "native" else None
    predictions = compare_predictions(
        source, candidate, tokens, device=device, progress=progress, engine=engine, logits=logits
    )
    limits = check(predictions, source, candidate, given)
    findings = [Finding(str(target), str(limit)) for limit in limits if not limit.passed]
    if findings and predictions.broken is not None:
        where = f"layer {predictions.broken}" if predictions.broken >= 0 else "the embedding"
        findings.append(Finding(where, "is the first whose output differs clearly more than the others'"))
    if given["bisect"] and findings and engine == "native":
        suspect = bisect(source, candidate, predictions.broken, tokens, device)
        findings.append(Finding("bisect", str(suspect)))
    facts = predictions.facts | {"text": text, "limits": [asdict(limit) for limit in limits]}
    told = lines(predictions, limits)
    if given["task"]:
        exam = examine(source, candidate, target, given)
        facts["task"] = asdict(exam)
        told.append(table("<<<", [(f"task on {exam.data}", "reference", "target"), *exam.rows]))
    checked = f"{len(tokens)} x {tokens.shape[1]} tokens of {text}, {type_of(candidate)} by {engine}"
    report = Report("logits", checked, tuple(findings), lines=tuple(told), facts=facts)
    if given["html"]:
        facts = page_facts(source, target, predictions, limits, (*before, report))
        with whole(given["html"]) as partial:
            partial.write_text(page({"text": text} | facts), "utf-8")
    return report


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
        result.append(table("<>>", [("after", "relative error", "cosine"), *layer_rows(predictions)]))
    return result


def layer_rows(predictions: Predictions) -> list[tuple[str, str, str]]:
    """The layers' errors; of many layers some, the broken one and the last included."""
    layers = predictions.layers
    step = max(1, len(layers) // LAYERS_SHOWN)
    shown = [x for i, x in enumerate(layers) if i % step == 0 or x is layers[-1] or x.layer == predictions.broken]
    names = {-1: "embedding"}
    return [(names.get(x.layer, f"layer {x.layer}"), f"{x.error:.3g}", f"{x.cosine:.9f}") for x in shown]


def page_facts(
    source: Checkpoint, target: Place, predictions: Predictions, limits: Sequence[Limit], reports: Sequence[Report]
) -> dict[str, Any]:
    """What the page shows, as plain values."""
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
        "worst": [position_facts(position, predictions, spell) for position in predictions.worst],
        "limits": [asdict(limit) | {"passed": limit.passed} for limit in limits],
        "findings": findings,
    }


def position_facts(at: Position, predictions: Predictions, spell: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """A position in context: what comes before it, what follows, what each side expected."""
    row = predictions.tokens[at.sequence].tolist()
    return {
        "kl": at.divergence,
        "sequence": at.sequence,
        "position": at.position,
        "before": spell(row[max(0, at.position - CONTEXT) : at.position + 1]),
        "token": spell(row[at.position + 1 : at.position + 2]),
        "reference": [[spell([word]), share] for word, share in at.reference],
        "candidate": [[spell([word]), share] for word, share in at.candidate],
    }

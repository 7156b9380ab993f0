"""What comes of comparing a target's predictions: the report, and what people and machines are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neoxconv.verify.logits.compare import Predictions
from neoxconv.verify.logits.limits import Limit
from neoxconv.verify.report import Finding, Report, layer_name
from neoxconv.verify.subject import Subject
from neoxconv.verify.tasks.exam import Exam
from neoxconv.words import table

_LAYERS_SHOWN = 12
_ENOUGH = 256  # positions from which on the shares of tokens are told; in a short text each comes up once


@dataclass(frozen=True)
class Outcome:
    """A target's predictions, the limits that they are held against, and what is wrong; perhaps answers to a task."""

    subject: Subject
    predictions: Predictions
    limits: tuple[Limit, ...]
    findings: tuple[Finding, ...]
    type: str  # the target's
    exam: Exam | None = None

    def report(self, text: str) -> Report:
        """The report of the level; `text` says where the tokens are from."""
        found = self.predictions
        facts = found.facts | self.figures | {"text": text, "limits": [asdict(limit) for limit in self.limits]}
        told = lines(found, self.limits)
        if remark := strange(found, text):
            facts["remark"] = remark
            told.append(f"  {remark}")
        if self.exam:
            facts["task"] = asdict(self.exam)
            told.append(table("<<<", [(f"task on {self.exam.data}", "reference", "target"), *self.exam.rows]))
        rows, length = found.tokens.shape
        checked = f"{rows} x {length} tokens of {text}, {self.type} by {found.engine}"
        return Report("logits", checked, self.findings, lines=tuple(told), facts=facts)

    @property
    def figures(self) -> dict[str, Any]:
        """The headline figures by their names; KL in nats, with the standard error of its mean."""
        f = self.predictions.figures
        kl = {"mean": f.mean, "error": f.mean_error, "median": f.median, "p99": f.p99, "max": f.largest}
        return {"type": self.type, "kl": kl, "top1": f.top1, "top5": f.top5, "perplexity": asdict(f.perplexity)}


def strange(predictions: Predictions, text: str) -> str:
    """A remark where the reference was trained on other texts than this; empty where it was not.

    It then predicts the text worse than the shares of the text's own tokens do.
    """
    f = predictions.figures
    if f.positions < _ENOUGH or not f.perplexity.reference > f.unigram:
        return ""
    return (
        f"The reference's perplexity on {text} is {f.perplexity.reference:.4g}; a guess by the tokens' own shares has "
        f"{f.unigram:.4g}. So the model was trained on other texts, and the figures say little of its use. "
        "Give a text of its kind with --text FILE."
    )


def lines(predictions: Predictions, limits: Sequence[Limit]) -> list[str]:
    """The figures as tables."""
    f = predictions.figures
    ratio = f"{f.perplexity.ratio:.6f} +- {f.perplexity.ratio_error:.6f}"
    kl = f"mean {f.mean:.3g} +- {f.mean_error:.2g}, median {f.median:.3g}, 99 % {f.p99:.3g}, largest {f.largest:.3g}"
    rows = [
        ("KL divergence", f"{kl} nats"),
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
    return [(layer_name(x.layer), f"{x.error:.3g}", f"{x.cosine:.9f}") for x in shown]

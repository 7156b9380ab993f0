"""What a comparison of logits found, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from neoxconv.verify.page.parts import section, table, verdict
from neoxconv.verify.page.sizes import size_chart
from neoxconv.verify.page.svg import number, percent, shown
from neoxconv.verify.page.target import findings, predictions
from neoxconv.words import plural, size

_EXPLANATION = (
    "All models read the same tokens, and every position compares what they predict for the next one.",
    "The KL divergence, in nats, is zero where both give the same probabilities; its mean says how far the models are "
    "apart as a whole, its p99 and its largest value how bad the worst positions are. After ± stands the standard "
    "error of the mean.",
    "The error per layer is that of the residual stream, relative to its size: a steady rise is rounding that adds up, "
    "a jump is a reason to look at that layer's tensors.",
    "Perplexity ratio and top-1 agreement say how much of this shows in use: 1 and 100 % are no difference.",
    "Bits per weight are those of all stored tensors, scales included, over the model's parameters.",
)


def page(facts: Mapping[str, Any]) -> str:
    """The report as one HTML page: of several targets a comparison first, then each one's own part."""
    targets = facts["targets"]
    parts = [header(facts)]
    if len(targets) > 1:
        parts += [comparison(facts), _models(facts), _tasks(targets)]
        parts += [_folded(each, number_of) for number_of, each in enumerate(targets)]
    else:
        parts += [findings(targets[0]), _models(facts), _tasks(targets), predictions(targets[0])]
    style = files(__package__).joinpath("style.css").read_text("utf-8")
    title = f"{'PASS' if facts['passed'] else 'FAIL'}: {', '.join(each['name'] for each in targets)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title)}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}{_footer()}</main>\n</body>\n</html>\n"
    )


def header(facts: Mapping[str, Any]) -> str:
    """The verdict, and what was compared."""
    targets = facts["targets"]
    tokens = f"{plural(facts['sequences'], 'sequence')} of {plural(facts['length'], 'token')}, {facts['text']}"
    entries = {
        "Model": facts["model"],
        "Reference": facts["reference"]["place"],
        **({"Target": targets[0]["place"]} if len(targets) == 1 else {}),
        "Engine": facts["engine"],
        "Tokens": tokens,
    }
    listed = "".join(f"<dt>{name}</dt><dd>{shown(value)}</dd>" for name, value in entries.items())
    title = f"{verdict(facts['passed'], 'badge')}<h1>{shown(_title(facts))}</h1>"
    told = [*(f"Not on this page: {why}" for why in facts["left_out"]), facts["remark"]]
    remarks = "".join(f'<p class="remark">{shown(remark)}</p>' for remark in told if remark)
    return f"<header>{title}<dl>{listed}</dl>{remarks}</header>\n"


def _title(facts: Mapping[str, Any]) -> str:
    """The verdict in words: of one target by level, of several how many are right."""
    count = len(facts["targets"]) + len(facts["left_out"])
    passed = sum(bool(each["passed"]) for each in facts["targets"])
    return f"{passed} of {count} targets are right" if count > 1 else str(facts["targets"][0]["verdict"])


def comparison(facts: Mapping[str, Any]) -> str:
    """The targets side by side, in a table and as a chart."""
    heads = ("Target", "Type", "Size", "KL, nats", "Top-1", "Bits per weight", "Verdict")
    rows = [_row(each, at) for at, each in enumerate(facts["targets"])]
    chart = size_chart(facts["targets"])
    about = "Mean KL divergence in nats over size. The line joins the targets that no other beats in both."
    drawn = section("Size and divergence", about, f'<div class="card broad">{chart}</div>') if chart else ""
    return section("The targets", "Each beside the reference, on the same tokens.", table(heads, rows)) + drawn


def _row(target: Mapping[str, Any], at: int) -> list[str]:
    """A target's line of the comparison, which leads to its own part."""
    name = f'<a href="#target-{at}">{shown(target["name"])}</a>'
    bits = f"{target['bits_per_weight']:.2f}"
    if target.get("failed"):
        return [name, "", size(target["bytes"]), "not compared", "", bits, verdict(False)]
    kl = f"{number(target['kl']['mean'])} ± {number(target['kl']['error'], 2)}"
    type_, top1 = shown(target["type"]), percent(target["top1"])
    return [name, type_, size(target["bytes"]), kl, top1, bits, verdict(target["passed"])]


def _folded(target: Mapping[str, Any], at: int) -> str:
    """A target's own part, open where something is wrong."""
    opened = "" if target["passed"] else " open"
    head = f"{verdict(target['passed'])} {shown(target['name'])}: {shown(target['verdict'])}"
    start = f'<details class="target" id="target-{at}"{opened}><summary>{head}</summary>'
    start += f'<p class="soft">{shown(target["place"])}</p>'
    return f"{start}{findings(target)}{predictions(target)}</details>\n"


def _models(facts: Mapping[str, Any]) -> str:
    """The reference and the targets in figures: sizes, how they were read, digests."""
    reference, targets = facts["reference"], facts["targets"]
    basis = list(dict.fromkeys(name for each in targets for name in each["basis"]))
    heads = ("", "Format", "Parameters", "Files", "Bits per weight", "Compression", *map(str.capitalize, basis))
    ours = ["Reference", *_figures(reference), "", *("" for _ in basis)]
    theirs = [
        [
            shown(each["name"]),
            *_figures(each),
            _times(each["compression"]),
            *(shown(each["basis"].get(n, "")) for n in basis),
        ]
        for each in targets
    ]
    digests = table(
        ("SHA-256 of", ""), [("the source's headers", _digest(reference["fingerprint"])), *_manifests(targets)]
    )
    about = f"As neoxconv {shown(facts['version'])} reads them: {shown(facts['model'])}."
    return section("The models", about, table(heads, [ours, *theirs]) + f'<div class="digests">{digests}</div>')


def _figures(model: Mapping[str, Any]) -> list[str]:
    """A model's cells."""
    figures = f"{model['parameters']:,}", size(model["bytes"]), f"{model['bits_per_weight']:.2f}"
    return [shown(" ".join(filter(None, (model["format"], model.get("type"))))), *figures]


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f} : 1" if ratio else ""


def _manifests(targets: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """A line for each target's manifest, which has the digest of all its bytes, and what wrote it."""
    for each in targets:
        made = f" by neoxconv {shown(each['made_by'])}" if each["made_by"] else ""
        yield f"the manifest of {shown(each['name'])}{made}", _digest(each["manifest"])


def _digest(digest: str | None) -> str:
    """A digest, which may be broken into lines."""
    return f"<code>{shown(digest)}</code>" if digest else "there is none"


def _tasks(targets: Sequence[Mapping[str, Any]]) -> str:
    """The answers to a task, of the reference and of each target."""
    answered = [each for each in targets if each.get("task")]
    if not answered:
        return ""
    task = answered[0]["task"]
    ours = task["scores"]["reference"]
    names = [name for name in ours if name != "questions" and not name.endswith("_error")]
    sides = [("Reference", ours), *((shown(each["name"]), each["task"]["scores"]["candidate"]) for each in answered)]
    rows = [(name, *(_score(scores, metric) for metric in names)) for name, scores in sides]
    about = f"{task['task']}, {plural(task['shots'], 'example')} before each of {ours['questions']:,} questions of "
    return section("Task", f"{about}{shown(task['data'])}.", table(("", *map(_metric, names)), rows))


def _metric(name: str) -> str:
    return {"accuracy": "Accuracy", "accuracy_norm": "Accuracy by length"}.get(name, name.capitalize())


def _score(scores: Mapping[str, float], name: str) -> str:
    """A metric: a share with its standard error, or a number."""
    error = scores.get(f"{name}_error")
    return number(scores[name]) if error is None else f"{percent(scores[name])} ± {percent(error)}"


def _footer() -> str:
    """How to read the page."""
    return f"<footer><h2>How to read this</h2>{''.join(f'<p>{sentence}</p>' for sentence in _EXPLANATION)}</footer>\n"

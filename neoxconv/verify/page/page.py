"""What a comparison of logits found, as one HTML page that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from neoxconv.verify.page.charts import LAYERED, heat_map, kl_chart, largest, layer_chart, number, percent, shown
from neoxconv.words import plural

_EXPLANATION = (
    "Both models read the same tokens, and every position compares what they predict for the next one.",
    "The KL divergence, in nats, is zero where both give the same probabilities; its mean says how far the models are "
    "apart as a whole, its p99 and its largest value how bad the worst positions are.",
    "The error per layer is that of the residual stream, relative to its size: a steady rise is rounding that adds up, "
    "a jump is a reason to look at that layer's tensors.",
    "Perplexity ratio and top-1 agreement say how much of this shows in use: 1 and 100 % are no difference.",
)


def page(facts: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    charts = f'<div class="pair">{layers(facts["layers"])}{divergence(facts)}</div>'
    parts = (header(facts), _cards(facts), limits(facts["limits"]), charts, tensors(facts.get("tensors") or ()))
    body = "".join([*parts, worst(facts["worst"]), _footer()])
    style = files(__package__).joinpath("style.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{'PASS' if facts['passed'] else 'FAIL'}: {shown(facts['target'])}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def header(facts: Mapping[str, Any]) -> str:
    """The verdict, what is wrong, and what was compared."""
    tokens = f"{plural(facts['sequences'], 'sequence')} of {plural(facts['length'], 'token')}, {facts['text']}"
    entries = {"Reference": facts["source"], "Candidate": facts["target"], "Engine": facts["engine"], "Tokens": tokens}
    listed = "".join(f"<dt>{name}</dt><dd>{shown(value)}</dd>" for name, value in entries.items())
    findings = "".join(f"<li>{shown(finding)}</li>" for finding in facts["findings"])
    found = f"<h2>Findings</h2><ul>{findings}</ul>" if findings else ""
    title = f"{verdict(facts['passed'], 'badge')}<h1>{shown(facts['verdict'])}</h1>"
    return f"<header>{title}{found}<dl>{listed}</dl></header>\n"


def verdict(passed: bool, style: str = "") -> str:
    """A pass or a fail in sign, word and colour."""
    kind, sign = ("pass", "✓ PASS") if passed else ("fail", "✗ FAIL")
    return f'<span class="{f"{style} {kind}".strip()}">{sign}</span>'


def section(title: str, about: str, content: str) -> str:
    """A part of the page: its heading, a sentence about it, and what it shows."""
    return f'<section><h2>{title}</h2><p class="soft">{about}</p>{content}</section>\n'


def _cards(facts: Mapping[str, Any]) -> str:
    """The headline figures."""
    kl, perplexity = facts["kl"], facts["perplexity"]
    figures = (
        ("Mean KL", number(kl["mean"]), f"median {number(kl['median'])}<br>largest {number(kl['max'])}"),
        ("99th percentile KL", number(kl["p99"]), f"of {plural(len(facts['kl_values']), 'position')}"),
        ("Top-1 agreement", percent(facts["top1"]), f"top-5: {percent(facts['top5'])}"),
        ("Perplexity ratio", ratio(perplexity["ratio"], perplexity["ratio_error"]), _perplexities(perplexity)),
        ("Probability change", percent(facts["rms_probability"]), "root mean square,<br>of the right token"),
        ("Largest difference", number(facts["largest_difference"]), "of any logit"),
    )
    made = "".join(f'<div class="card">{name}<strong>{value}</strong>{more}</div>' for name, value, more in figures)
    return f'<section><h2>Headline figures</h2><div class="cards">{made}</div></section>\n'


def ratio(value: float, error: float) -> str:
    """A ratio with as many digits as its error leaves it, at least three decimals and at most six."""
    if not math.isfinite(value) or abs(value) >= 100:
        return number(value)
    digits = 1 - math.floor(math.log10(error)) if 0 < error < math.inf else 5
    return f"{value:.{min(max(digits, 3), 6)}f}"


def _perplexities(found: Mapping[str, float]) -> str:
    return f"± {number(found['ratio_error'])}<br>{number(found['reference'])} → {number(found['candidate'])}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML, with the first of each row as its heading."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = (f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def limits(found: Sequence[Mapping[str, Any]]) -> str:
    """What had to hold, and whether it does."""
    if not found:
        return section("Limits", "No limits were set.", "")
    rows = [(shown(item["name"]), number(item["found"], 5), bound(item), verdict(item["passed"])) for item in found]
    held = sum(bool(item["passed"]) for item in found)
    return section("Limits", f"{held} of {len(found)} hold.", table(("Measure", "Found", "Limit", "Result"), rows))


def bound(item: Mapping[str, Any]) -> str:
    """What a figure may be, and on which side of it it must lie."""
    return f"{'≥' if item['least'] else '≤'} {number(item['limit'], 5)}"


def layers(found: Sequence[Mapping[str, Any]]) -> str:
    """The error after each layer, as a chart and in numbers."""
    if not found:
        return section("Error per layer", "The layers were not compared, only the logits.", "")
    most = largest(float(layer["error"]) for layer in found)
    rows = [(str(layer["layer"]), number(layer["error"]), number(max(1 - layer["cosine"], 0.0))) for layer in found]
    values = table(("Layer", "Relative error", "Cosine distance"), rows)
    about = f"Relative error of the residual stream, the largest {number(most)}."
    numbers = f"<details><summary>In numbers</summary>{values}</details>"
    return section("Error per layer", about, f'<div class="card">{layer_chart(found)}{numbers}</div>')


def divergence(facts: Mapping[str, Any]) -> str:
    """How the KL divergence is distributed."""
    values, kl = facts["kl_values"], facts["kl"]
    if not values:
        return section("KL divergence", "No positions were compared.", "")
    chart = kl_chart(values, {name: kl[name] for name in ("mean", "median", "p99")})
    return section("KL divergence", "Positions by their divergence.", f'<div class="card">{chart}</div>')


def tensors(found: Sequence[Mapping[str, Any]]) -> str:
    """The error of each tensor's weights: a map of the layers, a list of the rest."""
    if not found:
        return ""
    top = max(found, key=lambda tensor: (math.isnan(tensor["relative"]), tensor["relative"]))
    rest = [tensor for tensor in found if not LAYERED.fullmatch(tensor["name"])]
    rows = [(shown(each["name"]), shown(each["encoding"]), number(each["relative"])) for each in rest]
    outside = f"<h3>Outside the layers</h3>{table(('Tensor', 'Encoding', 'Relative error'), rows)}" if rows else ""
    about = f"Relative error of the weights, the largest {number(top['relative'])} ({shown(top['name'])})."
    heat = heat_map(found)
    return section("Error per tensor", about, (f'<div class="card">{heat}</div>' if heat else "") + outside)


def worst(found: Sequence[Mapping[str, Any]]) -> str:
    """The positions where the models differ most."""
    if not found:
        return ""
    about = "Where the models differ most: the text with the right next token (✓), and what each model expected there."
    return section("Worst positions", about, f'<div class="worst">{"".join(map(position, found))}</div>')


def position(item: Mapping[str, Any]) -> str:
    """One position: the text with its next token marked, and the likeliest tokens on both sides."""
    before = item["before"] if len(item["before"]) <= 300 else "…" + item["before"][-299:]
    where = f"KL {number(item['kl'])}, sequence {item['sequence']}, position {item['position']}"
    lines = re.sub("(↵+)", r"\1\n", shown(before))
    text = f'<p class="context"><bdi>{lines}</bdi><mark>{token(item["token"])}</mark></p>'
    sides = "".join(_side(name, item[name.lower()], item["token"]) for name in ("Reference", "Candidate"))
    return f'<article class="card"><h3>{where}</h3>{text}<div class="sides">{sides}</div></article>'


def token(text: str) -> str:
    """A token, cut if it is long, whose spaces at the ends can be seen."""
    text = text if len(text) <= 40 else text[:39] + "…"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" "))
    spaced = "␣" * left + inner + "␣" * (len(text) - left - len(inner))
    return f"<bdi>{shown(spaced) or '(empty)'}</bdi>"


def _side(name: str, likely: Iterable[Sequence[Any]], right: str) -> str:
    """One model's likeliest tokens as bars, the right one with a sign."""
    bars = "".join(_chance(text, float(share), text == right) for text, share in likely)
    return f"<div><h4>{name}</h4><ol>{bars}</ol></div>"


def _chance(text: str, share: float, right: bool) -> str:
    wide = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    label = f'<code class="right">{token(text)} ✓</code>' if right else f"<code>{token(text)}</code>"
    meter = f'<span class="meter"><i style="width:{wide:.1f}%"></i></span>'
    return f"<li>{label}{meter}<span>{percent(share)}</span></li>"


def _footer() -> str:
    """How to read the page."""
    return f"<footer><h2>How to read this</h2>{''.join(f'<p>{sentence}</p>' for sentence in _EXPLANATION)}</footer>\n"

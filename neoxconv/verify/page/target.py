"""One target's part of the page: its findings, figures, limits and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv.verify.page.charts import LAYERED, heat_map, kl_chart, layer_chart
from neoxconv.verify.page.parts import section, table, verdict
from neoxconv.verify.page.svg import largest, number, percent, shown
from neoxconv.verify.page.worst import worst
from neoxconv.verify.report import layer_name
from neoxconv.words import plural

_SHOWN = 8  # findings of a level before the rest is folded
_LEVELS = ("logits", "weights", "tokenizer", "bytes")


def predictions(facts: Mapping[str, Any]) -> str:
    """What was found of a target's predictions, or why they were not compared."""
    if facts.get("failed"):
        why = f'<p class="card">{shown(facts["failed"])}</p>'
        return section("Predictions", "They were not compared.", why)
    charts = f'<div class="pair">{layers(facts["layers"])}{divergence(facts)}</div>'
    parts = (_cards(facts), limits(facts["limits"]), charts, tensors(facts["tensors"]), worst(facts["worst"]))
    return "".join(parts)


def findings(facts: Mapping[str, Any]) -> str:
    """What is wrong by level, where it begins first."""
    if not facts["findings"]:
        return ""
    groups = "".join(f"<h3>{name}</h3>{_listed(each)}" for name, each in grouped(facts) if each)
    return section("Findings", f"{plural(len(facts['findings']), 'finding')}.", f'<div class="card">{groups}</div>')


def grouped(facts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The findings under headings: where it begins, then level by level, a broken layer's before the others'."""
    broken = facts.get("broken") or {"layer": None, "name": ""}
    begin = [each for each in facts["findings"] if each["where"] in ("bisect", broken["name"])]
    groups = [("Where it begins", begin)]
    for level in _LEVELS:
        found = [each for each in facts["findings"] if each["level"] == level and each not in begin]
        groups.append((f"Level {level}", sorted(found, key=lambda each: _order(each["where"], broken["layer"]))))
    return [(name, [f"{each['where']}: {each['what']}" for each in found]) for name, found in groups]


def _order(where: str, broken: int | None) -> tuple[bool, int]:
    """The broken layer's tensors first, then by layer, then what lies outside of the layers."""
    match = LAYERED.fullmatch(where)
    layer = int(match[2]) if match else -1 if "embed_in" in where else None
    return (layer is None or layer != broken), (10**9 if layer is None else layer)


def _listed(found: Sequence[str]) -> str:
    """Findings as a list, of many the first, the rest folded."""
    items = [f"<li>{shown(each)}</li>" for each in found]
    rest = items[_SHOWN:]
    more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return f"<ul>{''.join(items[:_SHOWN])}</ul>{more}"


def _cards(facts: Mapping[str, Any]) -> str:
    """The headline figures."""
    kl, perplexity = facts["kl"], facts["perplexity"]
    figures = (
        (
            "Mean KL, nats",
            number(kl["mean"]),
            f"± {number(kl['error'])}<br>median {number(kl['median'])}<br>largest {number(kl['max'])}",
        ),
        ("99 % of KL, nats", number(kl["p99"]), f"of {plural(len(facts['kl_values']), 'position')}"),
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
    rows = [
        (layer_name(layer["layer"]), number(layer["error"]), number(max(1 - layer["cosine"], 0.0))) for layer in found
    ]
    values = table(("After", "Relative error", "Cosine distance"), rows)
    about = f"Relative error of the residual stream, the largest {number(most)}."
    numbers = f"<details><summary>In numbers</summary>{values}</details>"
    return section("Error per layer", about, f'<div class="card">{layer_chart(found)}{numbers}</div>')


def divergence(facts: Mapping[str, Any]) -> str:
    """How the KL divergence is distributed."""
    values, kl = facts["kl_values"], facts["kl"]
    if not values:
        return section("KL divergence", "No positions were compared.", "")
    chart = kl_chart(values, {name: kl[name] for name in ("mean", "median", "p99")})
    return section("KL divergence", "Positions by their divergence, in nats.", f'<div class="card">{chart}</div>')


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

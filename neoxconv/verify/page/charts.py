"""The charts of a target: the error of each layer and tensor, and how the KL divergence is distributed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from neoxconv.verify.page.svg import (
    BOTTOM,
    LEFT,
    RIGHT,
    LogAxis,
    axis_name,
    largest,
    line,
    number,
    shown,
    steps,
    svg,
    text,
)
from neoxconv.verify.report import layer_name
from neoxconv.words import plural

_SLOT, _GAP = 28.0, 28.0  # the width of a bar that lies outside the logarithmic scale, and how far outside
_TINY = 1e-10  # a smaller KL divergence is rounding
LAYERED = re.compile(r"(|.*?\.)(\d+)\.(.+)")


def layer_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error after each layer on a logarithmic scale; zeros lie on a line of their own below it."""
    found = sorted(layers, key=lambda layer: int(layer["layer"]))
    first, last = int(found[0]["layer"]), int(found[-1]["layer"])
    errors = [float(layer["error"]) for layer in found]
    zeros = any(error <= 0 for error in errors)
    axis = LogAxis.over(errors, BOTTOM - 26 if zeros else BOTTOM, 28)
    wide = (RIGHT - LEFT) / (last - first + 1)
    places = [LEFT + wide * (int(layer["layer"]) - first + 0.5) for layer in found]
    points = [(x, _height(error, axis)) for x, error in zip(places, errors, strict=True)]
    parts = [line(axis.at(tick), number(tick)) for tick in axis.ticks()]
    parts += [line(BOTTOM, "0")] if zeros else []
    parts += _layer_labels(first, last, wide)
    parts += [_joined(errors, points), *(_spot(*pair, wide) for pair in zip(found, points, strict=True))]
    span = f"{layer_name(first)} to {layer_name(last)}"
    label = f"Relative error after {span}, the largest {number(largest(errors))}"
    return svg(label, [*parts, axis_name("layer")])


def _layer_labels(first: int, last: int, wide: float) -> list[str]:
    """The numbers below the layers, not all where they are many; the embedding's name, and none beside it."""
    embedding = first < 0
    near = [layer for layer in steps(first, last, 9) if not embedding or wide * (layer - first) > 26]
    labels = [(first, "emb."), *((layer, str(layer)) for layer in near)] if embedding else [(n, str(n)) for n in near]
    return [text(LEFT + wide * (layer - first + 0.5), BOTTOM + 20, label) for layer, label in labels]


def _height(error: float, axis: LogAxis) -> float:
    """Where an error is drawn: on the scale, below it for zero, above it for what is no finite number."""
    if not math.isfinite(error):
        return 12
    return axis.at(error) if error > 0 else BOTTOM


def _joined(errors: Sequence[float], points: Sequence[tuple[float, float]]) -> str:
    """The line between neighbours that both lie on the scale."""
    pairs = pairwise(zip(errors, points, strict=True))
    lines = (
        f"M{a[0]:.1f},{a[1]:.1f}L{b[0]:.1f},{b[1]:.1f}"
        for (left, a), (right, b) in pairs
        if 0 < left < math.inf and 0 < right < math.inf
    )
    return f'<path class="line" d="{"".join(lines)}"/>'


def _spot(layer: Mapping[str, Any], point: tuple[float, float], wide: float) -> str:
    """A layer's point, hollow for zero and a cross for no finite number, and the column that shows its values."""
    (x, y), error, cosine = point, float(layer["error"]), float(layer["cosine"])
    values = f"{layer_name(int(layer['layer']))}: error {number(error)}, cosine distance {number(max(1 - cosine, 0.0))}"
    kind = "zero" if error <= 0 else "dot"
    sign = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    if not math.isfinite(error):
        sign = f'<path class="odd" d="M{x - 4:.1f},{y - 4}l8,8m0,-8l-8,8"/>'
    column = f'<rect class="hit" x="{x - wide / 2:.1f}" y="0" width="{wide:.1f}" height="{BOTTOM + 6}"/>'
    return f"<g><title>{shown(values)}</title>{column}{sign}</g>"


def kl_chart(values: Sequence[float], marks: Mapping[str, float]) -> str:
    """How many positions have which KL divergence; tiny and not finite values have bars of their own at the sides."""
    odd = sum(not math.isfinite(value) for value in values)
    scaled = [value for value in values if _TINY <= value < math.inf]
    axis = LogAxis.over(scaled, LEFT + _SLOT + _GAP, RIGHT - _SLOT - _GAP if odd else RIGHT)
    bars = [_Bar("below 1e-10", LEFT, _SLOT, len(values) - len(scaled) - odd), *_binned(scaled, axis)]
    bars += [_Bar("not finite", RIGHT - _SLOT, _SLOT, odd)] if odd else []
    words = ", ".join(f"{name} {number(value)}" for name, value in marks.items())
    label = f"KL divergence of {plural(len(values), 'position')}: {words}"
    return svg(label, [*_plotted(bars), *_kl_labels(axis, bool(odd)), *drawn(marks, axis)])


@dataclass(frozen=True)
class _Bar:
    """The values from where to where, as text, its place and width, and how many values there are."""

    label: str
    x: float
    wide: float
    count: int


def _plotted(bars: Sequence[_Bar]) -> list[str]:
    """The bars over the lines of their counts."""
    most = max(each.count for each in bars)
    lines = [line(_raised(count, most), f"{count:,}") for count in steps(0, most, 6)]
    return lines + [_drawn_bar(each, most) for each in bars]


def _kl_labels(axis: LogAxis, odd: bool) -> list[str]:
    """What is written below the bars."""
    ticks = [(LEFT + _SLOT / 2, "≈ 0"), *((axis.at(tick), number(tick)) for tick in axis.ticks())]
    ticks += [(RIGHT - _SLOT / 2, "NaN")] if odd else []
    return [*(text(x, BOTTOM + 20, label) for x, label in ticks), axis_name("KL divergence of a position, in nats")]


def _binned(values: Sequence[float], axis: LogAxis) -> Iterable[_Bar]:
    """The bins of the scale that have values."""
    each = max(4, 16 // (axis.high - axis.low))  # of a decade
    last = each * (axis.high - axis.low) - 1
    counts = Counter(min(max(int((math.log10(value) - axis.low) * each), 0), last) for value in values)
    wide = (axis.end - axis.start) / (last + 1)
    for index, count in sorted(counts.items()):
        ends = " to ".join(number(10.0 ** (axis.low + step / each)) for step in (index, index + 1))
        yield _Bar(ends, axis.start + index * wide, wide, count)


def _raised(count: int, most: int) -> float:
    """Where a bar of `count` ends; even one position can be seen."""
    return BOTTOM - max((BOTTOM - 66) * count / most, 2) if count else BOTTOM


def _drawn_bar(bar: _Bar, most: int) -> str:
    """A bar, the highest being of `most` values, that says what it stands for."""
    y = _raised(bar.count, most)
    place = f'x="{bar.x + 0.5:.1f}" y="{y:.1f}" width="{max(bar.wide - 1, 0.5):.1f}" height="{BOTTOM - y:.1f}"'
    return f'<g><title>{shown(bar.label)}: {plural(bar.count, "position")}</title><rect class="bar" {place}/></g>'


def drawn(marks: Mapping[str, float], axis: LogAxis) -> Iterable[str]:
    """The marks from right to left, each labelled at its left in a row of its own, so that no line crosses a label."""
    places = {name: _reached(value, axis) for name, value in marks.items()}
    for row, name in enumerate(sorted(places, key=lambda name: -places[name])):
        x, y, near = places[name], 14 + 17 * row, places[name] < LEFT + 90
        label = text(x + (5 if near else -5), y, f"{name} {number(marks[name])}", "start" if near else "end")
        yield f'<path class="mark m{list(marks).index(name)}" d="M{x:.1f},{y - 11}V{BOTTOM}"/>{label}'


def _reached(value: float, axis: LogAxis) -> float:
    """Where a value is on the scale or beside it."""
    if not math.isfinite(value):
        return RIGHT - _SLOT / 2
    return axis.at(value) if value >= _TINY else LEFT + _SLOT / 2


def heat_map(tensors: Sequence[Mapping[str, Any]]) -> str:
    """A strip for each kind of tensor with a cell for each layer, dark where the error is large."""
    rows: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for tensor in tensors:
        if match := LAYERED.fullmatch(tensor["name"]):
            rows.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
    if not rows:
        return ""
    layers = sorted({layer for row in rows.values() for layer in row})
    errors = [float(tensor["relative"]) for row in rows.values() for tensor in row.values()]
    powers = [min(math.log10(error), 300.0) for error in errors if 0 < error < math.inf]
    high = max(powers, default=0.0)
    ends = min([*powers, high - 0.6]), high  # errors that hardly differ look alike
    strips = "".join(_strip(kind, row, layers, ends) for (_, kind), row in rows.items())
    legend = (_ramp(*ends) if powers else "") + signs()
    return f'<div class="heat">{strips}{_layer_scale(layers)}</div><p class="legend">{legend}</p>'


def _strip(kind: str, row: Mapping[int, Mapping[str, Any]], layers: Sequence[int], ends: tuple[float, float]) -> str:
    """One kind's row: its name, its cells, its largest error."""
    name = shown(kind.removesuffix(".weight"))
    most = number(largest(float(tensor["relative"]) for tensor in row.values()))
    cells = "".join(_named_cell(row[layer], place, ends) for place, layer in enumerate(layers) if layer in row)
    return f"<span>{name}</span>{_cell_row(len(layers), cells, f'{name}: largest error {most}')}<b>{most}</b>"


def _named_cell(tensor: Mapping[str, Any], place: int, ends: tuple[float, float]) -> str:
    """A tensor's cell, which says what it stands for."""
    error = float(tensor["relative"])
    title = f"{shown(tensor['name'])} ({shown(tensor['encoding'])}): {number(error)}"
    return f"<g><title>{title}</title>{_cell(place, error, ends)}</g>"


def _cell_row(count: int, cells: str, label: str) -> str:
    """Cells side by side, stretched to the width there is."""
    return f'<svg viewBox="0 0 {count} 1" preserveAspectRatio="none" role="img" aria-label="{label}">{cells}</svg>'


def _cell(place: int, error: float, ends: tuple[float, float]) -> str:
    """A cell, in full colour where the error's logarithm is at the upper end; a dash for zero."""
    whole = f'x="{place + 0.05:.2f}" y="0" width=".9" height="1"'
    if not math.isfinite(error):
        return f'<rect class="bad" {whole}/>'
    if error <= 0:
        return f'<rect class="hit" {whole}/><rect class="none" x="{place + 0.2:.2f}" y=".44" width=".6" height=".12"/>'
    share = (math.log10(error) - ends[0]) / (ends[1] - ends[0])
    return f'<rect class="bar" fill-opacity="{0.12 + 0.88 * share:.2f}" {whole}/>'


def _layer_scale(layers: Sequence[int]) -> str:
    """The numbers of the layers below the strips."""
    wanted = set(steps(layers[0], layers[-1], 9))
    places = ((100 * (place + 0.5) / len(layers), layer) for place, layer in enumerate(layers) if layer in wanted)
    numbers = "".join(f'<i style="left:{place:.2f}%">{layer}</i>' for place, layer in places)
    return f'<span>layer</span><div class="scale" aria-hidden="true">{numbers}</div><b>largest</b>'


def _ramp(low: float, high: float) -> str:
    """The colours of the errors between two powers of ten."""
    cells = "".join(_cell(place, 10.0 ** (low + (high - low) * place / 8), (low, high)) for place in range(9))
    first, last = number(10.0**low), number(10.0**high)
    return f"<span>{first} {_cell_row(9, cells, f'logarithmic scale of colours from {first} to {last}')} {last}</span>"


def signs() -> str:
    """The cells that lie outside the colours."""
    keys = (("exactly zero", 0.0), ("not finite", math.nan))
    return "".join(f"<span>{_cell_row(1, _cell(0, error, (0.0, 1.0)), name)} {name}</span>" for name, error in keys)

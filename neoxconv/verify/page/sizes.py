"""The chart that compares targets: the size of each against the KL divergence that it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

from neoxconv.verify.page.svg import LEFT, RIGHT, WIDTH, LogAxis, axis_name, line, number, shown, svg, text
from neoxconv.words import size

_HEIGHT, _BOTTOM, _TOP = 366, 320, 20  # of the chart, and of what is plotted in it
_SIGN, _HIGH = 8.8, 18.0  # a character's width and a label's height, at the larger size that narrow screens have
_LEAST = 1e-9  # a smaller KL divergence is drawn here
_ACROSS = 5  # sizes on the axis, about
_NEAR = 10  # places in which a label rather lies beside the line than nearer to its point
_LEADER = 12.0  # from this distance on a line leads from a point to its label
# Where a label may stand beside its point, the best place first: how far away, and the share of it that lies left.
_PLACES = [(9.0, 5.0, 0.0), (-9.0, 5.0, 1.0), (0.0, -10.0, 0.5), (0.0, 22.0, 0.5)] + [
    (sign * 10.0 * far, 5.0 + turn * 13.0 * far, (1 - sign) / 2)
    for far in (1.0, 1.6, 2.4, 3.4, 4.6, 6.0)
    for sign in (1, -1)
    for turn in (-1, 1)
]


class _Box(NamedTuple):
    """A rectangle on the chart."""

    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: _Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)

    def within(self, other: _Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


class _Point(NamedTuple):
    """A target on the chart with its label; `best` where no other is both as small and as near to the reference."""

    target: Mapping[str, Any]
    label: str
    x: float
    y: float
    best: bool

    @property
    def box(self) -> _Box:
        return _Box(self.x - 6, self.y - 6, self.x + 6, self.y + 6)


@dataclass(frozen=True)
class _Sizes:
    """A linear axis of bytes with room at both ends, whose `step` is a round number of its `unit`."""

    low: float
    high: float
    unit: int
    step: float

    @classmethod
    def over(cls, sizes: Sequence[int]) -> _Sizes:
        room = 0.1 * ((max(sizes) - min(sizes)) or max(sizes))
        low, high = max(min(sizes) - room, 0.0), max(sizes) + room
        unit = next(unit for unit in (1 << 30, 1 << 20, 1 << 10, 1) if max(sizes) >= unit or unit == 1)
        least = (high - low) / unit / _ACROSS
        power = 10.0 ** math.floor(math.log10(least))
        return cls(low, high, unit, next(each * power for each in (1, 2, 5, 10) if each * power >= least))

    def at(self, count: float) -> float:
        return LEFT + (RIGHT - LEFT) * (count - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Places and labels of the round sizes."""
        first, last = (math.floor(end / self.unit / self.step) for end in (self.low, self.high))
        for number_of in range(first + 1, last + 1):
            yield self.at(number_of * self.step * self.unit), number(number_of * self.step)

    @property
    def name(self) -> str:
        return size(self.unit).split()[-1]


def size_chart(targets: Sequence[Mapping[str, Any]]) -> str:
    """Bytes to the right, the mean KL divergence upwards on a logarithmic scale, with its standard error.

    A line joins the targets that no other beats in both; those that are beaten are hollow.
    """
    found = [each for each in targets if each.get("kl") and math.isfinite(each["kl"]["mean"])]
    if not found:
        return ""
    up = LogAxis.over([_kl(each) for each in found], _BOTTOM - 6, _TOP)
    across = _Sizes.over([each["bytes"] for each in found])
    points = _points(found, across, up)
    ticks = [line(up.at(tick), number(tick)) for tick in up.ticks()]
    ticks += [text(x, _BOTTOM + 20, label) for x, label in across.ticks()]
    frontier = " ".join(f"{point.x:.1f},{point.y:.1f}" for point in points if point.best)
    drawn = [f'<polyline class="line" points="{frontier}"/>', *(_drawn(point, up) for point in points)]
    words = ", ".join(f"{point.label} {size(point.target['bytes'])} {number(_kl(point.target))}" for point in points)
    parts = [*ticks, axis_name(f"size of the files, {across.name}", _HEIGHT), *drawn, *_labels(points)]
    return svg(f"Size and mean KL divergence: {words}", parts, _HEIGHT)


def _kl(target: Mapping[str, Any]) -> float:
    """The mean as it is drawn."""
    return max(float(target["kl"]["mean"]), _LEAST)


def _points(targets: Sequence[Mapping[str, Any]], across: _Sizes, up: LogAxis) -> list[_Point]:
    """The targets from left to right, by their types where these tell them apart."""
    types = Counter(each["type"] for each in targets)
    points = []
    for each in sorted(targets, key=lambda target: (target["bytes"], _kl(target))):
        label = each["type"] if types[each["type"]] == 1 else PurePath(each["name"]).stem
        best = not any(_beats(other, each) for other in targets)
        points.append(_Point(each, label, across.at(each["bytes"]), up.at(_kl(each)), best))
    return points


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a target is as small and as near to the reference as another, and better in one of them."""
    ours, theirs = ((each["bytes"], _kl(each)) for each in (one, other))
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]


def _drawn(point: _Point, up: LogAxis) -> str:
    """A target's point with its standard error, which says what it stands for."""
    kl, error = _kl(point.target), float(point.target["kl"]["error"])
    title = f"{point.target['name']}: {size(point.target['bytes'])}, KL {number(kl)} ± {number(error)} nats"
    bar = ""
    if 0 < error < kl:
        bar = f'<path class="error" d="M{point.x:.1f},{up.at(kl - error):.1f}V{up.at(kl + error):.1f}"/>'
    kind = ("dot" if point.best else "zero") + ("" if point.target["passed"] else " wrong")
    spot = f'<circle class="{kind}" cx="{point.x:.1f}" cy="{point.y:.1f}" r="4.5"/>'
    return f"<g><title>{shown(title)}</title>{bar}{spot}</g>"


def _labels(points: Sequence[_Point]) -> Iterator[str]:
    """The points' labels, none over another or a point as long as there is room, and off the line if possible."""
    taken, line_of = [point.box for point in points], list(_along([point for point in points if point.best]))
    for point in points:
        options = [_box(point, place) for place in _PLACES]
        plot = _Box(LEFT + 2, 0, WIDTH, _BOTTOM)
        free = [box for box in options if box.within(plot) and not any(box.hits(other) for other in taken)]
        clear = [box for box in free[:_NEAR] if not any(box.hits(other) for other in line_of)]
        box = (clear or free or options)[0]
        taken.append(box)
        middle, base = (box.left + box.right) / 2, box.bottom - 5
        yield _leader(point, box) + text(middle, base, shown(point.label)).replace("<text", '<text class="label"')


def _along(points: Sequence[_Point]) -> Iterator[_Box]:
    """Small boxes along the line that joins points."""
    for one, other in pairwise(points):
        count = max(1, int(math.hypot(other.x - one.x, other.y - one.y) / 4))
        for step in range(1, count):
            x, y = (a + (b - a) * step / count for a, b in ((one.x, other.x), (one.y, other.y)))
            yield _Box(x - 1, y - 1, x + 1, y + 1)


def _box(point: _Point, place: tuple[float, float, float]) -> _Box:
    """Where a point's label would lie."""
    right, down, share = place
    wide = _SIGN * len(point.label)
    left, base = point.x + right - share * wide, point.y + down
    return _Box(left, base + 5 - _HIGH, left + wide, base + 5)


def _leader(point: _Point, box: _Box) -> str:
    """The line from a point to a label that lies farther away."""
    x = min(max(point.x, box.left), box.right)
    y = min(max(point.y, box.top), box.bottom)
    if math.hypot(x - point.x, y - point.y) < _LEADER:
        return ""
    return f'<path class="leader" d="M{point.x:.1f},{point.y:.1f}L{x:.1f},{y:.1f}"/>'

"""The parts of the page's charts as inline SVG, and how numbers and text are written on the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 480, 286, 58, 460, 240  # of a chart, and of what is plotted in it
_SIGNS = {"\n": "↵", "\t": "⇥"}


def number(value: float, digits: int = 3) -> str:
    """A number for people: 1.16e-3, 0.0812, 12.34, 4e5, ∞, NaN; one digit more from 1 on."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0 or 0.01 <= abs(value) < 9999.5:
        return f"{value + 0.0:.{digits + (abs(value) >= 1)}g}"  # -0.0 + 0.0 is 0.0
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(share: float) -> str:
    """A share as a percentage that says 100 only where it is all, and 0 only where it is none."""
    if not math.isfinite(share):
        return number(share)
    if 0.9985 < share < 1:
        return f"{min(100 * share, 99.999):.3f} %"
    return f"{100 * share:.1f} %" if 0.001 <= share < 1 else f"{number(100 * share)} %"


def shown(text: object) -> str:
    """Text for HTML in which every character can be seen: a return arrow for a newline, codes for the invisible."""
    seen = (_SIGNS.get(sign) or (sign if sign.isprintable() else f"\\u{ord(sign):04x}") for sign in str(text))
    return html.escape("".join(seen))


def largest(values: Iterable[float]) -> float:
    """The largest value, NaN where there is one, 0 where there are none."""
    return max(values, key=lambda value: (math.isnan(value), value), default=0.0)


def steps(first: int, last: int, most: int) -> range:
    """The multiples of 1, 2, 5, 10, 20, ... from `first` to `last`, about `most` of them at the most."""
    least = max((last - first) / most, 1)
    power = 10 ** int(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)
    return range(-(-first // step) * step, last + 1, step)


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from 10**low to 10**high, drawn from one place to another."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> LogAxis:
        """The axis of whole decades that holds all positive finite values."""
        powers = [math.log10(value) for value in values if 0 < value < math.inf] or [-6.0, 0.0]
        low = max(math.floor(min(powers)), -300)  # floats end soon after 1e-300 and 1e300
        return cls(low, max(min(math.ceil(max(powers)), 300), low + 1), start, end)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """The decades, not all where they are many, with 2 and 5 times them where they are few."""
        if self.high - self.low > 2:
            return [10.0**power for power in steps(self.low, self.high, 7)]
        between = [factor * 10.0**power for power in range(self.low, self.high) for factor in (1, 2, 5)]
        return [*between, 10.0**self.high]


def svg(label: str, parts: Iterable[str], height: int = HEIGHT) -> str:
    """A chart, with what it shows in words."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{shown(label)}">{"".join(parts)}</svg>'


def text(x: float, y: float, label: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{label}</text>'


def line(y: float, label: str) -> str:
    """A line across the plot with its label at the left."""
    return f'<path class="rule" d="M{LEFT},{y:.1f}H{RIGHT}"/>' + text(LEFT - 8, y + 4.5, label, "end")


def axis_name(label: str, height: int = HEIGHT) -> str:
    """What the axis below the plot counts."""
    return text((LEFT + RIGHT) / 2, height - 5, label)

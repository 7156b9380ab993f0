"""Types by what they cost: within a number of bytes, each matrix gets the type that keeps predictions nearest.

An error E of a matrix moves predictions by about 1/2 sum over rows r of E[g_r^2] E_r H E_r^T nats. g_r is the gradient
at its outputs and H the second moments of its inputs, with E[|g|^2 x_c^2] / E[|g|^2] as diagonal rather than E[x_c^2].
Costs add up over matrices. A price of a byte is found at which the cheapest choices together fit; what room is left
goes to the best buys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from neoxconv.arch.fold import row_sums
from neoxconv.core.encoding import Context, Encoding, Gradients, Moments, Scaled
from neoxconv.core.layout import Entry
from neoxconv.dtypes import Array, Floats
from neoxconv.errors import PlanError
from neoxconv.quant import ENCODINGS, floats
from neoxconv.quant.feedback.encode import slopes_of
from neoxconv.words import size

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0")
_ROWS = 128  # of a matrix, by which its errors are estimated
_HALVINGS = 100  # of the interval in which the price lies


@dataclass(frozen=True)
class Costs:
    """What a matrix costs as each type: bytes, and nats of KL divergence."""

    entry: Entry
    nats: Mapping[str, float]

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Its bytes as each type."""
        return {name: replace(self.entry, encoding=ENCODINGS[name]).nbytes for name in self.nats}

    def cheapest(self, price: float) -> str:
        """The type with the least sum of nats and of bytes at a price."""
        return min(self.nats, key=lambda name: self.nats[name] + price * self.bytes[name])


@dataclass(frozen=True)
class Chosen:
    """Types by the names of matrices, and the nats of KL divergence that they are predicted to cost."""

    types: Mapping[str, str]
    nats: float

    def encoding(self, entry: Entry) -> Encoding | Scaled:
        """What an entry is stored as: what was chosen for it, else what it has."""
        return ENCODINGS[self.types[entry.name]] if entry.name in self.types else entry.encoding


def costs_of(
    entry: Entry, gradients: Gradients, moments: Moments | None, types: Iterable[str], importance: Floats | None
) -> Costs:
    """What a matrix costs as each of the types that its width allows, of codes that are not chosen together.

    Some rows stand for all. They are at equal distances in what rows weigh, so that each stands for as much.
    """
    tensor = entry.tensor
    square = _weighted(gradients.columns, moments)
    weight = np.cumsum(gradients.rows, dtype=np.float64)
    count = min(_ROWS, tensor.rows)
    numbers = np.searchsorted(weight, (np.arange(count) + 0.5) * (weight[-1] / count)).tolist()
    rows = np.concatenate([floats(tensor.read(number, number + 1), tensor.dtype) for number in numbers])
    found = {}
    for name in types:
        encoding = ENCODINGS[name]
        if tensor.columns % encoding.dtype.block == 0:
            errors = rows - encoding.decode(_encoded(encoding, rows, importance))
            total = row_sums(errors.astype(np.float64) * slopes_of(errors, square))
            found[name] = 0.5 * float(weight[-1]) * sum(total.tolist()) / count
    return Costs(entry, found)


def _weighted(columns: Floats, moments: Moments | None) -> Floats:
    """Second moments with `columns` as diagonal, and the correlations of those given; without such none.

    Raises CheckpointError where moments are damaged.
    """
    if moments is None:
        return np.diag(columns)
    square = moments.read()
    own = np.diag(square)
    scale = np.sqrt(np.divide(columns, own, out=np.zeros_like(columns), where=own > 0))
    square *= scale
    square *= scale[:, None]
    return square


def _encoded(encoding: Encoding, rows: Floats, importance: Floats | None) -> Array:
    """Rows as a type stores them, by the importance of their columns where there is one."""
    searches = encoding.search and importance is not None
    return encoding.search(rows, Context(importance)) if searches else encoding.encode(rows)


def choose_within(costs: Sequence[Costs], budget: int) -> Chosen:
    """The types with the least nats of which the matrices take `budget` bytes at most.

    Raises PlanError where not even the smallest fit.
    """
    least = sum(min(each.bytes.values()) for each in costs)
    if least > budget:
        raise PlanError(
            f"the matrices of the layers take {size(least)} at least, {size(max(0, budget))} are left for them; "
            "give more, or allow smaller types with --types."
        )
    chosen = _at_price(costs, budget)
    left = budget - sum(each.bytes[name] for each, name in zip(costs, chosen, strict=True))
    while better := _best_buy(costs, chosen, left):
        number, name = better
        left -= costs[number].bytes[name] - costs[number].bytes[chosen[number]]
        chosen[number] = name
    pairs = list(zip(costs, chosen, strict=True))
    return Chosen({each.entry.name: name for each, name in pairs}, sum(each.nats[name] for each, name in pairs))


def _at_price(costs: Sequence[Costs], budget: int) -> list[str]:
    """The cheapest types at the lowest price of a byte (halved between powers of ten) at which they fit."""
    low, high = -30.0, 3.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = sum(each.bytes[each.cheapest(10.0**middle)] for each in costs) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return [each.cheapest(10.0**high) for each in costs]


def _best_buy(costs: Sequence[Costs], chosen: Sequence[str], left: int) -> tuple[int, str] | None:
    """The change of one matrix's type that saves most nats a byte within what is left; None where none does."""
    best, found = 0.0, None
    for number, (each, now) in enumerate(zip(costs, chosen, strict=True)):
        for name, nats in each.nats.items():
            more, saved = each.bytes[name] - each.bytes[now], each.nats[now] - nats
            if saved > 0 and more <= left and (more <= 0 or saved / more > best):
                best, found = (saved / more if more > 0 else float("inf")), (number, name)
    return found


def line(chosen: Chosen) -> str:
    """How many matrices got each type, and what is predicted."""
    names = list(chosen.types.values())
    counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    return f"types by what they cost: {counts}; predicted KL divergence {chosen.nats:.3g} nats"

"""Types by what they cost: within a number of bytes, each matrix gets the type that keeps predictions nearest.

An error E of a matrix moves predictions by about 1/2 sum over rows r of E[g_r^2] E_r H E_r^T nats. g_r is the gradient
at its outputs and H the second moments of its inputs, with E[|g|^2 x_c^2] / E[|g|^2] as diagonal rather than E[x_c^2].
Without a calibration that has them it is what matrices of that role cost in other models, for the same relative error.
Costs add up over matrices. A price of a byte is found at which the cheapest choices together fit; what room is left
goes to the best buys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from neoxconv.arch.fold import row_sums
from neoxconv.core.encoding import Context, Encoding, Gradients, Moments, Scaled
from neoxconv.core.layout import Entry
from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError
from neoxconv.quant import ENCODINGS, floats
from neoxconv.quant.feedback.encode import slopes_of
from neoxconv.targets.mixes import GgufTensor
from neoxconv.targets.recipe import Recipe
from neoxconv.words import size

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0")
_ROWS = 128  # of a matrix, by which its errors are estimated
# What the same relative error costs in matrices of other roles, over attn_out: between the geometric means over the
# layers of SmolLM2-135M (Q4_0) and of a gpt-neox model of 8 layers (Q3_K), by their calibrations (docs/calibration.md).
ROLES = {
    "attn_q": 0.5, "attn_k": 0.6, "attn_v": 2.0, "qkv": 2.5, "attn_out": 1.0, "mlp_in": 1.5, "mlp_out": 1.5,
    "embedding": 30.0, "head": 130.0,
}  # fmt: skip
_FIRST = 3.0  # times as much in the first layer, measured there
_HALVINGS = 100  # of the interval in which the price lies
_TINY = 1e-300  # where all weights are zero


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


@dataclass(frozen=True)
class Known:
    """What is known of a matrix: gradients and moments of a calibration, the importance of columns."""

    importance: Floats | None = None
    gradients: Gradients | None = None
    moments: Moments | None = None


def costs_of(entry: Entry, tensor: GgufTensor, known: Known, types: Iterable[str]) -> Costs:
    """What a matrix costs as each of the types that its width allows, of codes that are not chosen together.

    Some rows stand for all. They are at equal distances in what rows weigh, so that each stands for as much.
    """
    weights = known.gradients.rows if known.gradients else np.ones(entry.tensor.rows, np.float32)
    weight = np.cumsum(weights, dtype=np.float64)
    places = (np.arange(count := min(_ROWS, len(weight))) + 0.5) * (weight[-1] / count)
    rows = np.concatenate([
        floats(entry.tensor.read(number, number + 1), entry.tensor.dtype)
        for number in np.searchsorted(weight, places).tolist()
    ])  # fmt: skip
    square = _squares(known)
    scale = 0.5 * float(weight[-1]) / count if known.gradients else _in_other_models(tensor) / square(rows)
    fitting = [name for name in types if entry.tensor.columns % ENCODINGS[name].dtype.block == 0]
    return Costs(entry, {name: scale * square(rows - _rounded(name, rows, known.importance)) for name in fitting})


def _squares(known: Known) -> Callable[[Floats], float]:
    """The sum over rows of E_r H E_r^T, H as much of it as is known.

    Raises CheckpointError where moments are damaged.
    """
    columns = known.gradients.columns if known.gradients else known.importance
    if known.moments is None or known.gradients is None:
        return lambda errors: _summed(errors, errors if columns is None else errors * columns)
    square = known.moments.read()
    own = np.diag(square)
    scale = np.sqrt(np.divide(known.gradients.columns, own, out=np.zeros_like(own), where=own > 0))
    square *= scale
    square *= scale[:, None]
    return lambda errors: _summed(errors, slopes_of(errors, square))


def _summed(left: Floats, right: Floats) -> float:
    """The sum of products, in a fixed order; at least a little, so that it can divide."""
    return float(max(sum(row_sums(left.astype(np.float64) * right).tolist()), _TINY))


def _in_other_models(tensor: GgufTensor) -> float:
    """What errors as large as the weights would cost in a matrix, by its role and place."""
    both = ROLES["head"] if tensor.tied else 0.0
    return (ROLES[tensor.role] + both) * (_FIRST if tensor.layer == 0 else 1.0)


def _rounded(name: str, rows: Floats, importance: Floats | None) -> Floats:
    """Rows as they are read back from a type, by the importance of their columns where there is one."""
    encoding = ENCODINGS[name]
    if encoding.search is None or importance is None:
        return encoding.decode(encoding.encode(rows))
    return encoding.decode(encoding.search(rows, Context(importance)))


def choose_within(costs: Sequence[Costs], budget: int) -> Chosen:
    """The types with the least nats of which the matrices take `budget` bytes at most.

    Raises PlanError where not even the smallest fit.
    """
    least = sum(min(each.bytes.values()) for each in costs)
    if least > budget:
        raise PlanError(
            f"the matrices take {size(least)} at least, {size(max(0, budget))} are left for them; "
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


def line(chosen: Chosen, recipe: Recipe) -> str:
    """How many matrices got each type, by what, and what is predicted where a calibration can."""
    names = list(chosen.types.values())
    counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    if recipe.calibration:
        return f"types by what they cost: {counts}; predicted KL divergence {chosen.nats:.3g} nats"
    by = "the importance matrix" if recipe.imatrix else "weights alone"
    return f"types by {by} and what roles cost in other models: {counts}; a calibration (--gradients) would know better"

"""How much predictions depend on what each matrix puts out: the mean squares of gradients, by a streamed backward pass.

g is the gradient of -log p(label) at a matrix's output, the label drawn from the model's own predictions, and x its
input. An error E of the matrix then moves predictions by about 1/2 E[(g^T E x)^2] nats: E[g g^T] is the Fisher
information. Kept are its diagonals, E[g_r^2] by row and E[|g|^2 x_c^2] by column. The second is not E[|g|^2] E[x_c^2]:
a sequence's first token has the largest inputs and predictions hardly depend on them.

The streams before every layer are kept; layer after layer, the last first, is run once more and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neoxconv.core.encoding import Gradients
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Floats, Numbers
from neoxconv.verify.logits.outputs import Halves
from neoxconv.verify.logits.stream import Side, StreamedRank, multipliers, side

_SEED = 7  # of the labels
_TINY = 1e-300  # so that gradients that are all zero are nothing, not nan


class _Product(torch.autograd.Function):
    """x [..., columns] times rows of a streamed weight; its gradient reads the weight once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: _Traced, name: str, start: int, stop: int | None) -> Tensor:
        ctx.told = rank, name, start, stop
        ctx.save_for_backward(x)
        return StreamedRank.linear(rank, x, name, start, stop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        rank, name, start, stop = ctx.told
        rank.seen(name + ".weight", gradient, *ctx.saved_tensors)
        tensor = rank.part(name, start, stop)
        result, at = torch.zeros(*gradient.shape[:-1], tensor.columns, device=gradient.device), 0
        for weight in rank.slabs(tensor):
            result += gradient[..., at : at + len(weight)] @ weight
            at += len(weight)
        return result, None, None, None, None


@dataclass(frozen=True)
class _Traced(StreamedRank):
    """A rank whose products can be differentiated."""

    seen: Callable[[str, Tensor, Tensor], None] = lambda name, gradient, x: None

    def linear(self, x: Tensor, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        result: Tensor = _Product.apply(x, self, name, start, stop)  # type: ignore[no-untyped-call]
        return result


class _Sums:
    """Sums over tokens, by the unified name of a matrix: of g_r^2 [rows], and of |g|^2 x_c^2 [columns]."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def add(self, name: str, squares: Tensor, x: Tensor) -> None:
        """Add squares of gradients [..., rows] and inputs [..., columns] of the same tokens."""
        squares, x = squares.flatten(0, -2), x.flatten(0, -2)
        columns = squares.sum(1) @ x.square()
        self.add_up(name, squares.sum(0, dtype=torch.float64), columns.double())

    def add_up(self, name: str, rows: Tensor, columns: Tensor) -> None:
        """Add sums."""
        self.rows[name] = self.rows.get(name, 0) + rows
        self.columns[name] = self.columns.get(name, 0) + columns

    def means(self, name: str, tokens: int) -> Gradients:
        """What the sums over so many tokens say of a matrix."""
        rows, columns = self.rows[name], self.columns[name]
        found = rows / tokens, columns / rows.sum().clamp(min=_TINY)
        return Gradients(*(values.float().cpu().numpy() for values in found))


def squares_of_gradients(
    checkpoint: Checkpoint,
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
    outputs: Callable[[str, Floats], None] | None = None,
) -> dict[str, Gradients]:
    """By the unified name of each matrix of the layers, of the embedding and of the head (a tied one too), over tokens
    [batch, time]: the mean squares of gradients. `progress` is told of every layer, forwards and back.

    For the embedding x is the token itself: row r counts where it is looked up, column c is one of the stream.
    `outputs` is told the second moments of gradients [rows, rows] at each matrix of the layers (outputs.py).
    """
    sums, halves = _Sums(), Halves()
    ((head, embedding),) = checkpoint.architecture.tied_head.items()
    linear = {weight.unified for _, weight in checkpoint.architecture.names(checkpoint.config) if weight.linear}

    def seen(name: str, gradient: Tensor, x: Tensor) -> None:
        if name in linear:
            sums.add(name, gradient.square(), x)
            if outputs:
                halves.add(name, gradient)

    with multipliers() as pool:
        ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(device)
        plain = side(checkpoint, pool, merged=True, device=device)
        ranks: list[StreamedRank] = [
            _Traced(rank.tensors, rank.device, rank.pool, rank.progress, seen=seen) for rank in plain.ranks
        ]
        model = replace(plain, ranks=ranks)
        with torch.no_grad():
            streams = [plain.embed(ids)]
            for number in range(checkpoint.config.layers):
                streams.append(plain.layer(number, streams[-1]))
                progress(1)
        gradients = _of_labels(model, streams.pop(), partial(sums.add, head))
        for number in reversed(range(checkpoint.config.layers)):
            gradients = _back(partial(model.layer, number), streams.pop(), gradients)
            if outputs:
                for name in list(halves.sums):
                    outputs(name, halves.take(name))
            progress(1)
    squares = gradients[0].flatten(0, 1).double().square()
    rows = torch.zeros(checkpoint.config.rows, dtype=squares.dtype, device=device)
    sums.add_up(embedding, rows.index_add_(0, ids.flatten(), squares.sum(1)), squares.sum(0))
    return {name: sums.means(name, tokens.size) for name in sums.rows}


def _of_labels(model: Side, streams: Sequence[Tensor], head: Callable[[Tensor, Tensor], None]) -> list[Tensor]:
    """The gradients of -log p(label), summed over tokens, at the streams after the last layer; sequence by sequence.

    `head` is told their mean squares at the logits [1, time, rows] and what the head is multiplied with.
    """
    chance = torch.Generator().manual_seed(_SEED)
    rows = [_of_sequence(model, [x[i : i + 1] for x in streams], chance, head) for i in range(len(streams[0]))]
    return [torch.cat(found) for found in zip(*rows, strict=True)]


def _of_sequence(
    model: Side, streams: Sequence[Tensor], chance: torch.Generator, head: Callable[[Tensor, Tensor], None]
) -> list[Tensor]:
    """The same for one sequence. The gradient at a word's logit is p, less 1 for the label: in the mean p (1 - p)."""
    before = [x.detach().requires_grad_() for x in streams]
    with torch.enable_grad():
        normed = model.final(before)
        predicted = model.logits(normed, 0, model.config.rows).log_softmax(-1)
        flat = predicted.flatten(0, -2)
        chances = flat.detach().exp()
        labels = torch.multinomial(chances.cpu(), 1, generator=chance).to(flat.device)
        (-flat.gather(1, labels).sum()).backward()  # type: ignore[no-untyped-call]
    head(chances * (1 - chances), normed[0].detach().flatten(0, -2))
    return [_gradient(x) for x in before]


def _back(
    layer: Callable[[list[Tensor]], list[Tensor]], streams: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients at the streams before a layer, of those after it."""
    before = [x.detach().requires_grad_() for x in streams]
    with torch.enable_grad():
        after = layer(before)
        torch.autograd.backward(after, list(gradients))
    return [_gradient(x) for x in before]


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad

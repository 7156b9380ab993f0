"""How much predictions depend on what each matrix puts out: the mean squares of gradients, by a streamed backward pass.

g is the gradient of -log p(label) at a matrix's output, the label drawn from the model's own predictions. Then E[g g^T]
is the Fisher information, and an error E of the matrix moves predictions by about 1/2 tr(E[g g^T] E H E^T) nats, H the
second moments of its inputs. Here E[g g^T] is taken as its mean diagonal times the identity.

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

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.verify.logits.stream import Side, StreamedRank, multipliers, side

_SEED = 7  # of the labels


class _Product(torch.autograd.Function):
    """x [..., columns] times rows of a streamed weight; its gradient reads the weight once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: _Traced, name: str, start: int, stop: int | None) -> Tensor:
        ctx.told = rank, name, start, stop
        return StreamedRank.linear(rank, x, name, start, stop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        rank, name, start, stop = ctx.told
        rank.seen(name + ".weight", gradient)
        tensor = rank.part(name, start, stop)
        result, at = torch.zeros(*gradient.shape[:-1], tensor.columns, device=gradient.device), 0
        for weight in rank.slabs(tensor):
            result += gradient[..., at : at + len(weight)] @ weight
            at += len(weight)
        return result, None, None, None, None


@dataclass(frozen=True)
class _Traced(StreamedRank):
    """A rank whose products can be differentiated."""

    seen: Callable[[str, Tensor], None] = lambda name, gradient: None

    def linear(self, x: Tensor, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        result: Tensor = _Product.apply(x, self, name, start, stop)  # type: ignore[no-untyped-call]
        return result


def squares_of_gradients(
    checkpoint: Checkpoint,
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """By the unified name of each matrix in the layers: E[g^2], the mean over tokens [batch, time] and outputs.

    `progress` is told of every layer, forwards and back.
    """
    found: dict[str, float] = {}

    def seen(name: str, gradient: Tensor) -> None:
        found[name] = float(gradient.double().square().mean())

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
        gradients = _of_labels(model, streams.pop())
        for number in reversed(range(checkpoint.config.layers)):
            gradients = _back(partial(model.layer, number), streams.pop(), gradients)
            progress(1)
    names = {weight.unified for _, weight in checkpoint.architecture.names(checkpoint.config) if weight.linear}
    return {name: value for name, value in found.items() if name in names}


def _of_labels(model: Side, streams: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of -log p(label), summed over tokens, at the streams after the last layer; sequence by sequence."""
    chance = torch.Generator().manual_seed(_SEED)
    rows = [_of_sequence(model, [x[i : i + 1] for x in streams], chance) for i in range(len(streams[0]))]
    return [torch.cat(found) for found in zip(*rows, strict=True)]


def _of_sequence(model: Side, streams: Sequence[Tensor], chance: torch.Generator) -> list[Tensor]:
    """The same for one sequence."""
    before = [x.detach().requires_grad_() for x in streams]
    with torch.enable_grad():
        predicted = model.logits(model.final(before), 0, model.config.rows).log_softmax(-1)
        flat = predicted.flatten(0, -2)
        labels = torch.multinomial(flat.detach().exp().cpu(), 1, generator=chance).to(flat.device)
        (-flat.gather(1, labels).sum()).backward()  # type: ignore[no-untyped-call]
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

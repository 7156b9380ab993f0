"""What the forward pass of every architecture is given and gives. Shapes are [batch, time, hidden], all in float32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from neoxconv.core.model import Architecture
from neoxconv.core.table import ModelConfig

Streams = list[Tensor]  # one that all ranks share, or one for each rank


class Rank(Protocol):
    """One rank's tensors; `name` is unified and without .weight or .bias."""

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of a weight, by their numbers."""

    def vector(self, name: str) -> Tensor:
        """A whole tensor of one dimension, by its full name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""

    def linear(self, x: Tensor, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """x [..., columns] times rows `start` to `stop` of a weight."""


class Forward(Protocol):
    """An architecture's module with its forward pass, in four steps. A merged model is a single rank."""

    def embed(self, ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
        """The streams before the first layer, of tokens [batch, time]."""

    def block(self, ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
        """The streams after a layer."""

    def final(self, ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
        """What each rank multiplies the head with."""

    def logits(self, ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
        """The logits [batch, time, stop - start] of the vocabulary's rows `start` to `stop`."""


def forward_of(architecture: Architecture) -> Forward:
    """The module with an architecture's forward pass, imported here because it needs torch."""
    return cast(Forward, import_module(architecture.forward))


def across_stages(streams: Streams) -> Streams:
    """The streams after they were sent to the next pipeline stage.

    DeepSpeed sends [time, batch, hidden] in equal parts, one from each rank: with streams of their own, the ranks then
    go on with one that is put together of these parts. (Seen in logits recorded in training: without it ours are 1e-3
    off, with it 1e-6.)
    """
    if len(streams) == 1:
        return streams
    flat = [x.transpose(0, 1).reshape(-1).chunk(len(streams))[rank] for rank, x in enumerate(streams)]
    batch, time, hidden = streams[0].shape
    return [torch.cat(flat).reshape(time, batch, hidden).transpose(0, 1)] * len(streams)


def looked_up(ranks: Sequence[Rank], name: str, tokens: Tensor, config: ModelConfig) -> Tensor:
    """The rows of an embedding for tokens [batch, time], each from the rank that holds it."""
    part = config.rows // len(ranks)
    numbers, places = torch.unique(tokens, return_inverse=True)
    rows = [ranks[n // part].rows(name, [n % part]) for n in numbers.tolist()]
    return torch.cat(rows)[places]


def layer_norm(rank: Rank, x: Tensor, name: str, config: ModelConfig) -> Tensor:
    """A layer norm with gain and bias."""
    gain, bias = rank.vector(name + ".weight"), rank.vector(name + ".bias")
    return functional.layer_norm(x, (config.hidden,), gain, bias, config.norm_eps)


def gelu_mlp(rank: Rank, x: Tensor, up: str, down: str, config: ModelConfig) -> Tensor:
    """A rank's part of an ungated MLP, without the output's bias."""
    inner = rank.linear(x, up) + rank.vector(up + ".bias")
    inner = functional.gelu(inner, approximate="tanh" if config.activation == "gelu_tanh" else "none")
    return rank.linear(inner, down)


def rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """The first dimensions of every head [batch, head, time, size], turned by angles that grow with time."""
    dims = config.rotary_dims
    powers = torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), 1.0 / config.rotary_base**powers)
    angles = torch.cat((angles, angles), dim=-1)
    turned, rest = x[..., :dims], x[..., dims:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((turned, rest), dim=-1)


def windowed(time: int, window: int, device: torch.device) -> Tensor:
    """Which tokens [time, time] a token attends to: the last `window`, itself included."""
    distance = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)
    return (distance >= 0) & (distance < window)


def vocabulary(ranks: Sequence[Rank], normed: Streams, name: str, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words by the head `name`; split by columns it is a sum."""
    rows, columns = ranks[0].shape(name)
    if columns < config.hidden:
        parts = [x[..., r * columns : (r + 1) * columns] for r, x in enumerate(normed)]
        return torch.stack([rank.linear(x, name, start, stop) for rank, x in zip(ranks, parts, strict=True)]).sum(0)
    bands = [
        rank.linear(x, name, max(start - r * rows, 0), min(stop - r * rows, rows))
        for r, (rank, x) in enumerate(zip(ranks, normed, strict=True))
        if start < (r + 1) * rows and stop > r * rows
    ]
    return torch.cat(bands, dim=-1)

"""The forward pass of GPT-J. Shapes are [batch, time, hidden]; all arithmetic is float32.

y = norm(x);  x + attention(y) + mlp(y)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from neoxconv.arch.forward import Rank, Streams, gelu_mlp, layer_norm, looked_up, rotated, vocabulary
from neoxconv.arch.gptj.names import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, UP, K, Q, V
from neoxconv.arch.gptj.rotation import halves_first
from neoxconv.core.table import ModelConfig


def embed(ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
    """The stream before the first layer: tokens [batch, time] looked up."""
    return [looked_up(ranks, EMBEDDING, tokens, config)]


def block(ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
    """The stream after a layer. Only gpt-neox has ranks, which does not train this family."""
    (rank,), (x,) = ranks, streams
    names = {name: name.format(i=layer) for name in (NORM1, Q, K, V, DENSE, UP, DOWN)}
    y = layer_norm(rank, x, names[NORM1], config)
    mlp = gelu_mlp(rank, y, names[UP], names[DOWN], config) + rank.vector(names[DOWN] + ".bias")
    return [x + _attention(rank, y, names, config) + mlp]


def _attention(rank: Rank, x: Tensor, names: dict[str, str], config: ModelConfig) -> Tensor:
    """All heads' output; none of the four matrices has a bias."""

    def heads(name: str) -> Tensor:
        return rank.linear(x, names[name]).reshape(*x.shape[:2], -1, config.head_size).transpose(1, 2)

    order = torch.from_numpy(halves_first(config)).to(x.device)
    query, key = (rotated(heads(name)[..., order], config) for name in (Q, K))
    mixed = functional.scaled_dot_product_attention(query, key, heads(V), is_causal=True)
    return rank.linear(mixed.transpose(1, 2).flatten(2), names[DENSE])


def final(ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
    """What the head is multiplied with."""
    return [layer_norm(ranks[0], streams[0], NORM, config)]


def logits(ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words; a tied head has its bias too."""
    words = vocabulary(ranks, normed, EMBEDDING if config.tied else HEAD, start, stop, config)
    return words + ranks[0].vector(HEAD + ".bias")[start:stop]

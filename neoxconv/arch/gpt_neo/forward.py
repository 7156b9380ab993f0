"""The forward pass of GPT-Neo. Shapes are [batch, time, hidden]; all arithmetic is float32.

x + attention(norm1(x)), then x + mlp(norm2(x)); scores are not divided by the root of a head's size
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from neoxconv.arch.forward import Rank, Streams, gelu_mlp, layer_norm, looked_up, vocabulary, windowed
from neoxconv.arch.gpt_neo.names import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, NORM2, POSITIONS, UP, K, Q, V
from neoxconv.core.table import ModelConfig


def embed(ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
    """The stream before the first layer: tokens [batch, time] and their places looked up, and added."""
    return [looked_up(ranks, EMBEDDING, tokens, config) + ranks[0].rows(POSITIONS, range(tokens.shape[1]))]


def block(ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
    """The stream after a layer. Only gpt-neox has ranks, which does not train this family."""
    (rank,), (x,) = ranks, streams
    window = None if layer in config.unwindowed else config.window
    names = {name: name.format(i=layer) for name in (NORM1, NORM2, Q, K, V, DENSE, UP, DOWN)}
    x = x + _attention(rank, layer_norm(rank, x, names[NORM1], config), names, window, config)
    y = layer_norm(rank, x, names[NORM2], config)
    mlp = gelu_mlp(rank, y, names[UP], names[DOWN], config) + rank.vector(names[DOWN] + ".bias")
    return [x + mlp]


def _attention(rank: Rank, x: Tensor, names: dict[str, str], window: int | None, config: ModelConfig) -> Tensor:
    """All heads' output; queries, keys and values have no bias."""
    query, key, value = (
        rank.linear(x, names[name]).reshape(*x.shape[:2], -1, config.head_size).transpose(1, 2) for name in (Q, K, V)
    )
    mask = windowed(x.shape[1], window or x.shape[1], x.device)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    return rank.linear(mixed.transpose(1, 2).flatten(2), names[DENSE]) + rank.vector(names[DENSE] + ".bias")


def final(ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
    """What the head is multiplied with."""
    return [layer_norm(ranks[0], streams[0], NORM, config)]


def logits(ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words."""
    return vocabulary(ranks, normed, EMBEDDING if config.tied else HEAD, start, stop, config)

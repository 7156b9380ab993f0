"""The forward pass of Llama as it was trained: every rank its own norms, heads and part of the MLP.

A merged model is a single rank. Shapes are [batch, time, hidden]; all arithmetic is float32. The residual is serial:
x_r + sum over ranks of attentions + bias_r, then the same with the MLP, on a stream of each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from neoxconv.arch.forward import Rank, Streams, looked_up, rotated, vocabulary, windowed
from neoxconv.arch.llama.weights import DENSE, DOWN, EMBEDDING, GATE, HEAD, NORM, NORM1, NORM2, UP, K, Q, V
from neoxconv.core.table import ModelConfig


def embed(ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
    """The streams before the first layer: tokens [batch, time] looked up where their rows are."""
    return [looked_up(ranks, EMBEDDING, tokens, config)] * len(ranks)


def block(ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
    """The streams after a layer."""
    names = {name: name.format(i=layer) for name in (NORM1, NORM2, Q, K, V, DENSE, GATE, UP, DOWN)}
    pairs = list(zip(ranks, streams, strict=True))
    total = sum(_attention(rank, _normalise(rank, x, names[NORM1], config), names, config) for rank, x in pairs)
    pairs = [(rank, x + total + _bias(rank, names[DENSE], config.attention_bias)) for rank, x in pairs]
    total = sum(_mlp(rank, _normalise(rank, x, names[NORM2], config), names, config) for rank, x in pairs)
    return [x + total + _bias(rank, names[DOWN], config.mlp_bias) for rank, x in pairs]


def _normalise(rank: Rank, x: Tensor, name: str, config: ModelConfig) -> Tensor:
    """RMSNorm, its epsilon inside or outside of the root."""
    gain, square = rank.vector(name + ".weight"), x.square().mean(-1, keepdim=True)
    if config.norm == "rmsnorm":
        return x * torch.rsqrt(square + config.norm_eps) * gain
    return x / (square.sqrt() + config.norm_eps) * gain


def _bias(rank: Rank, name: str, there: bool) -> Tensor | float:
    """A bias, by the name of its weight with a point at the end; 0 where the model has none."""
    return rank.vector(name + "bias") if there else 0.0


def _attention(rank: Rank, x: Tensor, names: dict[str, str], config: ModelConfig) -> Tensor:
    """A rank's heads, and its part of the sum that the output is, without the bias."""

    def heads(name: str) -> Tensor:
        mixed = rank.linear(x, name[:-1]) + _bias(rank, name, config.attention_bias)
        return mixed.reshape(*x.shape[:2], -1, config.head_size).transpose(1, 2)  # batch, head, time, size

    query, key = rotated(heads(names[Q]), config), rotated(heads(names[K]), config)
    groups = config.heads // config.key_heads
    key, value = (part.repeat_interleave(groups, 1) for part in (key, heads(names[V])))
    mask = windowed(x.shape[1], config.window, x.device) if config.window else None
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return rank.linear(mixed.transpose(1, 2).flatten(2), names[DENSE][:-1])


def _mlp(rank: Rank, x: Tensor, names: dict[str, str], config: ModelConfig) -> Tensor:
    """A rank's part of the MLP, without the output's bias."""
    gate, up = (rank.linear(x, names[name][:-1]) + _bias(rank, names[name], config.mlp_bias) for name in (GATE, UP))
    return rank.linear(functional.silu(gate) * up, names[DOWN][:-1])


def final(ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
    """What each rank multiplies the head with."""
    return [_normalise(rank, x, NORM, config) for rank, x in zip(ranks, streams, strict=True)]


def logits(ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words."""
    return vocabulary(ranks, normed, EMBEDDING if config.tied else HEAD, start, stop, config)

"""The forward pass of GPT-NeoX as it was trained: every rank its own norms, heads and part of the MLP.

A merged model is a single rank. Nothing here joins weights, so it shows what a join has changed. Shapes are
[batch, time, hidden]; all arithmetic is float32, as in gpt-neox's evaluation in that type.

    parallel residual   x + sum over ranks of (attention_r(norm1_r(x)) + mlp_r(norm2_r(x))), biases of each rank added
    serial residual     every rank has a stream of its own: x_r + sum of attentions + bias_r, then the same with the MLP
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from neoxconv.arch.forward import Rank, Streams, gelu_mlp, layer_norm, looked_up, rotated, vocabulary
from neoxconv.arch.gpt_neox.weights import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, NORM2, QKV, UP, L
from neoxconv.core.table import ModelConfig


def embed(ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
    """The streams before the first layer: tokens [batch, time] looked up where their rows are."""
    return [looked_up(ranks, EMBEDDING, tokens, config)] * (1 if config.parallel_residual else len(ranks))


def block(ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
    """The streams after a layer."""
    at = L.format(i=layer)
    norm1, norm2 = NORM1.format(i=layer), NORM2.format(i=layer)
    up, down = (at + UP)[:-1], (at + DOWN)[:-1]
    pairs = list(zip(ranks, streams * (len(ranks) // len(streams)), strict=True))
    attended = [attention(rank, layer_norm(rank, x, norm1, config), at, config) for rank, x in pairs]
    if config.parallel_residual:
        mlps = [gelu_mlp(rank, layer_norm(rank, x, norm2, config), up, down, config) for rank, x in pairs]
        biases = [rank.vector(at + name + "bias") for rank in ranks for name in (DENSE, DOWN)]
        return [streams[0] + sum((*attended, *mlps, *biases))]
    total = sum(attended)
    pairs = [(rank, x + total + rank.vector(at + DENSE + "bias")) for rank, x in pairs]
    total = sum(gelu_mlp(rank, layer_norm(rank, x, norm2, config), up, down, config) for rank, x in pairs)
    return [x + total + rank.vector(at + DOWN + "bias") for rank, x in pairs]


def attention(rank: Rank, x: Tensor, at: str, config: ModelConfig) -> Tensor:
    """A rank's heads, and its part of the sum that the output is, without the bias."""
    name = at + QKV
    mixed = rank.linear(x, name[:-1]) + rank.vector(name + "bias")
    heads = mixed.reshape(*x.shape[:2], -1, 3, config.head_size).permute(3, 0, 2, 1, 4)  # qkv, batch, head, time, size
    query, key = (rotated(part, config) for part in (heads[0], heads[1]))
    mixed = functional.scaled_dot_product_attention(query, key, heads[2], is_causal=True)
    return rank.linear(mixed.transpose(1, 2).flatten(2), (at + DENSE)[:-1])


def final(ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
    """What each rank multiplies the head with."""
    pairs = zip(ranks, streams * (len(ranks) // len(streams)), strict=True)
    return [layer_norm(rank, x, NORM, config) for rank, x in pairs]


def logits(ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words."""
    return vocabulary(ranks, normed, EMBEDDING if config.tied else HEAD, start, stop, config)

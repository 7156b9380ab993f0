"""The forward pass of GPT-2 as gpt-neox trains it: every rank its own norms, positions, heads and part of the MLP.

A merged model is a single rank. Shapes are [batch, time, hidden]; all arithmetic is float32. The residual is serial:
x_r + sum over ranks of attentions + bias_r, then the same with the MLP, on a stream of each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from neoxconv.arch.forward import Rank, Streams, gelu_mlp, layer_norm, looked_up, vocabulary
from neoxconv.arch.gpt2.weights import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, NORM2, POSITIONS, QKV, UP
from neoxconv.core.table import ModelConfig


def embed(ranks: Sequence[Rank], tokens: Tensor, config: ModelConfig) -> Streams:
    """The streams before the first layer: tokens [batch, time] and their places looked up, and added."""
    words = looked_up(ranks, EMBEDDING, tokens, config)
    if config.positions == "alibi":
        return [words] * len(ranks)
    return [words + rank.rows(POSITIONS, range(tokens.shape[1])) for rank in ranks]


def block(ranks: Sequence[Rank], layer: int, streams: Streams, config: ModelConfig) -> Streams:
    """The streams after a layer."""
    norm1, norm2, dense, up, down = (name.format(i=layer) for name in (NORM1, NORM2, DENSE, UP, DOWN))
    pairs = list(zip(ranks, streams, strict=True))
    normed = [layer_norm(rank, x, norm1, config) for rank, x in pairs]
    part = config.heads // len(ranks)
    total = sum(
        _attention(rank, x, layer, r * part, config) for r, (rank, x) in enumerate(zip(ranks, normed, strict=True))
    )
    pairs = [(rank, x + total + rank.vector(dense + "bias")) for rank, x in pairs]
    total = sum(gelu_mlp(rank, layer_norm(rank, x, norm2, config), up[:-1], down[:-1], config) for rank, x in pairs)
    return [x + total + rank.vector(down + "bias") for rank, x in pairs]


def _attention(rank: Rank, x: Tensor, layer: int, first: int, config: ModelConfig) -> Tensor:
    """A rank's heads, the model's from `first` on, and its part of the sum that the output is, without the bias."""
    name = QKV.format(i=layer)
    mixed = rank.linear(x, name[:-1]) + rank.vector(name + "bias")
    heads = mixed.reshape(*x.shape[:2], 3, -1, config.head_size).permute(2, 0, 3, 1, 4)  # qkv, batch, head, time, size
    mask = _alibi(x, config)[first : first + heads.shape[2]] if config.positions == "alibi" else None
    attended = functional.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], attn_mask=mask, is_causal=mask is None
    )
    return rank.linear(attended.transpose(1, 2).flatten(2), DENSE.format(i=layer)[:-1])


def _alibi(x: Tensor, config: ModelConfig) -> Tensor:
    """What ALiBi adds to the scores [head, time, time]: less for tokens further back, nothing reaches later ones.

    The slopes of n heads are 2 ^ (-8 i / n); where n is no power of 2, those of the next lower one and then every
    second of the next higher one (gpt-neox's megatron/model/positional_embeddings.py).
    """
    lower = 1 << (config.heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    slopes += [2 ** (-4 * i / lower) for i in range(1, 2 * (config.heads - lower), 2)]
    places = torch.arange(x.shape[1], device=x.device)
    distance = places[:, None] - places
    bias = -torch.tensor(slopes, device=x.device)[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf"))


def final(ranks: Sequence[Rank], streams: Streams, config: ModelConfig) -> Streams:
    """What each rank multiplies the head with."""
    return [layer_norm(rank, x, NORM, config) for rank, x in zip(ranks, streams, strict=True)]


def logits(ranks: Sequence[Rank], normed: Streams, start: int, stop: int, config: ModelConfig) -> Tensor:
    """The logits [batch, time, stop - start] of these words."""
    return vocabulary(ranks, normed, EMBEDDING if config.tied else HEAD, start, stop, config)

"""GPT-Neo written as GPT-2: the same function of as many tokens as its windows have.

scores are not divided by the root of a head's size    the queries' rows are multiplied with it
queries, keys and values apart, without biases         one below the other, a bias of zeros
windows                                                none: so the context is no longer than they are
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from neoxconv.arch.gpt2 import weights as gpt2
from neoxconv.arch.gpt_neo.names import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, NORM2, POSITIONS, UP, K, Q, V
from neoxconv.arch.joins import stacked
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, alike, band, computed, zeros
from neoxconv.dtypes import Floats

_RENAMED = (  # modules, without a point at the end
    (EMBEDDING, gpt2.EMBEDDING),
    (POSITIONS, gpt2.POSITIONS),
    (NORM1, gpt2.NORM1),
    (DENSE, gpt2.DENSE[:-1]),
    (NORM2, gpt2.NORM2),
    (UP, gpt2.UP[:-1]),
    (DOWN, gpt2.DOWN[:-1]),
    (NORM, gpt2.NORM),
    (HEAD, gpt2.HEAD),
)


def shorter(config: ModelConfig) -> str | None:
    """Up to where the function is the same; None where windows never matter."""
    if config.window is None or config.window >= config.context:
        return None
    return f"is the same for at most {config.window} tokens"


def as_gpt2(checkpoint: Checkpoint) -> Checkpoint:
    """The same function of as many tokens as a window has, as a GPT-2 checkpoint."""
    ours = checkpoint.config
    context = min(ours.context, ours.window or ours.context)
    config = replace(
        ours, context=context, window=None, unwindowed=(), scaled_scores=True, attention_bias=True
    )  # fmt: skip
    tensors = checkpoint.tensors
    made = {name: tensors[old] for old, name in _renamed(config) if old in tensors}
    made[gpt2.POSITIONS + ".weight"] = band(tensors[POSITIONS + ".weight"], 0, context)
    for layer in range(config.layers):
        made |= _fused(tensors, layer, config)
    ordered = {weight.unified: made[weight.unified] for _, weight in gpt2.GPT2.names(config)}
    return replace(checkpoint, architecture=gpt2.GPT2, config=config, tensors=ordered, ranks=[ordered])


def _renamed(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Each tensor's name here and in GPT-2, of those that only have another name there."""
    for old, new in _RENAMED:
        for layer in range(config.layers if "{i}" in old else 1):
            for part in (".weight", ".bias"):
                yield old.format(i=layer) + part, new.format(i=layer) + part


def _fused(tensors: dict[str, LazyTensor], layer: int, config: ModelConfig) -> dict[str, LazyTensor]:
    """A layer's queries, keys and values as one tensor, and their bias."""
    query, key, value = (tensors[name.format(i=layer) + ".weight"] for name in (Q, K, V))
    larger = _times(query, float(config.head_size) ** 0.5)
    name = gpt2.QKV.format(i=layer)
    qkv = stacked(alike([larger, key, value]), config)
    return {name + "weight": qkv, name + "bias": zeros(3 * config.hidden, query)}


def _times(tensor: LazyTensor, factor: float) -> LazyTensor:
    """The tensor multiplied with a number."""

    def read(start: int, stop: int) -> Floats:
        return (tensor.floats(start, stop) * np.float32(factor)).astype(np.float32)

    return computed(tensor, read)

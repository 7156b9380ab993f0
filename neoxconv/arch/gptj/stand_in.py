"""GPT-J written as GPT-NeoX, which computes the same function with other tensors.

one norm in a layer            is both of GPT-NeoX's
neighbours are rotated         the rows of queries and keys in another order, in which halves are
no biases in attention         zeros
a bias of the head             lies in the head's weight and the last norm: arch/head_bias.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from neoxconv.arch.gpt_neox import weights as neox
from neoxconv.arch.gptj.names import DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, UP, K, Q, V
from neoxconv.arch.gptj.rotation import halves_first
from neoxconv.arch.head_bias import without_head_bias
from neoxconv.arch.joins import stacked
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, alike, reordered, zeros

_PARTS = (".weight", ".bias")


def as_gpt_neox(checkpoint: Checkpoint) -> Checkpoint:
    """The same function as a GPT-NeoX checkpoint; its head is a tensor of its own even where it was tied."""
    config = replace(checkpoint.config, attention_bias=True, shared_norm=False, tied=False)
    made = dict(_outside(checkpoint.tensors))
    for layer in range(config.layers):
        made |= _layer(checkpoint.tensors, layer, config)
    tensors = {weight.unified: made[weight.unified] for _, weight in neox.GPT_NEOX.names(config)}
    return replace(checkpoint, architecture=neox.GPT_NEOX, config=config, tensors=tensors, ranks=[tensors])


def _outside(tensors: dict[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor]]:
    """Embedding, last norm and head under their new names."""
    embedding = tensors[EMBEDDING + ".weight"]
    head = tensors.get(HEAD + ".weight", embedding)
    norm = (tensors[NORM + part] for part in _PARTS)
    head, gain, bias = without_head_bias(head, tensors[HEAD + ".bias"], *norm)
    yield neox.EMBEDDING + ".weight", embedding
    yield neox.NORM + ".weight", gain
    yield neox.NORM + ".bias", bias
    yield neox.HEAD + ".weight", head


def _layer(tensors: dict[str, LazyTensor], layer: int, config: ModelConfig) -> dict[str, LazyTensor]:
    """A layer's tensors under their new names."""

    def ours(name: str) -> LazyTensor:
        return tensors[name.format(i=layer)]

    norm, up, down = ([ours(name + part) for part in _PARTS] for name in (NORM1, UP, DOWN))
    dense, bias = ours(DENSE + ".weight"), norm[1]
    queries = stacked(alike([ours(name + ".weight") for name in (Q, K, V)]), config)
    qkv = [reordered(queries, _by_head(config)), zeros(3 * config.hidden, bias)]
    made = {
        **dict(zip(_named(neox.NORM1 + "."), norm, strict=True)),
        **dict(zip(_named(neox.NORM2 + "."), norm, strict=True)),
        **dict(zip(_named(neox.L + neox.QKV), qkv, strict=True)),
        **dict(zip(_named(neox.L + neox.DENSE), (dense, zeros(config.hidden, bias)), strict=True)),
        **dict(zip(_named(neox.L + neox.UP), up, strict=True)),
        **dict(zip(_named(neox.L + neox.DOWN), down, strict=True)),
    }
    return {name.format(i=layer): tensor for name, tensor in made.items()}


def _named(module: str) -> tuple[str, str]:
    """A module's weight and bias; its name ends with a point."""
    return module + "weight", module + "bias"


def _by_head(config: ModelConfig) -> npt.NDArray[np.int64]:
    """Rows of query, key and value for each head in turn, as rows of all queries, all keys, all values."""
    rows = np.arange(3 * config.hidden).reshape(3, config.heads, config.head_size)
    order = halves_first(config)
    return np.stack([rows[0][:, order], rows[1][:, order], rows[2]], axis=1).reshape(-1)

"""Positions that gpt-neox computes and GPT-2 has as a table: sines, or none at all.

Source: SinusoidalPositionalEmbedding in gpt-neox's megatron/model/positional_embeddings.py.
"""

from __future__ import annotations

import math

import numpy as np

from neoxconv.core.model import Index
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, computed, in_memory
from neoxconv.dtypes import DType, Floats, narrow, widen

_FREQUENCIES = "0.position_embeddings.inv_freq"
_WORDS = "0.word_embeddings.weight"
_BASE = 10000


def made_positions(index: Index, config: ModelConfig) -> LazyTensor | None:
    """The table [context, hidden] that adds what gpt-neox adds; None where it learned one."""
    like, kind = index.ranks[0].get(_WORDS), index.settings.get("pos_emb")
    if like is None or kind not in MADE:
        return None
    shape = (config.context, config.hidden)
    if kind == "none":
        return computed(like, lambda start, stop: np.zeros((stop - start, config.hidden), np.float32), shape)
    stored = index.ranks[0].get(_FREQUENCIES) or _frequencies(config, like.native)
    frequencies = stored.floats(0, stored.rows)
    return computed(like, lambda start, stop: _sines(frequencies, stored.native, start, stop), shape)


MADE = ("none", "sinusoidal")


def _frequencies(config: ModelConfig, dtype: DType) -> LazyTensor:
    """The frequencies of a model's sines in the type that it was trained in."""
    exact = [1 / _BASE ** (i / config.hidden) for i in range(0, config.hidden, 2)]
    tensor = in_memory(_rounded(np.array(exact, np.float32), dtype))
    return LazyTensor(tensor.shape, tensor.dtype, tensor.read, dtype)


def _sines(frequencies: Floats, dtype: DType, start: int, stop: int) -> Floats:
    """Rows `start` to `stop`: all sines, then all cosines. gpt-neox rounds places, angles and sines to its type.

    In Python's float64, because numpy's sines differ by processor.
    """
    places = _rounded(np.arange(start, stop, dtype=np.float32), dtype)
    angles = _rounded(np.outer(places, frequencies).astype(np.float32), dtype)
    flat = angles.reshape(-1).tolist()
    parts = [np.array(list(map(wave, flat)), np.float32).reshape(angles.shape) for wave in (math.sin, math.cos)]
    return _rounded(np.concatenate(parts, axis=1), dtype)


def _rounded(values: Floats, dtype: DType) -> Floats:
    """Numbers as a type holds them."""
    return widen(narrow(values, dtype), dtype)

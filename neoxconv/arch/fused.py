"""Tensors of gpt-neox's layer files that hold several weights: taken apart on every rank, and put together again.

A rank's fused tensor has the rows of its parts in an order of its own, so both ways are a choice of rows. Ranks are
joined after the cut and split before it: the ranks' fused tensors, one below the other, are no fused tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neoxconv.arch.joins import stacked
from neoxconv.core.model import Stored
from neoxconv.core.table import Fused, ModelConfig, Weight
from neoxconv.core.tensor import LazyTensor, reordered


def apart(
    fused: Fused, weights: Sequence[Weight], tensor: LazyTensor, degree: int, config: ModelConfig
) -> list[LazyTensor]:
    """The parts of what one of `degree` ranks holds; `weights` are theirs."""
    order = fused.order(config, degree)
    ends = np.cumsum([config.sizes[weight.shape[0]] // degree for weight in weights])
    return [reordered(tensor, rows) for rows in np.split(order, ends[:-1])]


def split(stored: Stored, tensors: Sequence[LazyTensor], degree: int, config: ModelConfig) -> list[LazyTensor]:
    """What each of `degree` ranks holds of a stored tensor, whose weights' whole `tensors` are given in their order."""
    parts = [weight.join.split(tensor, degree, config) for weight, tensor in zip(stored.weights, tensors, strict=True)]
    if stored.fused is None:
        return parts[0]
    back = np.argsort(stored.fused.order(config, degree))
    return [reordered(stacked(rank, config), back) for rank in zip(*parts, strict=True)]

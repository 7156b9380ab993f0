"""Tied models that store their head all the same, as torch.save does: it must be the embedding once more."""

from __future__ import annotations

import numpy as np

from neoxconv.core.model import Architecture, Index
from neoxconv.core.table import ModelConfig, RankTensors
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.dtypes import FLOATS
from neoxconv.errors import CheckpointError
from neoxconv.sources import SOURCES
from neoxconv.sources.naming import home, spellings_of, unified_name

_SLAB = 4 << 20  # bytes in memory at once


def stored_head(index: Index, named: RankTensors, architecture: Architecture, config: ModelConfig) -> str | None:
    """What a Hugging Face source calls the head that its tied model stores; None where there is none, or no tying.

    Raises CheckpointError where it is not its embedding.
    """
    (head, embedding), *_ = architecture.tied_head.items()
    tensors = named[0]
    if not config.tied or SOURCES[index.format].naming != "unified" or not {head, embedding} <= set(tensors):
        return None
    spellings = spellings_of(index, architecture)
    spelled = {unified_name(name, spellings): name for name in index.ranks[0]}
    if difference := _difference(tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{home(index, 0, head)}: {spelled[head]} is not {spelled[embedding]} ({difference}), but "
            "tie_word_embeddings in config.json says that the head is the embedding; correct that, or remove the head."
        )
    return spelled[head]


def _difference(head: LazyTensor, embedding: LazyTensor) -> str | None:
    """How two tensors differ, in words; None where they have the same numbers."""
    if head.shape != embedding.shape or not {head.dtype.name, embedding.dtype.name} <= set(FLOATS):
        return " and ".join(f"{tensor.dtype.name} {list(tensor.shape)}" for tensor in (head, embedding))
    for start, stop in slabs(head, _SLAB):
        rows = head.floats(start, stop), embedding.floats(start, stop)
        wrong = np.flatnonzero((rows[0].view(np.uint32) != rows[1].view(np.uint32)).reshape(stop - start, -1).any(1))
        if wrong.size:
            return f"the first other row is {start + wrong[0]}"
    return None

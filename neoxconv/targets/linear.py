"""The weights that quantized folders quantize: the layers' matrices. Embeddings, head, norms and biases are kept."""

from __future__ import annotations

from dataclasses import replace

from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint
from neoxconv.targets.hf import unified_entries
from neoxconv.targets.recipe import Recipe


def quantized_entries(checkpoint: Checkpoint, recipe: Recipe, encoding: Encoding | Scaled) -> list[Entry]:
    """Every tensor under its unified name, the layers' matrices, their rows outputs, in this encoding."""
    names = {weight.unified for _, weight in checkpoint.architecture.names(checkpoint.config) if weight.linear}
    # The type in which a plain target would keep a weight is the one that it is rounded to, and said to have been.
    return [
        replace(e, tensor=replace(checkpoint.tensors[e.name], native=e.encoding.dtype), encoding=encoding)
        if e.name in names
        else e
        for e in unified_entries(checkpoint, recipe)
    ]

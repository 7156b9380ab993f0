"""How gpt-neox numbers its layers."""

from __future__ import annotations

from neoxconv.core.model import Weight

FIRST_LAYER = 2  # of gpt-neox: 0 is the embedding, 1 a function without weights
AFTER_LAYERS = {"norm": 3, "head": 4}  # of gpt-neox: counted from the number of layers


def number_name(weight: Weight, layer: int | None, layers: int, name: str | None = None) -> str:
    """`N.name` as gpt-neox numbers its layers; the weight's oldest name by default."""
    if layer is not None:
        number = layer + FIRST_LAYER
    else:
        number = 0 if weight.stage == "embed" else layers + AFTER_LAYERS[weight.stage]
    return f"{number}.{name or weight.source[0]}"

"""How gpt-neox numbers the layers of a model with L transformer layers.

    | 0         | 1          | 2 ... L + 1        | L + 2      | L + 3      | L + 4 |
    | embedding | a function | transformer layers | a function | final norm | head  |

Source: GPT2ModelPipe.init_specs in gpt-neox's megatron/model/gpt2_model.py.
"""

from __future__ import annotations

from neoxconv.core.table import Weight

_EMBEDDING = 0
FIRST_LAYER = 2
_AFTER_LAYERS = {"norm": 3, "head": 4}  # by the weight's stage, counted from the number of layers


def number_name(weight: Weight, layer: int | None, layers: int, name: str | None = None) -> str:
    """`N.name` of a weight in transformer layer `layer` of `layers`, or outside of them (None).

    `name` is one of the weight's names in a layer file, the first by default, and its unified one where it has none.
    """
    if layer is not None:
        number = layer + FIRST_LAYER
    elif weight.stage == "embed":
        number = _EMBEDDING
    else:
        number = layers + _AFTER_LAYERS[weight.stage]
    return f"{number}.{name or next(iter(weight.source), weight.unified)}"

"""The compressed-tensors target: a Hugging Face folder as llm-compressor makes it, which vLLM and transformers load."""

from __future__ import annotations

import math
from typing import Any

from neoxconv.core.encoding import Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError, raise_all
from neoxconv.names import GROUPS, PACKED_TYPES
from neoxconv.quant import SCALED
from neoxconv.targets.linear import compressed, quantized_entries, quantized_folder, refuse_conv1d
from neoxconv.targets.recipe import Recipe

DYNAMIC = "FP8_DYNAMIC"  # the only one whose inputs are rounded too
PACKED = tuple(kind for kind in PACKED_TYPES if kind != DYNAMIC)  # those with groups
_DEFAULT = "W4A16"
_PREFERRED = ("128", "64", "32")  # where no group is asked for; the first is that of compressed-tensors' presets
RECIPES = (  # all that `formats` lists
    *(
        Recipe("compressed-tensors", type=kind, group=group, asymmetric=asymmetric)
        for kind in PACKED
        for asymmetric in (False, True)
        for group in reversed(GROUPS)
    ),
    Recipe("compressed-tensors", type=DYNAMIC),
)


def to_compressed_tensors(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The folder, its tensors equal to those that compressed-tensors makes of the Hugging Face conversion.

    With --calibration they are its own: codes chosen together, and for 4 bits scales that suit all of a group. Those of
    FP8_DYNAMIC are those of --to float8.
    """
    entries = compressed_entries(checkpoint, recipe)
    settings = {"quantization_config": _settings(checkpoint, recipe)}
    return quantized_folder(checkpoint, recipe, entries, settings)


def compressed_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor, the layers' matrices in the encoding that the recipe asks for.

    Raises PlanError for a model whose matrices are none to compressed-tensors, or whose columns are no whole groups.
    """
    refuse_conv1d(checkpoint, recipe)
    encoding = _encoding_of(checkpoint, recipe)
    entries = quantized_entries(checkpoint, recipe, encoding)
    raise_all(PlanError, (
        f"--group {recipe.group}: {entry.name} has {entry.tensor.columns} columns, no multiple of it; "
        f"give --group {_dividing(entry.tensor.columns)}."
        for entry in entries
        if isinstance(entry.encoding, Scaled) and entry.tensor.columns % encoding.multiple
    ))  # fmt: skip
    return entries


def _dividing(columns: int) -> str:
    """The groups that a row of so many columns is made of."""
    return " or ".join(group for group in reversed(GROUPS) if not group.isdigit() or columns % int(group) == 0)


def _group_of(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The group that a recipe asks for, else the largest that divides the columns of all matrices."""
    names = [weight.unified for _, weight in checkpoint.architecture.names(checkpoint.config) if weight.linear]
    columns = math.gcd(*(checkpoint.tensors[name].columns for name in names))
    return recipe.group or next((group for group in _PREFERRED if columns % int(group) == 0), "channel")


def _encoding_of(checkpoint: Checkpoint, recipe: Recipe) -> Scaled:
    """The encoding of linear layers that a recipe asks for. Raises PlanError where there is none."""
    kind, group = recipe.type or _DEFAULT, _group_of(checkpoint, recipe)
    if kind == DYNAMIC and not recipe.group and not recipe.asymmetric:
        return SCALED["E4M3_CHANNEL"]
    if kind not in PACKED or group not in GROUPS:
        raise PlanError(
            f"compressed-tensors has {', '.join(PACKED)} with groups {', '.join(GROUPS)}, and {DYNAMIC} with neither "
            f"groups nor zeros; found {kind} {recipe.group or ''}."
        )
    by = f"G{group}" if group.isdigit() else group.upper()
    return SCALED[f"{kind}_{by}" + "_ASYM" * recipe.asymmetric]


def _settings(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """compressed-tensors' settings, as its presets of these names have them."""
    kind, group = recipe.type or _DEFAULT, _group_of(checkpoint, recipe)
    if kind == DYNAMIC:
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        inputs = weights | {"strategy": "token", "dynamic": True}
        return compressed(checkpoint, "float-quantized", weights, inputs)
    by = {"strategy": "group", "group_size": int(group)} if group.isdigit() else {"strategy": group}
    number = {"num_bits": int(kind[1]), "type": "int", "symmetric": not recipe.asymmetric, "dynamic": False}
    told = compressed(checkpoint, "pack-quantized", number | by)
    # transformers 5.23 gives packed zeros no place: it reads them only where it widens the weights when it loads them.
    return told | {"dequantize": True} if recipe.asymmetric else told

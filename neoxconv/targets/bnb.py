"""The bitsandbytes target: a Hugging Face folder whose linear layers transformers loads quantized as they are."""

from __future__ import annotations

from typing import Any

from neoxconv.core.encoding import Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import TORCH_NAMES
from neoxconv.errors import PlanError
from neoxconv.names import BNB_TYPES
from neoxconv.quant import SCALED
from neoxconv.targets.hf import main_dtype
from neoxconv.targets.linear import quantized_entries, quantized_folder
from neoxconv.targets.recipe import Recipe

_DEFAULT = "NF4"
FOUR_BIT = ("NF4", "FP4")
RECIPES = (  # all that `formats` lists
    *(Recipe("bnb", type=kind) for kind in BNB_TYPES),
    *(Recipe("bnb", type=kind, double_quant=True) for kind in FOUR_BIT),
)
_THRESHOLD = 6.0  # transformers' default: inputs beyond it are multiplied in float16


def to_bnb(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The folder, its tensors equal to those that bitsandbytes makes of the Hugging Face conversion.

    With --calibration they are its own: codes chosen together, and for NF4 and FP4 scales that suit all of a block.
    """
    kind = recipe.type or _DEFAULT
    entries = bnb_entries(checkpoint, recipe)
    compute = TORCH_NAMES[recipe.compute_dtype] if recipe.compute_dtype else main_dtype(entries)
    settings = _eight_bit() if kind == "INT8" else _four_bit(kind.lower(), recipe.double_quant, compute)
    return quantized_folder(checkpoint, recipe, entries, {"quantization_config": settings})


def bnb_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor, the layers' matrices in the encoding that the recipe asks for."""
    return quantized_entries(checkpoint, recipe, _encoding_of(recipe))


def _encoding_of(recipe: Recipe) -> Scaled:
    """The encoding of linear layers that a recipe asks for. Raises PlanError where there is none."""
    kind = recipe.type or _DEFAULT
    if kind not in BNB_TYPES or (recipe.double_quant and kind + "_DQ" not in SCALED):
        raise PlanError(f"bnb has {', '.join(BNB_TYPES)}, the first two also with double quantization; found {kind}.")
    if recipe.compute_dtype not in (None, *TORCH_NAMES):
        raise PlanError(f"compute dtype {recipe.compute_dtype}: expected one of {', '.join(TORCH_NAMES)}.")
    return SCALED[f"{kind}_DQ" if recipe.double_quant else kind]


def _eight_bit() -> dict[str, Any]:
    """transformers' settings for weights of LLM.int8."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": _THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,  # with the head's name alone, transformers 5 fails
    }


def _four_bit(kind: str, double: bool, compute: str) -> dict[str, Any]:
    """transformers' settings for weights of NF4 and FP4."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }

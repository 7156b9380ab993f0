"""The float8 target: a Hugging Face folder with linear layers of one byte a weight, for running or for storage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError
from neoxconv.names import SCALES
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.targets.linear import compressed, quantized_entries, quantized_folder, refuse_conv1d
from neoxconv.targets.recipe import Recipe

_DEFAULT = "E4M3"
_DEFAULTS = {"E4M3": "channel", "E5M2": "none"}  # the scales, where none are asked for
RECIPES = tuple(Recipe("float8", type=kind, scale=scale) for kind in _DEFAULTS for scale in SCALES)  # for `formats`
_STORAGE = "float8 for storage: transformers 5 widens these weights when it loads them, neoxconv reads them as they are"


def to_float8(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The folder; scales in compressed-tensors' words. Raises PlanError for a calibration without scales."""
    kind, scale = choice(recipe)
    settings = {} if scale == "none" else {"quantization_config": _settings(checkpoint, kind, scale)}
    if scale == "none" and recipe.calibration:
        raise PlanError("--calibration is for float8 with scales; give --scale channel or tensor.")
    content = quantized_folder(checkpoint, recipe, float8_entries(checkpoint, recipe), settings)
    return content if kind == _DEFAULT and scale != "none" else replace(content, notes=(*content.notes, _STORAGE))


def float8_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor, the layers' matrices in the encoding that the recipe asks for.

    Raises PlanError for a model whose matrices are none to compressed-tensors.
    """
    refuse_conv1d(checkpoint, recipe)
    return quantized_entries(checkpoint, recipe, _encoding_of(recipe))


def choice(recipe: Recipe) -> tuple[str, str]:
    """The type and the kind of scale that a recipe asks for."""
    kind = recipe.type or _DEFAULT
    if kind not in _DEFAULTS or recipe.scale not in (None, *SCALES):
        raise PlanError(
            f"float8 has {', '.join(_DEFAULTS)} with scales {', '.join(SCALES)}; found {kind} {recipe.scale}."
        )
    return kind, recipe.scale or _DEFAULTS[kind]


def _encoding_of(recipe: Recipe) -> Encoding | Scaled:
    """The encoding of linear layers that a recipe asks for."""
    kind, scale = choice(recipe)
    return ENCODINGS[f"F8_{kind}"] if scale == "none" else SCALED[f"{kind}_{scale.upper()}"]


def _settings(checkpoint: Checkpoint, kind: str, scale: str) -> dict[str, Any]:
    """compressed-tensors' settings for weights of float8. It knows E4M3 only, and must be told to widen others."""
    weights = {"num_bits": 8, "type": "float", "strategy": scale, "symmetric": True, "dynamic": False}
    told = compressed(checkpoint, "naive-quantized", weights)
    return told if kind == _DEFAULT else told | {"dequantize": True}

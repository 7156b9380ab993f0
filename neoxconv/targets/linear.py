"""The weights that quantized folders quantize: the layers' matrices. Embeddings, head, norms and biases are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError
from neoxconv.targets.calibrated import SETTING, calibration_for
from neoxconv.targets.hf import LIBRARY, hf_folder, unified_entries
from neoxconv.targets.recipe import Recipe


def quantized_folder(
    checkpoint: Checkpoint, recipe: Recipe, entries: list[Entry], settings: Mapping[str, Any], *, library: str = LIBRARY
) -> Content:
    """A folder of such entries for a `library`, with `settings` in its configuration.

    With --calibration the codes of the layers' matrices are chosen together. Raises PlanError where it does not fit.
    """
    if recipe.calibration is None:
        return hf_folder(checkpoint, recipe, entries, settings, library=library)
    calibration = calibration_for(checkpoint, recipe.calibration, entries)
    told = {**settings, SETTING: calibration.digest}
    content = hf_folder(checkpoint, recipe, calibration.applied(entries), told, library=library)
    return replace(content, notes=(*content.notes, *calibration.notes))


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


def refuse_conv1d(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise PlanError for a model whose matrices are none to compressed-tensors."""
    if any(weight.transposed for weight in checkpoint.architecture.weights):
        raise PlanError(
            f"--to {recipe.format}: {checkpoint.architecture.title}'s layers are transformers' Conv1D, which "
            "compressed-tensors does not know; give --to bnb or --to gguf."
        )


def compressed(
    checkpoint: Checkpoint, form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """compressed-tensors' settings for linear layers whose weights are stored so, and whose inputs are rounded so."""
    heads = [name.removesuffix(".weight") for name in checkpoint.architecture.tied_head]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(dict.fromkeys([*heads, "lm_head"])),  # transformers 5 has the second name for the first
    }

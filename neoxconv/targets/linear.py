"""The weights that quantized folders quantize: the layers' matrices. Embeddings, head, norms and biases are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
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

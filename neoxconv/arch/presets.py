"""Released models: their hyperparameters, for sources that lack a configuration."""

from __future__ import annotations

from collections.abc import Mapping

from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError


def from_preset(
    index: Index, measured: Measured, opening: Opening, presets: Mapping[str, ModelConfig]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The named released model, or the only one whose shapes fit."""
    preset = opening.preset
    if preset:
        if preset not in presets:
            known = f"expected one of {', '.join(presets)}" if presets else f"{index.where} is of a family without any"
            raise PlanError(f"--preset {preset}: {known}.")
        config = presets[preset]
        if measured.hidden not in (0, config.hidden):
            raise PlanError(
                f"--preset {preset}: has hidden size {config.hidden}, but {index.where} has {measured.hidden}; "
                "give the right preset."
            )
        return config, ()
    shapes = (measured.layers, measured.hidden, measured.ff, measured.rows, measured.tied)
    fits = [name for name, c in presets.items() if (c.layers, c.hidden, c.ff, c.rows, c.tied) == shapes]
    known = f"{measured.layers} layers, hidden {measured.hidden}, ff {measured.ff}, {measured.rows} vocabulary rows"
    if len(fits) == 1:
        return presets[fits[0]], (
            f"no configuration found; the shapes ({known}) are those of {fits[0]}, so its settings are used",
        )
    which = f"{' and '.join(fits)} have these shapes" if fits else "no released model has these shapes"
    training = (
        "Give the training YAML with --config FILE" if index.format == "neox" else "Put its config.json beside it"
    )
    name = ", or give --preset NAME" if presets else ""
    raise CheckpointError(
        f"{index.where}: there is no configuration beside the weights, and {which} ({known}). Unknown: "
        "num_attention_heads, max_position_embeddings, rotary_pct, rotary_emb_base, gpt_j_residual, bias_gelu_fusion, "
        f"layernorm_epsilon. {training}{name}."
    )

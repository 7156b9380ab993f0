"""The hyperparameters of models with ALiBi in the words of gpt-neox's YAML and of GGUF's `mpt` keys."""

from __future__ import annotations

from typing import Any, NoReturn

from neoxconv.arch.gguf_keys import GgufKeys
from neoxconv.arch.gpt2.config import SERIAL, serial_from_gguf, serial_from_neox
from neoxconv.arch.gpt2.config import to_gguf as gpt2_keys
from neoxconv.arch.gpt2.config import to_neox as gpt2_settings
from neoxconv.arch.presets import from_preset
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError

PRESETS: dict[str, ModelConfig] = {}
_ALLOWED = {**SERIAL, "pos_emb": ("learned", ("alibi",))}
_BIAS = 8.0  # the slopes of n heads are 2 ^ (-8 i / n), in gpt-neox and, by this key, in llama.cpp
_KEY = "attention.max_alibi_bias"


def from_neox(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML."""
    if opening.preset or not index.settings:
        return from_preset(index, measured, opening, PRESETS)
    if index.settings.get("gpt_j_residual"):
        raise CheckpointError(
            f"{', '.join(map(str, index.configs))}: pos_emb: alibi is not supported with gpt_j_residual: true, only "
            "with false; no other program has both."
        )
    return serial_from_neox(index, measured, _ALLOWED, "alibi")


def from_hf(index: Index, measured: Measured, opening: Opening) -> NoReturn:
    """Raise CheckpointError: MPT's own models have no biases."""
    raise CheckpointError(
        f"{index.where}: is an MPT model, which has no biases; of this family only gpt-neox's models with ALiBi "
        "and their GGUF files are read."
    )


def from_gguf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GGUF's `mpt.` keys; the activation is the one that llama.cpp computes."""
    if opening.preset:
        return from_preset(index, measured, opening, PRESETS)
    keys = GgufKeys.of(index, "mpt")
    keys.read.number(_KEY)  # without it there would be no positions
    return serial_from_gguf(keys, measured, "alibi", {_KEY: (_BIAS,)})


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Raise PlanError: there is no such model."""
    raise PlanError(
        "pos_emb: alibi: transformers has no model with ALiBi and biases (its MPT has none, its BLOOM normalises the "
        "embedding); give --to gguf, which llama.cpp runs as mpt, or --to slim."
    )


def to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The `mpt.` keys as llama.cpp's converter writes them."""
    keys = {key.replace("gpt2.", "mpt."): value for key, value in gpt2_keys(config).items()}
    return {**keys, f"mpt.{_KEY}": _BIAS}


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model. Raises PlanError for what they cannot say."""
    return gpt2_settings(config)

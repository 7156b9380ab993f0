"""What gpt-neox needs to train on with a model that it did not write: the settings of its YAML, and stored buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

from neoxconv.arch.training_settings import other_width, with_layer_norms
from neoxconv.core.table import ModelConfig
from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError, raise_all


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model. Raises PlanError for what they cannot say."""
    raise_all(PlanError, problems(config))
    rotary = {"rotary_pct": config.rotary_pct, "rotary_emb_base": int(config.rotary_base)}
    return with_layer_norms(config, {"pos_emb": "rotary", **rotary})


def problems(config: ModelConfig) -> list[str]:
    """What gpt-neox's YAML has no words for."""
    found = other_width(config)
    if not config.rotary_base.is_integer():
        found.append(f"--to slim: the rotary base is {config.rotary_base}; gpt-neox's is a whole number.")
    return found


def inverse_frequencies(config: ModelConfig) -> Floats:
    """The rotary frequencies; in Python's float64, because numpy's powers differ by processor."""
    dims = config.rotary_dims
    return np.array([1 / config.rotary_base ** (i / dims) for i in range(0, dims, 2)], np.float32)

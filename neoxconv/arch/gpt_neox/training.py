"""What gpt-neox needs to train on with a model that it did not write: the settings of its YAML, and stored buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

from neoxconv.core.model import ModelConfig
from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError, raise_all


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model, in keys that the code of 2022 and today's both know.

    Raises PlanError for what they cannot say: 2022's MLP is four times as wide as the model, and both check types.
    """
    raise_all(PlanError, problems(config))
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "seq_length": config.context,
        "max_position_embeddings": config.context,
        "norm": "layernorm",
        "layernorm_epsilon": config.norm_eps,
        "pos_emb": "rotary",
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": int(config.rotary_base),
        "no_weight_tying": not config.tied,
        "gpt_j_residual": config.parallel_residual,
        "activation": "gelu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
    }


def problems(config: ModelConfig) -> list[str]:
    """What gpt-neox's YAML has no words for."""
    found = []
    if config.ff != 4 * config.hidden:
        found.append(f"--to slim: the MLP has {config.ff} rows; gpt-neox's has 4 x hidden size = {4 * config.hidden}.")
    if not config.rotary_base.is_integer():
        found.append(f"--to slim: the rotary base is {config.rotary_base}; gpt-neox's is a whole number.")
    return found


def inverse_frequencies(config: ModelConfig) -> Floats:
    """The rotary frequencies; in Python's float64, because numpy's powers differ by processor."""
    dims = config.rotary_dims
    return np.array([1 / config.rotary_base ** (i / dims) for i in range(0, dims, 2)], np.float32)

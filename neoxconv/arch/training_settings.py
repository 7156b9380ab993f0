"""gpt-neox's YAML settings that change the function: each is implemented by an architecture, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neoxconv.core.table import ModelConfig

Allowed = Mapping[str, tuple[Any, tuple[Any, ...]]]  # what a key is where the file is silent, and the values allowed

_ATTENTION = ("global", "flash")
_DEEPEST = 4  # lists in one another in an `attention_config`


def _attention_types(value: Any, depth: int = 0) -> set[str]:
    """The names in an `attention_config`, such as [[["global"], 44]]; a YAML may nest it without end."""
    if isinstance(value, str):
        return {value}
    inside = value if isinstance(value, list | tuple) and depth < _DEEPEST else ()
    return set().union(*(_attention_types(item, depth + 1) for item in inside))


def refused(settings: Mapping[str, Any], allowed: Allowed) -> list[str]:
    """Each setting with a value that would change the function in a way that is not implemented."""
    found = [
        f"{key}: {settings.get(key, default)} is not supported, only {' or '.join(map(str, values))}"
        + ("" if key in settings else f" (gpt-neox takes {default} where its YAML does not say)")
        for key, (default, values) in allowed.items()
        if settings.get(key, default) not in values
    ]
    found += [
        f"attention_config: {kind} is not supported"
        for kind in sorted(_attention_types(settings.get("attention_config")) - set(_ATTENTION))
    ]
    if settings.get("gpt_j_residual") is True and settings.get("use_bias_in_mlp") is False:
        found.append(
            "gpt_j_residual with use_bias_in_mlp: False is not supported: gpt-neox since 2024-09-10 then leaves out "
            "what attention gives, so that no other program computes this model"
        )
    tuning = settings.get("soft_prompt_tuning")
    if isinstance(tuning, Mapping) and tuning.get("enabled"):
        found.append("soft_prompt_tuning: enabled is not supported")
    return found


def grouped(settings: Mapping[str, Any]) -> list[str]:
    """Groups of queries with common keys, for families that have none."""
    heads, groups = settings.get("num_attention_heads"), settings.get("num_kv_heads")
    if groups in (None, heads):
        return []
    return [f"num_kv_heads: {groups} is not num_attention_heads ({heads}); grouped queries are not supported"]


def other_width(config: ModelConfig) -> list[str]:
    """What gpt-neox cannot say of an ungated MLP: 2022's is four times as wide as the model, and both check types."""
    if config.ff == 4 * config.hidden:
        return []
    return [f"--to slim: the MLP has {config.ff} rows; gpt-neox's has 4 x hidden size = {4 * config.hidden}."]


def with_layer_norms(config: ModelConfig, positions: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model with layer norms and an ungated MLP; `positions` are those of its positions.

    In keys that the code of 2022 and today's both know.
    """
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "seq_length": config.context,
        "max_position_embeddings": config.context,
        "norm": "layernorm",
        "layernorm_epsilon": config.norm_eps,
        **positions,
        "no_weight_tying": not config.tied,
        "gpt_j_residual": config.parallel_residual,
        "activation": "gelu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
    }

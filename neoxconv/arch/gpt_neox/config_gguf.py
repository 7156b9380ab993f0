"""GPT-NeoX's hyperparameters in GGUF's keys."""

from __future__ import annotations

from typing import Any

from neoxconv.arch.gguf_keys import GgufKeys, rounded, share
from neoxconv.arch.gpt_neox.config import PRESETS
from neoxconv.arch.presets import from_preset
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig


def from_gguf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GGUF's `gptneox.` keys; the activation is the one that llama.cpp computes."""
    if opening.preset:
        return from_preset(index, measured, opening, PRESETS)
    keys = GgufKeys.of(index, "gptneox")
    read = keys.read
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    base = read.number("rope.freq_base", 10000)
    keys.refuse_unread(hidden, heads, base, {"attention.head_count_kv": (heads,)})
    config = ModelConfig(
        **keys.sizes(measured),
        heads=heads,
        rotary_pct=share(read.count("rope.dimension_count"), max(1, hidden // heads)),
        rotary_base=base,
        norm_eps=rounded(read.number("attention.layer_norm_epsilon")),
        parallel_residual=read.truth("use_parallel_residual", True),
        activation="gelu_tanh",
    )
    return config, keys.notes(_READ, config.rows)


_READ = ("attention.head_count_kv", "attention.layer_norm_epsilon", "rope.dimension_count", "use_parallel_residual")


def to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The `gptneox.` keys as llama.cpp's converter writes them, and the rotary base, which it leaves out."""
    return {
        "gptneox.context_length": config.context,
        "gptneox.embedding_length": config.hidden,
        "gptneox.block_count": config.layers,
        "gptneox.feed_forward_length": config.ff,
        "gptneox.rope.dimension_count": config.rotary_dims,
        "gptneox.rope.freq_base": config.rotary_base,
        "gptneox.attention.head_count": config.heads,
        "gptneox.use_parallel_residual": config.parallel_residual,
        "gptneox.attention.layer_norm_epsilon": config.norm_eps,
    }

"""GPT-NeoX's hyperparameters in GGUF's keys, and the keys that would change its function."""

from __future__ import annotations

import math
from typing import Any

from neoxconv.arch.gpt_neox.config import from_preset, stale
from neoxconv.arch.settings import Settings
from neoxconv.core.model import Index, Measured, ModelConfig
from neoxconv.dtypes import FLOATS
from neoxconv.errors import CheckpointError, raise_all


def from_gguf(index: Index, measured: Measured, preset: str | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GGUF's `gptneox.` keys; the activation is the one that llama.cpp computes."""
    if preset:
        return from_preset(index, measured, preset)
    keys = {key.removeprefix("gptneox."): value for key, value in index.settings.items()}
    read = Settings(", ".join(str(file.storage.path) for file in index.files[:1]), keys, "gptneox.")
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    base = read.number("rope.freq_base", 10000)
    _refuse_unread(read, heads, hidden, base)
    _refuse_rope_factors(index, read.where)
    config = ModelConfig(
        layers=read.count("block_count"),
        hidden=hidden,
        heads=heads,
        ff=read.count("feed_forward_length"),
        rows=measured.rows,
        context=read.count("context_length"),
        rotary_pct=share(read.count("rope.dimension_count"), max(1, hidden // heads)),
        rotary_base=base,
        norm_eps=float(f"{read.number('attention.layer_norm_epsilon'):.6g}"),  # float32: 1e-5 comes back long
        parallel_residual=read.truth("use_parallel_residual", True),
        activation="gelu_tanh",
        tied=measured.tied,
    )
    idle = [f"gptneox.{name}" for name in keys if _is_idle(name, index)]
    notes = (f"{read.where}: not read, as no part of the function here: {', '.join(idle)}",) if idle else ()
    return config, (*notes, *stale(read.where, "gptneox.vocab_size", keys.get("vocab_size"), config.rows))


# GGUF: keys that could change the function, which are not implemented, and the values with which they do not.
# Source: llama.cpp's llama-model.cpp (load_hparams) and gguf's constants.py. 0 stands for "none" there.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.relative_buckets_count": (0,),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # linear by a factor, which is another key
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "swin_norm": (False,),
}
_READ = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "use_parallel_residual", "vocab_size",
)  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"  # a tensor: what llama.cpp divides each frequency by


def _refuse_unread(read: Settings, heads: int, hidden: int, base: float) -> None:
    """Raise CheckpointError for each key with which llama.cpp, or its kin, would compute another function."""
    head = hidden // max(1, heads)
    neutral = _NEUTRAL | {
        "attention.head_count_kv": (heads,),
        "attention.key_length": (head,),
        "attention.value_length": (head,),
        "rope.freq_base_swa": (base,),
    }
    raise_all(CheckpointError, (
        f"{read.where}: gptneox.{key} is {str(read.values[key])[:60]}, which changes the function and is not "
        f"supported; expected {' or '.join(map(str, values))}, or no such key."
        for key, values in neutral.items()
        if key in read.values and not any(read.values[key] == value for value in values)
    ))  # fmt: skip


def _refuse_rope_factors(index: Index, where: str) -> None:
    """Raise CheckpointError where a GGUF holds factors of the rotary frequencies that are not all 1."""
    factors = index.ranks[0].get(_ROPE_FACTORS)
    if factors is None:
        return
    if factors.dtype.name not in FLOATS or (factors.floats(0, factors.rows) != 1).any():
        raise CheckpointError(
            f"{where}: {_ROPE_FACTORS} holds factors of the rotary frequencies, which are not supported; "
            "expected all 1, or no such tensor."
        )


def _is_idle(name: str, index: Index) -> bool:
    """Whether a key of the family, by its name without `gptneox.`, is neither read nor known to be neutral."""
    return f"gptneox.{name}" in index.settings and name not in _READ and name not in _NEUTRAL


def share(part: int, whole: int) -> float:
    """part / whole, or the next number above where `whole` times it would round down to less than `part`."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, 2)


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

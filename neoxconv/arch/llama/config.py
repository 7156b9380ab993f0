"""Llama's and Mistral's hyperparameters in the words of config.json and of GGUF's keys; gpt-neox's: training.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neoxconv.arch.gguf_keys import GgufKeys, rounded
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import Settings, agreed_rotary, rope_types, stale
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError, raise_all

PRESETS: dict[str, ModelConfig] = {}

TINY = 1e-12  # the epsilon that other programs get where the trained one lies outside of the root


def holds(index: Index, *endings: str) -> bool:
    """Whether a tensor's name ends so."""
    return any(name.endswith(endings) for name in index.ranks[0])


def grouped(read: Settings, key: str, heads: int) -> int | None:
    """Heads of keys and values as a setting says them; None where every query has its own.

    Raises CheckpointError where the queries cannot be shared out among them.
    """
    if read.values.get(key) is None:
        return None
    found = read.count(key)
    if heads % found:
        read.refuse(key, found, f"a number that divides the {heads} heads")
    return None if found == heads else found


def sayable(config: ModelConfig) -> ModelConfig:
    """The hyperparameters for programs that have RMSNorm's epsilon inside of the root only."""
    return replace(config, norm="rmsnorm", norm_eps=TINY) if config.norm == "rmsnorm_outside" else config


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a LlamaConfig or MistralConfig, in transformers 4's or 5's spelling."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    where = str(index.folder / "config.json")
    read = Settings(where, settings)
    heads, hidden = read.count("num_attention_heads"), read.count("hidden_size")
    _refuse_others(read, hidden // heads)
    mistral = settings.get("model_type") == "mistral"
    window = settings.get("sliding_window", 4096) if mistral else None  # MistralConfig's default
    config = ModelConfig(
        layers=read.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=grouped(read, "num_key_value_heads", heads),
        ff=read.count("intermediate_size"),
        rows=measured.rows or read.count("vocab_size"),
        context=read.count("max_position_embeddings", 2048),
        rotary_pct=1.0,
        rotary_base=agreed_rotary(read, "rope_theta", "rope_theta", 10000),
        norm="rmsnorm",
        norm_eps=read.number("rms_norm_eps", 1e-6),
        parallel_residual=False,
        activation="silu",
        attention_bias=_says_biases(index, read, "attention_bias", mistral),
        mlp_bias=_says_biases(index, read, "mlp_bias", mistral),
        tied=read.truth("tie_word_embeddings", False),
        window=None if window is None else read.count("sliding_window", window),
    )
    return config, stale(where, "vocab_size", read.count("vocab_size"), config.rows)


def _refuse_others(read: Settings, head: int) -> None:
    """Raise CheckpointError for settings that make another function; `head` is a head's size."""
    settings = read.values
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": ("silu", settings.get("hidden_act", "silu")),
        "head_dim": (head, settings.get("head_dim") or head),
        # transformers 5 leaves it unread, 4 cannot run it, and others rotate a part only.
        "partial_rotary_factor": (1, agreed_rotary(read, "partial_rotary_factor", "partial_rotary_factor", 1)),
    }
    if settings.get("sliding_window") is not None and "model_type" not in settings:
        read.refuse("model_type", None, "llama, which has no sliding_window, or mistral")
    problems = [
        f"rope_type is {kind!r:.80}, which is not supported; expected 'default'" for kind in rope_types(settings)
    ]
    problems += [
        f"{key} is {found!r:.80}, which is not supported; expected {expected!r}"
        for key, (expected, found) in wanted.items()
        if found != expected
    ]
    raise_all(CheckpointError, (f"{read.where}: {problem}." for problem in problems))


_BIASED = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}


def _says_biases(index: Index, read: Settings, key: str, mistral: bool) -> bool:
    """Whether a config.json gives linears biases; raises CheckpointError where it does not, and they are there."""
    said = not mistral and read.truth(key, False)
    found = [f"{name}.bias" for name in _BIASED[key] if holds(index, f"{name}.bias")]
    if found and not said:
        why = "Mistral has none" if mistral else f"{key} is false"
        raise CheckpointError(
            f"{read.where}: {why}, but the files hold {', '.join(found)}; correct the configuration. Models with "
            "some of them only, such as Qwen2, are not supported."
        )
    return said


def _has_biases(index: Index, where: str, linears: tuple[str, ...]) -> bool:
    """Whether a GGUF gives linears biases; raises CheckpointError where some have one and others have none."""
    found = [name for name in linears if holds(index, f"{name}.bias")]
    if found and len(found) < len(linears):
        bare = [f"{name}.bias" for name in linears if name not in found]
        raise CheckpointError(
            f"{where}: holds {', '.join(f'{name}.bias' for name in found)} but no {', '.join(bare)}; expected all or "
            "none. Models with some of them only, such as Qwen2, are not supported."
        )
    return bool(found)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in transformers 4's and 5's spelling at once, because tools read one or the other."""
    mistral = config.window is not None
    biases = {} if mistral else {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if mistral and (config.attention_bias or config.mlp_bias):
        raise PlanError(
            "MistralForCausalLM has no biases, and LlamaForCausalLM no sliding window; this model has both."
        )
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ff,
        "max_position_embeddings": config.context,
        "model_type": "mistral" if mistral else "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.key_heads,
        "rms_norm_eps": sayable(config).norm_eps,
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.rows,
        **biases,
        **({"sliding_window": config.window} if mistral else {}),
    }


_READ = ("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.dimension_count")


def from_gguf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GGUF's `llama.` keys; which biases there are, its tensors tell."""
    if opening.preset:
        return from_preset(index, measured, opening, PRESETS)
    keys = GgufKeys.of(index, "llama")
    read = keys.read
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    base = read.number("rope.freq_base", 10000)
    keys.refuse_unread(hidden, heads, base, {"rope.dimension_count": (hidden // heads,)})
    config = ModelConfig(
        **keys.sizes(measured),
        heads=heads,
        kv_heads=grouped(read, "attention.head_count_kv", heads),
        rotary_pct=1.0,
        rotary_base=base,
        norm="rmsnorm",
        norm_eps=rounded(read.number("attention.layer_norm_rms_epsilon")),
        parallel_residual=False,
        activation="silu",
        attention_bias=_has_biases(index, read.where, ("attn_q", "attn_k", "attn_v", "attn_output")),
        mlp_bias=_has_biases(index, read.where, ("ffn_gate", "ffn_up", "ffn_down")),
    )
    return config, keys.notes(_READ, config.rows)


def to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The `llama.` keys as llama.cpp's converter writes them."""
    return {
        "llama.block_count": config.layers,
        "llama.context_length": config.context,
        "llama.embedding_length": config.hidden,
        "llama.feed_forward_length": config.ff,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.key_heads,
        "llama.attention.key_length": config.head_size,
        "llama.attention.value_length": config.head_size,
        "llama.attention.layer_norm_rms_epsilon": sayable(config).norm_eps,
        "llama.rope.freq_base": config.rotary_base,
        "llama.rope.dimension_count": config.head_size,
        "llama.vocab_size": config.rows,
    }

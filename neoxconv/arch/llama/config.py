"""Llama's and Mistral's hyperparameters in the words of gpt-neox's YAML, Hugging Face's config.json and GGUF's keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neoxconv.arch.gguf_keys import GgufKeys, rounded
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import Settings, agreed_rotary, rope_types, stale
from neoxconv.arch.training_settings import refused
from neoxconv.core.model import Index, Measured, ModelConfig, Opening
from neoxconv.errors import CheckpointError, PlanError, raise_all

PRESETS: dict[str, ModelConfig] = {}

# What each key of gpt-neox's YAML is where the file is silent, and the values that give the function implemented here.
_ALLOWED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "pos_emb": ("learned", ("rotary",)),
    "rotary_pct": (1.0, (1, 1.0)),
    "norm": ("layernorm", ("rmsnorm", "te_rmsnorm")),
    "gpt_j_residual": (False, (False,)),
    "use_qk_layernorm": (False, (False,)),
    "use_mup": (False, (False,)),
    "moe_num_experts": (1, (0, 1)),
    "rotary_interleaved": (False, (False,)),
    "rope_scaling": (None, (None,)),
    "train_impl": ("normal", ("normal", "dpo", "kto", "reinforce")),
}
_INSIDE, _OUTSIDE = "inside", "outside"  # where RMSNorm adds its epsilon: of the root, as all do since 2025-05-09
_VANISHING = 1e-7  # an epsilon of RMSNorm up to which both forms are one within float32
_TINY = 1e-12  # the epsilon that other programs get where the trained one lies outside of the root


def is_older(index: Index) -> bool:
    """Whether the MLP has the names of before 2024-09."""
    return any(".mlp.w1." in name for name in index.ranks[0])


def _holds(index: Index, *endings: str) -> bool:
    """Whether a tensor's name ends so."""
    return any(name.endswith(endings) for name in index.ranks[0])


def from_neox(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML; which biases there are, the files tell."""
    if opening.preset or not index.settings:
        return from_preset(index, measured, opening, PRESETS)
    settings, where = index.settings, ", ".join(map(str, index.configs))
    read = Settings(where, settings)
    gated = settings.get("activation") == "swiglu" or settings.get("mlp_type") == "llama"
    problems = refused(settings, _ALLOWED)
    problems += [] if gated else [f"activation: {settings.get('activation', 'gelu')} is not supported, only swiglu"]
    raise_all(CheckpointError, (f"{where}: {problem}." for problem in problems))
    heads = read.count("num_attention_heads")
    epsilon = read.number("rms_norm_epsilon", 1e-8)
    window = settings.get("sliding_window_width")
    norm, notes = _norm(index, epsilon, opening.rmsnorm)
    config = ModelConfig(
        layers=read.count("num_layers"),
        hidden=read.count("hidden_size"),
        heads=heads,
        kv_heads=_grouped(read.count("num_kv_heads", heads) if settings.get("num_kv_heads") else heads, heads),
        ff=measured.ff,
        rows=measured.rows,
        context=read.count("max_position_embeddings", settings.get("seq_length")),
        rotary_pct=1.0,
        rotary_base=read.number("rotary_emb_base", 10000),
        norm=norm,
        norm_eps=epsilon,
        parallel_residual=False,
        activation="silu",
        attention_bias=_holds(index, "attention.query_key_value.bias", "attention.qkv.bias"),
        mlp_bias=_holds(index, "mlp.linear1.bias", "mlp.fc1_bias"),
        tied=not read.truth("no_weight_tying", False),
        window=read.count("sliding_window_width") + 1 if window else None,  # i - j <= W
    )
    return config, (*notes, *stale(where, "padded_vocab_size", settings.get("padded_vocab_size"), config.rows))


def _grouped(kv_heads: int, heads: int) -> int | None:
    """Heads of keys and values; None where every query has its own."""
    return None if kv_heads == heads else kv_heads


def _norm(index: Index, epsilon: float, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """RMSNorm in the form that the model was trained with, and a note; raises CheckpointError where nothing tells."""
    if asked not in (None, _INSIDE, _OUTSIDE):
        raise PlanError(f"--rmsnorm {asked}: expected {_INSIDE} or {_OUTSIDE}.")
    settings = index.settings
    known = _INSIDE if settings.get("rmsnorm_fusion") or settings.get("norm") == "te_rmsnorm" else None
    form = asked or known or (_INSIDE if epsilon <= _VANISHING else _OUTSIDE if is_older(index) else None)
    if form is None:
        raise CheckpointError(
            f"{index.where}: nothing in the files tells where RMSNorm adds its epsilon ({epsilon:g}), which gpt-neox "
            "changed on 2025-05-09. Give --rmsnorm inside for x / sqrt(ms + eps), as since then, or --rmsnorm outside "
            "for x / (rms + eps), as before (docs/formats.md)."
        )
    if form == _INSIDE:
        return "rmsnorm", ()
    return "rmsnorm_outside", (
        f"trained with RMSNorm as x / (rms + {epsilon:g}); other programs have x / sqrt(ms + eps), and get {_TINY:g}",
    )


def sayable(config: ModelConfig) -> ModelConfig:
    """The hyperparameters for programs that have RMSNorm's epsilon inside of the root only."""
    return replace(config, norm="rmsnorm", norm_eps=_TINY) if config.norm == "rmsnorm_outside" else config


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a LlamaConfig or MistralConfig, in transformers 4's or 5's spelling."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    where = str(index.folder / "config.json")
    read = Settings(where, settings)
    heads, hidden = read.count("num_attention_heads"), read.count("hidden_size")
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": ("silu", settings.get("hidden_act", "silu")),
        "head_dim": (hidden // heads, settings.get("head_dim") or hidden // heads),
        "pretraining_tp": (1, settings.get("pretraining_tp", 1)),
    }
    problems = [
        f"rope_type is {kind!r:.80}, which is not supported; expected 'default'" for kind in rope_types(settings)
    ]
    problems += [
        f"{key} is {found!r:.80}, which is not supported; expected {expected!r}"
        for key, (expected, found) in wanted.items()
        if found != expected
    ]
    raise_all(CheckpointError, (f"{where}: {problem}." for problem in problems))
    kv_heads = read.count("num_key_value_heads", heads) if settings.get("num_key_value_heads") else heads
    mistral = settings.get("model_type") == "mistral"
    window = settings.get("sliding_window", 4096) if mistral else None  # MistralConfig's default
    config = ModelConfig(
        layers=read.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_grouped(kv_heads, heads),
        ff=read.count("intermediate_size"),
        rows=measured.rows or read.count("vocab_size"),
        context=read.count("max_position_embeddings", 2048),
        rotary_pct=1.0,
        rotary_base=agreed_rotary(read, "rope_theta", "rope_theta", 10000),
        norm="rmsnorm",
        norm_eps=read.number("rms_norm_eps", 1e-6),
        parallel_residual=False,
        activation="silu",
        attention_bias=not mistral and read.truth("attention_bias", False),
        mlp_bias=not mistral and read.truth("mlp_bias", False),
        tied=read.truth("tie_word_embeddings", False),
        window=None if window is None else read.count("sliding_window", window),
    )
    return config, stale(where, "vocab_size", read.count("vocab_size"), config.rows)


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
        layers=read.count("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=_grouped(read.count("attention.head_count_kv", heads), heads),
        ff=read.count("feed_forward_length"),
        rows=measured.rows,
        context=read.count("context_length"),
        rotary_pct=1.0,
        rotary_base=base,
        norm="rmsnorm",
        norm_eps=rounded(read.number("attention.layer_norm_rms_epsilon")),
        parallel_residual=False,
        activation="silu",
        attention_bias=_holds(index, "attn_q.bias"),
        mlp_bias=_holds(index, "ffn_gate.bias"),
        tied=measured.tied,
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


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model, in today's keys (since 2024-11-14).

    gpt-neox takes two thirds of `intermediate_size` for a gated MLP, so three times as much as there is makes one.
    Raises PlanError for what they cannot say.
    """
    if not config.rotary_base.is_integer():
        raise PlanError(f"--to slim: the rotary base is {config.rotary_base}; gpt-neox's is a whole number.")
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        **({"num_kv_heads": config.key_heads} if config.kv_heads else {}),
        "intermediate_size": 3 * config.ff,
        "mlp_multiple_of": 1,
        "seq_length": config.context,
        "max_position_embeddings": config.context,
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.norm_eps,
        "pos_emb": "rotary",
        "rotary_pct": 1.0,
        "rotary_emb_base": int(config.rotary_base),
        "no_weight_tying": not config.tied,
        "gpt_j_residual": False,
        "activation": "swiglu",
        "use_bias_in_attn_linear": config.attention_bias,
        "use_bias_in_mlp": config.mlp_bias,
        **({"sliding_window_width": config.window - 1} if config.window else {}),
    }

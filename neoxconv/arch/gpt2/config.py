"""GPT-2's hyperparameters in the words of gpt-neox's YAML, Hugging Face's config.json and GGUF's keys."""

from __future__ import annotations

from typing import Any

from neoxconv.arch.gguf_keys import GgufKeys, rounded
from neoxconv.arch.gpt_neox.config import ALLOWED
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import GELUS, OF_GPT2, Settings, by_own_names, stale
from neoxconv.arch.training_settings import Allowed, grouped, other_width, refused, with_layer_norms
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError, raise_all

PRESETS: dict[str, ModelConfig] = {}

# What GPT-NeoX has too, one after the other: attention, then the MLP.
SERIAL: Allowed = {
    **ALLOWED,
    "gpt_j_residual": (False, (False,)),
    "opt_pos_emb_offset": (0, (0,)),
}
_PLACED: Allowed = {**SERIAL, "pos_emb": ("learned", ("learned", "none", "sinusoidal"))}
_TABLE = "0.position_embeddings.weight"
_HF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def from_neox(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML; for positions that are not learned see positions.py."""
    if opening.preset or not index.settings:
        return from_preset(index, measured, opening, PRESETS)
    kind = index.settings.get("pos_emb", "learned")
    if kind != "learned" and _TABLE in index.ranks[0]:
        raise CheckpointError(
            f"{', '.join(map(str, index.configs))}: pos_emb is {kind}, but the layer files have learned positions "
            f"({_TABLE}); give the right YAML with --config."
        )
    return serial_from_neox(index, measured, _PLACED, "learned")


def serial_from_neox(
    index: Index, measured: Measured, allowed: Allowed, positions: str
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a YAML that says no other settings than `allowed`."""
    settings, where = index.settings, ", ".join(map(str, index.configs))
    read = Settings(where, settings)
    heads = read.count("num_attention_heads")
    problems = refused(settings, allowed) + grouped(settings)
    raise_all(CheckpointError, (f"{where}: {problem}." for problem in problems))
    config = ModelConfig(
        layers=read.count("num_layers"),
        hidden=read.count("hidden_size"),
        heads=heads,
        ff=measured.ff,
        rows=measured.rows,
        context=read.count("max_position_embeddings", settings.get("seq_length")),
        positions=positions,
        rotary_pct=0.0,
        rotary_base=1e4,
        norm_eps=read.number("layernorm_epsilon", 1e-5),
        parallel_residual=False,
        activation="gelu_tanh" if read.truth("bias_gelu_fusion", False) else "gelu",
        tied=not read.truth("no_weight_tying", False),
    )
    return config, stale(where, "padded_vocab_size", settings.get("padded_vocab_size"), config.rows)


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GPT2Config."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    where = str(index.folder / "config.json")
    activation = settings.get("activation_function", "gelu_new")
    wanted: dict[str, tuple[Any, Any]] = {
        "activation_function": (tuple(GELUS), activation),
        "scale_attn_weights": ((True,), settings.get("scale_attn_weights", True)),
        "scale_attn_by_inverse_layer_idx": ((False,), settings.get("scale_attn_by_inverse_layer_idx", False)),
        "add_cross_attention": ((False,), settings.get("add_cross_attention", False)),
    }
    raise_all(CheckpointError, (
        f"{where}: {key} is {found!r:.80}, which is not supported; expected {' or '.join(map(str, values))}."
        for key, (values, found) in wanted.items()
        if found not in values
    ))  # fmt: skip
    read = by_own_names(Settings(where, settings), OF_GPT2)
    hidden = read.count("n_embd", 768)
    config = ModelConfig(
        layers=read.count("n_layer", 12),
        hidden=hidden,
        heads=read.count("n_head", 12),
        ff=read.count("n_inner") if settings.get("n_inner") else 4 * hidden,
        rows=measured.rows or read.count("vocab_size", 50257),
        context=read.count("n_positions", 1024),
        positions="learned",
        rotary_pct=0.0,
        rotary_base=1e4,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        parallel_residual=False,
        activation=GELUS[activation],
        tied=read.truth("tie_word_embeddings", True),
    )
    return config, stale(where, "vocab_size", read.count("vocab_size", 50257), config.rows)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel."""
    return {
        "activation_function": _HF_ACTIVATION[config.activation],
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "dtype": dtype,
        "embd_pdrop": 0.0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": "gpt2",
        "n_ctx": config.context,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_inner": config.ff,
        "n_layer": config.layers,
        "n_positions": config.context,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.rows,
    }


_READ = ("attention.head_count_kv", "attention.layer_norm_epsilon")


def from_gguf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GGUF's `gpt2.` keys; the activation is the one that llama.cpp computes."""
    if opening.preset:
        return from_preset(index, measured, opening, PRESETS)
    return serial_from_gguf(GgufKeys.of(index, "gpt2"), measured, "learned", {})


def serial_from_gguf(
    keys: GgufKeys, measured: Measured, positions: str, own: dict[str, tuple[Any, ...]]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of keys; `own` are values of further ones that leave the function as it is."""
    read = keys.read
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    keys.refuse_unread(hidden, heads, 1e4, {"attention.head_count_kv": (heads,), **own})
    config = ModelConfig(
        **keys.sizes(measured),
        heads=heads,
        positions=positions,
        rotary_pct=0.0,
        rotary_base=1e4,
        norm_eps=rounded(read.number("attention.layer_norm_epsilon")),
        parallel_residual=False,
        activation="gelu_tanh",
    )
    return config, keys.notes((*_READ, *own), config.rows)


def to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The `gpt2.` keys as llama.cpp's converter writes them."""
    return {
        "gpt2.block_count": config.layers,
        "gpt2.context_length": config.context,
        "gpt2.embedding_length": config.hidden,
        "gpt2.feed_forward_length": config.ff,
        "gpt2.attention.head_count": config.heads,
        "gpt2.attention.layer_norm_epsilon": config.norm_eps,
    }


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model. Raises PlanError for what they cannot say."""
    raise_all(PlanError, other_width(config))
    return with_layer_norms(config, {"pos_emb": config.positions})

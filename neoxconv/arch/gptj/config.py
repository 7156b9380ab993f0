"""GPT-J's hyperparameters in the words of Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

from neoxconv.arch.gguf_keys import share
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import GELUS, OF_GPT2, Settings, by_own_names, stale
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig

_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new"}

PRESETS = {
    "gpt-j-6B": ModelConfig(
        layers=28,
        hidden=4096,
        heads=16,
        ff=16384,
        rows=50400,
        context=2048,
        rotary_pct=0.25,
        rotary_base=1e4,
        norm_eps=1e-5,
        parallel_residual=True,
        activation="gelu_tanh",
        tied=False,
        attention_bias=False,
        shared_norm=True,
    )
}


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GPTJConfig; what it leaves out is as transformers has it."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    where = str(index.folder / "config.json")
    read = by_own_names(Settings(where, settings), OF_GPT2)
    hidden, heads = read.count("n_embd", 4096), read.count("n_head", 16)
    config = ModelConfig(
        layers=read.count("n_layer", 28),
        hidden=hidden,
        heads=heads,
        ff=4 * hidden if settings.get("n_inner") is None else read.count("n_inner"),
        rows=measured.rows or read.count("vocab_size"),
        context=read.count("n_positions", 2048),
        rotary_pct=_rotary_pct(read, max(1, hidden // heads)),
        rotary_base=1e4,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        parallel_residual=True,
        activation=GELUS[read.one_of("activation_function", "gelu_new", GELUS)],
        tied=read.truth("tie_word_embeddings", False),
        attention_bias=False,
        shared_norm=True,
    )
    return config, stale(where, "vocab_size", settings.get("vocab_size"), config.rows)


def _rotary_pct(read: Settings, head: int) -> float:
    """The rotated part of a head of that size; raises CheckpointError for what transformers cannot run either."""
    dims = read.count("rotary_dim", 64)
    if dims % 2 or dims > head:
        read.refuse("rotary_dim", dims, f"an even number, {head} (a head's size) at most")
    return share(dims, head)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a GPTJForCausalLM."""
    return {
        "activation_function": _ACTIVATION[config.activation],
        "architectures": ["GPTJForCausalLM"],
        "attn_pdrop": 0.0,
        "bos_token_id": 50256,
        "dtype": dtype,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": "gptj",
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_inner": config.ff,
        "n_layer": config.layers,
        "n_positions": config.context,
        "resid_pdrop": 0.0,
        "rotary_dim": config.rotary_dims,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.rows,
    }

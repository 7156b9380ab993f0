"""GPT-Neo's hyperparameters in the words of Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import GELUS, Settings, by_own_names, stale
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError

_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
_OTHERS = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # its attribute_map in transformers
_GLOBAL, _LOCAL = "global", "local"  # kinds of attention
_DEEPEST = 1 << 16  # layers that a list of kinds may be for


def _released(layers: int, hidden: int, heads: int) -> ModelConfig:
    """A released model: every other layer sees 256 tokens, context 2048, tanh GELU, a tied head."""
    return ModelConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        ff=4 * hidden,
        rows=50257,
        context=2048,
        positions="learned",
        rotary_pct=0.0,
        rotary_base=1e4,
        norm_eps=1e-5,
        parallel_residual=False,
        activation="gelu_tanh",
        tied=True,
        attention_bias=False,
        window=256,
        unwindowed=tuple(range(0, layers, 2)),
        scaled_scores=False,
    )


PRESETS = {
    "gpt-neo-125m": _released(12, 768, 12),
    "gpt-neo-1.3B": _released(24, 2048, 16),
    "gpt-neo-2.7B": _released(32, 2560, 20),
}


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a GPTNeoConfig; what it leaves out is as transformers has it."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    where = str(index.folder / "config.json")
    read = by_own_names(Settings(where, settings), _OTHERS)
    hidden, layers = read.count("hidden_size", 2048), read.count("num_layers", 24)
    kinds = _attention_layers(read, layers)
    config = ModelConfig(
        layers=layers,
        hidden=hidden,
        heads=read.count("num_heads", 16),
        ff=4 * hidden if settings.get("intermediate_size") is None else read.count("intermediate_size"),
        rows=measured.rows or read.count("vocab_size"),
        context=read.count("max_position_embeddings", 2048),
        positions="learned",
        rotary_pct=0.0,
        rotary_base=1e4,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        parallel_residual=False,
        activation=GELUS[read.one_of("activation_function", "gelu_new", GELUS)],
        tied=read.truth("tie_word_embeddings", True),
        attention_bias=False,
        window=read.count("window_size", 256) if _LOCAL in kinds else None,
        unwindowed=tuple(i for i, kind in enumerate(kinds) if kind == _GLOBAL) if _LOCAL in kinds else (),
        scaled_scores=False,
    )
    return config, stale(where, "vocab_size", settings.get("vocab_size"), config.rows)


def _attention_layers(read: Settings, layers: int) -> list[str]:
    """The kind of every layer, from `attention_types`; raises CheckpointError where `attention_layers` differs."""
    said = read.values.get("attention_types") or [[[_GLOBAL, _LOCAL], 12]]
    kinds = _expanded(said)
    if kinds is None or len(kinds) != layers:
        read.refuse("attention_types", said, f"[[[kinds], times], ...] for {layers} layers, kinds of global and local")
    each = read.values.get("attention_layers")
    if each is not None and each != kinds:
        raise CheckpointError(
            f"{read.where}: attention_layers is {str(each)[:60]} but attention_types is {str(said)[:60]}; "
            "make them say the same, or remove the wrong one."
        )
    return kinds


def _expanded(said: Any) -> list[str] | None:
    """The kinds that [[[kind, ...], times], ...] stands for; None where it is no such list."""
    kinds: list[str] = []
    for item in said if isinstance(said, list) else ():
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and type(item[1]) is int):
            return None
        if any(kind not in (_GLOBAL, _LOCAL) for kind in item[0]) or not 0 < item[1] * len(item[0]) <= _DEEPEST:
            return None
        kinds += item[0] * item[1]
    return kinds or None


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a GPTNeoForCausalLM."""
    kinds = [
        _GLOBAL if config.window is None or layer in config.unwindowed else _LOCAL for layer in range(config.layers)
    ]
    alternate = [_GLOBAL, _LOCAL] * (config.layers // 2)
    return {
        "activation_function": _ACTIVATION[config.activation],
        "architectures": ["GPTNeoForCausalLM"],
        "attention_dropout": 0.0,
        "attention_layers": kinds,
        "attention_types": [[[_GLOBAL, _LOCAL], config.layers // 2]] if kinds == alternate else [[kinds, 1]],
        "bos_token_id": 50256,
        "dtype": dtype,
        "embed_dropout": 0.0,
        "eos_token_id": 50256,
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ff,
        "layer_norm_epsilon": config.norm_eps,
        "max_position_embeddings": config.context,
        "model_type": "gpt_neo",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "resid_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.rows,
        "window_size": config.window or 256,
    }

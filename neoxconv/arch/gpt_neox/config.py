"""GPT-NeoX's hyperparameters in the words of gpt-neox's YAML and Hugging Face's config.json; GGUF's: config_gguf.py.

A setting that changes the function is either implemented or refused by name: ALLOWED lists what is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from neoxconv.arch.gpt_neox.shared_norm import shared_norm
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import GELUS, Settings, agreed_rotary, rope_types, stale
from neoxconv.arch.training_settings import grouped, refused
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, raise_all


@dataclass(frozen=True)
class _Preset:
    """A released model, its head not tied; unless it says otherwise with the 20B model's settings."""

    name: str
    layers: int
    hidden: int
    heads: int
    rows: int
    context: int = 2048
    rotary_pct: float = 0.25
    parallel_residual: bool = True
    activation: str = "gelu_tanh"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ff=4 * self.hidden,
            rows=self.rows,
            context=self.context,
            rotary_pct=self.rotary_pct,
            rotary_base=1e4,
            norm_eps=1e-5,
            parallel_residual=self.parallel_residual,
            activation=self.activation,
            tied=False,
        )


# What Hugging Face's config.json of many relatives says: no parallel residual, whole heads rotated, the erf GELU.
_sequential = partial(_Preset, rotary_pct=1.0, parallel_residual=False, activation="gelu")

PRESETS: dict[str, ModelConfig] = {
    preset.name: preset.config
    for preset in (
        # GPT-NeoXT-Chat-Base-20B too: the same shapes and settings (its config.json on Hugging Face).
        _Preset("20B", 44, 6144, 64, 50432),
        _Preset("pythia-14m", 6, 128, 4, 50304),
        _Preset("pythia-31m", 6, 256, 8, 50304),
        _Preset("pythia-70m", 6, 512, 8, 50304),
        _Preset("pythia-160m", 12, 768, 12, 50304),
        _Preset("pythia-410m", 24, 1024, 16, 50304),
        _Preset("pythia-1b", 16, 2048, 8, 50304),
        _Preset("pythia-1.4b", 24, 2048, 16, 50304),
        _Preset("pythia-2.8b", 32, 2560, 32, 50304),
        _Preset("pythia-6.9b", 32, 4096, 32, 50432),
        _Preset("pythia-12b", 36, 5120, 40, 50688),
        # As their config.json says; read from lit-gpt's table of them (Lightning-AI/litgpt, lit_gpt/config.py,
        # and the erf GELU of its GptNeoxMLP).
        _sequential("redpajama-incite-3b", 32, 2560, 32, 50432),
        _sequential("redpajama-incite-7b", 32, 4096, 32, 50432),
        _Preset("stablelm-alpha-3b", 16, 4096, 32, 50688, context=4096, activation="gelu"),
        _Preset("stablelm-alpha-7b", 16, 6144, 48, 50432, context=4096, activation="gelu"),
        # Tuned in transformers from Pythia: config.json of ethzanalytics/dolly-v2-7b-sharded and -12b-sharded, and of
        # monotykamary/dolly-3b-lora-merged-dwarves-poc; vocabularies also in mlc-llm's MODEL_CONFIG.
        _Preset("dolly-v2-3b", 32, 2560, 32, 50280, activation="gelu"),
        _Preset("dolly-v2-7b", 32, 4096, 32, 50280, activation="gelu"),
        _Preset("dolly-v2-12b", 36, 5120, 40, 50280, activation="gelu"),
        # config.json of OpenAssistant/oasst-sft-1-pythia-12b; oasst-sft-4-pythia-12b-epoch-3.5 is the same.
        _Preset("oasst-pythia-12b", 36, 5120, 40, 50288, activation="gelu"),
        # config.json of EleutherAI/polyglot-ko-*.
        _Preset("polyglot-ko-1.3b", 24, 2048, 16, 30080, rotary_pct=0.5, activation="gelu"),
        _Preset("polyglot-ko-3.8b", 32, 3072, 24, 30080, rotary_pct=0.5, activation="gelu"),
        _Preset("polyglot-ko-5.8b", 28, 4096, 16, 30080, activation="gelu"),
        _Preset("polyglot-ko-12.8b", 40, 5120, 40, 30080, rotary_pct=0.5, activation="gelu"),
        # config.json of rinna/japanese-gpt-neox-3.6b, and of quantized copies of rinna's other two.
        _sequential("japanese-gpt-neox-small", 12, 768, 12, 44416),
        _sequential("japanese-gpt-neox-3.6b", 36, 2816, 22, 32000),
        _sequential("bilingual-gpt-neox-4b", 36, 2816, 22, 65536),
        # config.json of cyberagent/open-calm-*, large's and 7b's as in copies; 3b's vocabulary was not found.
        _sequential("open-calm-small", 12, 768, 12, 52096),
        _sequential("open-calm-medium", 24, 1024, 16, 52096),
        _sequential("open-calm-large", 24, 1536, 16, 52096),
        _sequential("open-calm-1b", 24, 2048, 16, 52096),
        _sequential("open-calm-7b", 32, 4096, 32, 52224),
        # VHellendoorn/Code-LMs, Convert2HF/polycoder/configs; its README says that the 2.7B had bias_gelu_fusion.
        _sequential("polycoder-160M", 12, 768, 12, 50304),
        _sequential("polycoder-0.4B", 24, 1024, 16, 50304),
        _sequential("polycoder-2.7B", 32, 2560, 32, 50304, activation="gelu_tanh"),
    )
}

# gpt-neox's YAML: what each key is where the file is silent, and the values that give the function implemented here.
ALLOWED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "pos_emb": ("learned", ("rotary",)),
    "norm": ("layernorm", ("layernorm",)),
    "activation": ("gelu", ("gelu",)),
    "gpt_j_tied": (False, (False, True)),
    "apply_layernorm_1p": (False, (False,)),
    "use_bias_in_attn_linear": (True, (True,)),
    "use_bias_in_mlp": (True, (True,)),
    "use_qk_layernorm": (False, (False,)),
    "use_mup": (False, (False,)),
    "mlp_type": ("regular", ("regular",)),
    "moe_num_experts": (1, (0, 1)),
    "sliding_window_width": (None, (None,)),
    "rotary_interleaved": (False, (False,)),
    "rope_scaling": (None, (None,)),
    "train_impl": ("normal", ("normal", "dpo", "kto", "reinforce")),
}


def from_neox(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML, else a released model of the same shapes."""
    if opening.preset or not index.settings:
        return from_preset(index, measured, opening, PRESETS)
    settings, where = index.settings, ", ".join(map(str, index.configs))
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    problems = [
        f"{key} is missing; add it, or give --config FILE or --preset NAME" for key in needed if key not in settings
    ]
    raise_all(
        CheckpointError,
        (f"{where}: {problem}." for problem in problems + refused(settings, ALLOWED) + grouped(settings)),
    )
    read = Settings(where, settings)
    shared, notes = shared_norm(index, read, asked=bool(opening.config))
    config = ModelConfig(
        layers=read.count("num_layers"),
        hidden=read.count("hidden_size"),
        heads=read.count("num_attention_heads"),
        ff=measured.ff,
        rows=measured.rows,
        context=read.count("max_position_embeddings", settings.get("seq_length")),
        rotary_pct=read.number("rotary_pct", 1.0, most=1),
        rotary_base=read.number("rotary_emb_base", 10000),
        norm_eps=read.number("layernorm_epsilon", 1e-5),
        parallel_residual=read.truth("gpt_j_residual", False),
        activation="gelu_tanh" if read.truth("bias_gelu_fusion", False) else "gelu",
        tied=not read.truth("no_weight_tying", False),
        shared_norm=shared,
    )
    return config, (*notes, *stale(where, "padded_vocab_size", settings.get("padded_vocab_size"), config.rows))


_HF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_fast"}


def from_hf(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a config.json, in transformers 4's or 5's spelling."""
    settings = index.settings
    if opening.preset or not settings:
        return from_preset(index, measured, opening, PRESETS)
    activation = settings.get("hidden_act", "gelu")
    where = str(index.folder / "config.json")
    problems = [
        f"{where}: {key} is {found!r:.80}, which is not supported; expected {expected}."
        for key, found, expected in (
            *(("rope_type", rope_type, "default") for rope_type in rope_types(settings)),
            ("hidden_act", activation, " or ".join(GELUS)),
            ("attention_bias", settings.get("attention_bias", True), True),
        )
        if found not in ((*GELUS,) if key == "hidden_act" else (expected,))
    ]
    raise_all(CheckpointError, problems)
    read = Settings(where, settings)
    config = ModelConfig(
        layers=read.count("num_hidden_layers"),
        hidden=read.count("hidden_size"),
        heads=read.count("num_attention_heads"),
        ff=read.count("intermediate_size"),
        rows=measured.rows or read.count("vocab_size"),
        context=read.count("max_position_embeddings", 2048),
        rotary_pct=agreed_rotary(read, "rotary_pct", "partial_rotary_factor", 0.25, most=1),
        rotary_base=agreed_rotary(read, "rotary_emb_base", "rope_theta", 10000),
        norm_eps=read.number("layer_norm_eps", 1e-5),
        parallel_residual=read.truth("use_parallel_residual", True),
        activation=GELUS[activation],
        tied=read.truth("tie_word_embeddings", False),
    )
    return config, stale(where, "vocab_size", read.count("vocab_size"), config.rows)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in transformers 4's and 5's spelling at once, because tools read one or the other."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": dtype,
        "eos_token_id": 0,
        "hidden_act": _HF_ACTIVATION[config.activation],
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ff,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "model_type": "gpt_neox",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "rope_parameters": {
            "partial_rotary_factor": config.rotary_pct,
            "rope_theta": config.rotary_base,
            "rope_type": "default",
        },
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_pct,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_parallel_residual": config.parallel_residual,
        "vocab_size": config.rows,
    }

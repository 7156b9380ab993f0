"""GPT-NeoX's hyperparameters in the words of gpt-neox's YAML and Hugging Face's config.json; GGUF's: config_gguf.py.

A setting that changes the function is either implemented or refused by name: _ALLOWED lists what is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neoxconv.arch.settings import Settings
from neoxconv.core.model import Index, Measured, ModelConfig
from neoxconv.errors import CheckpointError, PlanError, raise_all


@dataclass(frozen=True)
class _Preset:
    """A released model: a quarter of each head rotated, parallel residual, tanh GELU, context 2048, no tying."""

    name: str
    layers: int
    hidden: int
    heads: int
    rows: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ff=4 * self.hidden,
            rows=self.rows,
            context=2048,
            rotary_pct=0.25,
            rotary_base=1e4,
            norm_eps=1e-5,
            parallel_residual=True,
            activation="gelu_tanh",
            tied=False,
        )


PRESETS: dict[str, _Preset] = {
    preset.name: preset
    for preset in (
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
    )
}

# gpt-neox's YAML: what each key is where the file is silent, and the values that give the function implemented here.
_ALLOWED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "pos_emb": ("learned", ("rotary",)),
    "norm": ("layernorm", ("layernorm",)),
    "activation": ("gelu", ("gelu",)),
    "gpt_j_tied": (False, (False,)),
    "apply_layernorm_1p": (False, (False,)),
    "use_bias_in_norms": (True, (True,)),
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
_ATTENTION = ("global", "flash")
_DEEPEST = 4  # lists in one another in an `attention_config`


def _attention_types(value: Any, depth: int = 0) -> set[str]:
    """The names in an `attention_config`, such as [[["global"], 44]]; a YAML may nest it without end."""
    if isinstance(value, str):
        return {value}
    inside = value if isinstance(value, list | tuple) and depth < _DEEPEST else ()
    return set().union(*(_attention_types(item, depth + 1) for item in inside))


def refused(settings: Mapping[str, Any]) -> list[str]:
    """Each setting with a value that would change the function in a way that is not implemented."""
    found = [
        f"{key}: {settings.get(key, default)} is not supported, only {' or '.join(map(str, allowed))}"
        + ("" if key in settings else f" (gpt-neox takes {default} where its YAML does not say)")
        for key, (default, allowed) in _ALLOWED.items()
        if settings.get(key, default) not in allowed
    ]
    found += [
        f"attention_config: {kind} is not supported"
        for kind in sorted(_attention_types(settings.get("attention_config")) - set(_ATTENTION))
    ]
    heads = settings.get("num_attention_heads")
    if settings.get("num_kv_heads") not in (None, heads):
        found.append(
            f"num_kv_heads: {settings['num_kv_heads']} is not num_attention_heads ({heads}); "
            "grouped queries are not supported"
        )
    tuning = settings.get("soft_prompt_tuning")
    if isinstance(tuning, Mapping) and tuning.get("enabled"):
        found.append("soft_prompt_tuning: enabled is not supported")
    return found


def from_neox(index: Index, measured: Measured, preset: str | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML, else a released model of the same shapes."""
    if preset or not index.settings:
        return from_preset(index, measured, preset)
    settings, where = index.settings, ", ".join(map(str, index.configs))
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    problems = [
        f"{key} is missing; add it, or give --config FILE or --preset NAME" for key in needed if key not in settings
    ]
    raise_all(CheckpointError, (f"{where}: {problem}." for problem in problems + refused(settings)))
    read = Settings(where, settings)
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
    )
    return config, stale(where, "padded_vocab_size", settings.get("padded_vocab_size"), config.rows)


def from_preset(index: Index, measured: Measured, preset: str | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The named released model, or the only one whose shapes fit."""
    if preset:
        if preset not in PRESETS:
            raise PlanError(f"--preset {preset}: expected one of {', '.join(PRESETS)}.")
        config = PRESETS[preset].config
        if measured.hidden not in (0, config.hidden):
            raise PlanError(
                f"--preset {preset}: has hidden size {config.hidden}, but {index.where} has {measured.hidden}; "
                "give the right preset."
            )
        return config, ()
    shapes = (measured.layers, measured.hidden, measured.ff, measured.rows, measured.tied)
    fits = [p for p in PRESETS.values() if (p.layers, p.hidden, 4 * p.hidden, p.rows, False) == shapes]
    known = f"{measured.layers} layers, hidden {measured.hidden}, ff {measured.ff}, {measured.rows} vocabulary rows"
    if len(fits) == 1:
        return fits[0].config, (
            f"no configuration found; the shapes ({known}) are those of {fits[0].name}, so its settings are used",
        )
    which = f"{' and '.join(p.name for p in fits)} have these shapes" if fits else "no released model has these shapes"
    training = (
        "Give the training YAML with --config FILE" if index.format == "neox" else "Put its config.json beside it"
    )
    raise CheckpointError(
        f"{index.where}: there is no configuration beside the weights, and {which} ({known}). Unknown: "
        "num_attention_heads, max_position_embeddings, rotary_pct, rotary_emb_base, gpt_j_residual, bias_gelu_fusion, "
        f"layernorm_epsilon. {training}, or give --preset NAME."
    )


# Hugging Face's hidden_act and the function it names.
_ACTIVATIONS = {"gelu": "gelu", "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Of transformers 5, and what it reads in its place where that is given.
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
_HF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_fast"}


def from_hf(index: Index, measured: Measured, preset: str | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters of a config.json, in transformers 4's or 5's spelling."""
    settings = index.settings
    if preset or not settings:
        return from_preset(index, measured, preset)
    tables = [_as_table(settings.get(key)) for key in _ROPE_TABLES]
    rope_types = [t[key] for t in tables for key in ("rope_type", "type") if t.get(key, "default") != "default"]
    activation = settings.get("hidden_act", "gelu")
    where = str(index.folder / "config.json")
    problems = [
        f"{where}: {key} is {found!r:.80}, which is not supported; expected {expected}."
        for key, found, expected in (
            *(("rope_type", rope_type, "default") for rope_type in rope_types),
            ("hidden_act", activation, " or ".join(_ACTIVATIONS)),
            ("attention_bias", settings.get("attention_bias", True), True),
        )
        if found not in ((*_ACTIVATIONS,) if key == "hidden_act" else (expected,))
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
        rotary_pct=_agreed(read, "rotary_pct", "partial_rotary_factor", 0.25, most=1),
        rotary_base=_agreed(read, "rotary_emb_base", "rope_theta", 10000),
        norm_eps=read.number("layer_norm_eps", 1e-5),
        parallel_residual=read.truth("use_parallel_residual", True),
        activation=_ACTIVATIONS[activation],
        tied=read.truth("tie_word_embeddings", False),
    )
    return config, stale(where, "vocab_size", read.count("vocab_size"), config.rows)


def _agreed(read: Settings, old: str, new: str, default: float, most: float = float("inf")) -> float:
    """A rotary setting, under transformers 4's name `old` or, in a table of rotary settings, 5's name `new`.

    Raises CheckpointError where two disagree. `new` outside of a table is read by neither version, so alone it is held
    against the default.
    """
    values = read.values
    tables = {name: _as_table(values.get(name)) for name in _ROPE_TABLES}
    found = {old: values[old]} if old in values else {}
    found |= {f"{name}.{new}": table[new] for name, table in tables.items() if new in table}
    found = found or {old: default}
    found |= {new: values[new]} if new in values else {}
    spelled = Settings(read.where, found)
    numbers = {key: spelled.number(key, most=most) for key in found}
    if len(set(numbers.values())) > 1:
        told = " but ".join(f"{key} is {number:.15g}" for key, number in numbers.items())
        raise CheckpointError(
            f"{read.where}: {told}; transformers 4 takes {old}, 5 takes rope_parameters. "
            "Remove the wrong one, or make them equal."
        )
    return next(iter(numbers.values()))


def stale(where: str, key: str, said: Any, rows: int) -> tuple[str, ...]:
    """A note where a configuration's size of the vocabulary is not the rows that there are."""
    if said in (None, rows):
        return ()
    return (f"{where}: {key} is {str(said)[:60]} but the embedding has {rows} rows; the latter is used",)


def _as_table(value: Any) -> Mapping[str, Any]:
    """A section of a configuration; nothing where it is none."""
    return value if isinstance(value, Mapping) else {}


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

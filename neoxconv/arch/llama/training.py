"""Llama's and Mistral's hyperparameters in the words of gpt-neox's YAML, and what only the date of its code tells.

Twice gpt-neox changed the function of weights without a change of names: the order of grouped queries, keys and values
on 2024-11-14, RMSNorm's epsilon on 2025-05-09. Neither is guessed. What dates the code are names of tensors, and keys
of the YAML: a version refuses those that it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neoxconv.arch.llama.config import PRESETS, TINY, grouped, holds, sayable
from neoxconv.arch.presets import from_preset
from neoxconv.arch.settings import Settings, stale
from neoxconv.arch.training_settings import refused
from neoxconv.core.model import OWN_STATE, Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError, UntoldError, raise_all

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
# By what it tells: the option's values, the older first, and keys that only code of before, or of since then knows.
# Source: the fields of NeoXArgs before and after gpt-neox's 0d4bdb96, 96c242eb (rows) and 4c9f1081 (epsilon).
_NEWEST = ("moe_expert_interval", "moe_router_type", "fused_kernels_build_path")
_DATED: dict[str, dict[str, tuple[str, ...]]] = {
    "qkv_layout": {
        "per-head": ("mlp_type",),
        "blocks": (
            *_NEWEST, "te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha",
            "te_fp8_format", "kl_impl", "kl_div_beta", "fp32_reinforce", "reinforce_leave_one_out",
            "serve_model_weights", "weight_server_port", "online_dataserver_ips", "online_dataserver_ports",
            "peak_theoretical_tflops", "wandb_run_name",
        ),
    },
    "rmsnorm": {"outside": ("mlp_type", "detect_nvlink_pairs"), "inside": _NEWEST},
}  # fmt: skip
_VANISHING = 1e-7  # an epsilon of RMSNorm up to which both forms are one within float32
_TE_EPSILON = 1e-8  # of the norm in TransformerEngine's MLP, whatever the YAML says


def _is_older(index: Index) -> bool:
    """Whether the MLP has the names of before 2024-09."""
    return holds(index, "mlp.w1.weight")


def told(index: Index, what: str) -> str | None:
    """What the files tell of `qkv_layout` or `rmsnorm`, in the option's words; None where nothing does."""
    answers = _DATED[what]
    state = next(iter(index.states.values()), None)
    own = state.get(OWN_STATE) if isinstance(state, Mapping) else None
    if isinstance(own, Mapping) and own.get(what) in answers:
        return str(own[what])
    if _is_older(index):
        return next(iter(answers))
    found = [answer for answer, keys in answers.items() if not index.settings.keys().isdisjoint(keys)]
    return found[0] if len(found) == 1 else None


def from_neox(index: Index, measured: Measured, opening: Opening) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters from --preset, else the YAML; the MLP's width from the shapes."""
    if opening.preset or not index.settings:
        return from_preset(index, measured, opening, PRESETS)
    settings, where = index.settings, ", ".join(map(str, index.configs))
    read = Settings(where, settings)
    problems = [*refused(settings, _ALLOWED), *_not_gated_by_silu(settings)]
    raise_all(CheckpointError, (f"{where}: {problem}." for problem in problems))
    heads = read.count("num_attention_heads")
    window = settings.get("sliding_window_width")
    epsilon = _epsilon(index, read)
    norm, notes = _norm(index, epsilon, opening.rmsnorm)
    config = ModelConfig(
        layers=read.count("num_layers"),
        hidden=read.count("hidden_size"),
        heads=heads,
        kv_heads=grouped(read, "num_kv_heads", heads),
        ff=measured.ff,
        rows=measured.rows,
        context=read.count("max_position_embeddings", settings.get("seq_length")),
        rotary_pct=1.0,
        rotary_base=read.number("rotary_emb_base", 10000),
        norm=norm,
        norm_eps=epsilon,
        parallel_residual=False,
        activation="silu",
        attention_bias=_has_biases(index, read, "attention.qkv", "attention.query_key_value", "attn_linear"),
        mlp_bias=not _is_older(index) and _has_biases(index, read, "mlp.fc1", "mlp.linear1", "mlp"),
        tied=not read.truth("no_weight_tying", False),
        window=None if window is None else read.count("sliding_window_width") + 1,  # i - j <= W
    )
    return config, (*notes, *stale(where, "padded_vocab_size", settings.get("padded_vocab_size"), config.rows))


def _not_gated_by_silu(settings: Mapping[str, Any]) -> list[str]:
    """Why the MLP is another than silu(gate) * up: until 2024-09 `activation` named what `mlp_type: llama` gates by."""
    activation = settings.get("activation", "gelu")
    if activation == "swiglu" or (settings.get("mlp_type"), activation) == ("llama", "silu"):
        return []
    silent = "" if "activation" in settings else " (gpt-neox takes gelu where its YAML does not say)"
    return [f"activation: {activation} is not supported, only swiglu, or silu with mlp_type: llama{silent}"]


def _has_biases(index: Index, read: Settings, engine: str, own: str, key: str) -> bool:
    """Whether linears have biases: TransformerEngine's, named `engine`, always do, gpt-neox's `own` as the YAML says.

    Raises CheckpointError where the files contradict it.
    """
    if holds(index, f"{engine}.weight", f"{engine}_weight"):
        return True
    key = f"use_bias_in_{key}"
    said, found = read.truth(key, True), holds(index, f"{own}.bias")
    if said != found:
        silent = "" if key in read.values else ", which gpt-neox takes where its YAML does not say"
        raise CheckpointError(
            f"{read.where}: {key} is {said}{silent}, but the layer files have {'a' if found else 'no'} {own}.bias; "
            "give the right YAML with --config."
        )
    return found


def _epsilon(index: Index, read: Settings) -> float:
    """RMSNorm's epsilon; raises CheckpointError where TransformerEngine gave some of the norms another."""
    epsilon = read.number("rms_norm_epsilon", 1e-8)
    if holds(index, "mlp.layer_norm_weight") and epsilon != _TE_EPSILON:
        raise CheckpointError(
            f"{read.where}: rms_norm_epsilon is {epsilon:g}, but mlp.layer_norm_weight belongs to TransformerEngine's "
            f"MLP, whose epsilon is always {_TE_EPSILON:g}; one for all norms is supported. To have "
            f"{_TE_EPSILON:g} for all, give a YAML that says so with --config."
        )
    return epsilon


def _norm(index: Index, epsilon: float, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """RMSNorm in the form that the model was trained with, and a note; raises UntoldError where nothing tells."""
    if asked not in (None, *_DATED["rmsnorm"]):
        raise PlanError(f"--rmsnorm {asked}: expected {' or '.join(_DATED['rmsnorm'])}.")
    settings = index.settings
    fixed = settings.get("rmsnorm_fusion") or settings.get("norm") == "te_rmsnorm" or epsilon <= _VANISHING
    form = asked or ("inside" if fixed else told(index, "rmsnorm"))
    if form is None:
        raise UntoldError(
            f"{index.where}: nothing in the files tells where RMSNorm adds its epsilon ({epsilon:g}), which gpt-neox "
            "changed on 2025-05-09. Give --rmsnorm inside for x / sqrt(ms + eps), as since then, or --rmsnorm outside "
            "for x / (rms + eps), as before (docs/formats.md); `inspect --try TEXT` shows which one predicts better.",
            "rmsnorm",
            tuple(_DATED["rmsnorm"]),
        )
    if form == "inside":
        return "rmsnorm", ()
    return "rmsnorm_outside", (
        f"trained with RMSNorm as x / (rms + {epsilon:g}); other programs have x / sqrt(ms + eps), and get {TINY:g}",
    )


def to_neox(config: ModelConfig) -> dict[str, Any]:
    """The settings that make gpt-neox compute this model, in keys that code since 2025-05-09 knows.

    gpt-neox takes two thirds of `intermediate_size` for a gated MLP, so three times as much as there is makes one.
    `moe_expert_interval` changes nothing: older code, which would read the same rows otherwise, refuses it. Raises
    PlanError for what these settings cannot say.
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
        "rms_norm_epsilon": sayable(config).norm_eps,
        "pos_emb": "rotary",
        "rotary_pct": 1.0,
        "rotary_emb_base": int(config.rotary_base),
        "no_weight_tying": not config.tied,
        "gpt_j_residual": False,
        "activation": "swiglu",
        "use_bias_in_attn_linear": config.attention_bias,
        "use_bias_in_mlp": config.mlp_bias,
        "moe_expert_interval": 1,
        **({"sliding_window_width": config.window - 1} if config.window else {}),
    }

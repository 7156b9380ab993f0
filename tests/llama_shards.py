"""Llama and Mistral as gpt-neox stores them, made from transformers' weights without any code of this project.

Written from gpt-neox's forward pass (megatron/model/transformer.py): every rank gets the heads and the rows that it
computes with, in the order in which it takes them apart.

    query_key_value  no groups, or code until 2024-11-14: of each query head q, then its share of all k and all v
                     code since then, with groups: all q, all k, all v
    attention.qkv    (TransformerEngine) of each key head its queries, k, v
    mlp              w1 gate, w3 up, w2 down; linear1 [up, gate], linear2 down; (TE) fc1 [gate, up], fc2 down
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from neoxconv.synthetic import tiny

_STEP = "global_step7"
Files = dict[str, Any]


@dataclass(frozen=True)
class Era:
    """How a version of gpt-neox stores a Llama: `names` of the MLP (w, linear or te), `qkv` (per-head, blocks, te)."""

    names: str = "linear"
    qkv: str = "blocks"
    tp: int = 2
    pp: int = 1  # 0: sequential files
    dtype: str = "float16"
    te_norms: bool = False
    inside: bool | None = None  # where RMSNorm has its epsilon, as far as the YAML tells: a key of that code; None: not


def llama(
    kv_heads: int = 2, *, window: int | None = None, seed: int = 0, dtype: str = "float16", **changes: Any
) -> Any:
    """A tiny model of transformers: 4 query heads of 8, its weights such that a wrong order of rows shows."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 280, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    } | changes  # fmt: skip
    if "rope_parameters" not in sizes:
        sizes["rope_parameters"] = {"rope_theta": sizes["rope_theta"], "rope_type": "default"}
    model: Any = (
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
        if window
        else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name or "bias" in name else 0.15)
            values.copy_(values.to(getattr(torch, dtype)))
    return model.eval()


def write(folder: Path, model: Any, era: Era, **settings: Any) -> Path:
    """The checkpoint of a model in `folder`, which gpt-neox of that era would have saved; `settings` are of its YAML.

    Returns the folder that holds `latest`.
    """
    step = folder / _STEP
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text(_STEP)
    (folder / "tokenizer.json").write_bytes(tiny().data)
    words = {key: value for key, value in (yaml_of(model, era) | settings).items() if value is not None}
    (step / "configs" / "model.yml").write_text(yaml.safe_dump(words))
    for name, value in files(model, era).items():
        torch.save(value, step / name)
    return folder


def files(model: Any, era: Era) -> Files:
    """What each .pt file holds."""
    found: Files = {}
    ranks = [list(layers_of(model, era, rank)) for rank in range(era.tp)]
    state = {"iteration": 7, "global_steps": 7, "optimizer": None, "dp_world_size": 1, "args": {"num_layers": 3}}
    if era.pp == 0:
        return {
            f"mp_rank_{rank:02d}_model_states.pt": {
                **state,
                "module": OrderedDict(
                    (f"sequential.{number}.{name}", values)
                    for number, layer in layers
                    for name, values in layer.items()
                ),
                "mp_world_size": era.tp,
            }
            for rank, layers in enumerate(ranks)
        }
    for rank, layers in enumerate(ranks):
        found |= {f"layer_{number:02d}-model_{rank:02d}-model_states.pt": layer for number, layer in layers}
    stages = range(era.tp * era.pp)
    return found | {
        f"mp_rank_{rank:02d}_model_states.pt": {"module": None, **state, "mp_world_size": len(stages)}
        for rank in stages
    }


def layers_of(model: Any, era: Era, rank: int) -> Iterator[tuple[int, OrderedDict[str, Tensor]]]:
    """A rank's layers by gpt-neox's numbers; each tensor its own, as after training."""
    config, weights = model.config, model.state_dict()
    dtype = getattr(torch, era.dtype)

    def stored(tensors: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, values.to(dtype).clone()) for name, values in tensors.items())

    def rows(values: Tensor) -> Tensor:
        return values.chunk(era.tp)[rank]

    yield 0, stored({"word_embeddings.weight": rows(weights["model.embed_tokens.weight"])})
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}
        yield i + 2, stored(layer_of(layer, config, era, rank))
    norm = "norm.norm.weight" if era.te_norms else "norm.scale"
    yield config.num_hidden_layers + 3, stored({norm: weights["model.norm.weight"]})
    if not config.tie_word_embeddings:
        yield config.num_hidden_layers + 4, stored({"final_linear.weight": rows(weights["lm_head.weight"])})


def layer_of(layer: dict[str, Tensor], config: Any, era: Era, rank: int) -> dict[str, Tensor]:
    """What a rank has of a transformer layer."""
    norm = "norm.weight" if era.te_norms else "scale"
    qkv, dense = ("qkv", "proj") if era.qkv == "te" else ("query_key_value", "dense")
    found = {f"input_layernorm.{norm}": layer["input_layernorm.weight"]}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in layer:
            parts = [layer[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"attention.{qkv}.{kind}"] = attention_of(*parts, config, era, rank)
            out = layer[f"self_attn.o_proj.{kind}"]
            found[f"attention.{dense}.{kind}"] = out.chunk(era.tp, 1)[rank] if kind == "weight" else out
    second = "mlp.layer_norm_weight" if era.names == "te" else f"post_attention_layernorm.{norm}"
    found[second] = layer["post_attention_layernorm.weight"]
    for kind in ("weight", "bias"):
        if f"mlp.gate_proj.{kind}" in layer:
            gate, up = (layer[f"mlp.{name}_proj.{kind}"].chunk(era.tp)[rank] for name in ("gate", "up"))
            down = layer[f"mlp.down_proj.{kind}"]
            down = down.chunk(era.tp, 1)[rank] if kind == "weight" else down
            found |= {
                "w": {f"mlp.w1.{kind}": gate, f"mlp.w3.{kind}": up, f"mlp.w2.{kind}": down},
                "linear": {f"mlp.linear1.{kind}": torch.cat([up, gate]), f"mlp.linear2.{kind}": down},
                "te": {f"mlp.fc1_{kind}": torch.cat([gate, up]), f"mlp.fc2_{kind}": down},
            }[era.names]
    return found


def attention_of(q: Tensor, k: Tensor, v: Tensor, config: Any, era: Era, rank: int) -> Tensor:
    """The rows of queries, keys and values that a rank computes with, in its order."""
    q, k, v = (values.chunk(era.tp)[rank] for values in (q, k, v))
    if era.qkv == "blocks" and config.num_key_value_heads < config.num_attention_heads:
        return torch.cat([q, k, v])
    heads = (config.num_key_value_heads if era.qkv == "te" else config.num_attention_heads) // era.tp
    groups = zip(q.chunk(heads), k.chunk(heads), v.chunk(heads), strict=True)
    return torch.cat([rows for group in groups for rows in group])


def yaml_of(model: Any, era: Era) -> dict[str, Any]:
    """The settings with which gpt-neox of that era trains such a model; keys that are silent by their defaults too."""
    config = model.config
    old = era.names == "w"
    groups = config.num_key_value_heads
    window = getattr(config, "sliding_window", None)
    bias = {name: f"model.layers.0.{name}.bias" in model.state_dict() for name in ("self_attn.q_proj", "mlp.gate_proj")}
    return {
        "pipe_parallel_size": era.pp,
        "model-parallel-size": era.tp,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": groups if groups < config.num_attention_heads else None,
        "intermediate_size": config.intermediate_size * (1 if old or era.names == "te" else 3),
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "te_rmsnorm" if era.te_norms else "rmsnorm",
        "rms_norm_epsilon": config.rms_norm_eps,
        "pos_emb": "rotary",
        "rotary_pct": 1,
        "rotary_emb_base": int(config.rope_parameters["rope_theta"]),
        "no_weight_tying": not config.tie_word_embeddings,
        "gpt_j_residual": False,
        "output_layer_parallelism": "column",
        "mlp_type": "llama" if old else None,
        "activation": "silu" if old else "swiglu",
        "use_bias_in_attn_linear": bias["self_attn.q_proj"],
        "use_bias_in_mlp": None if old else bias["mlp.gate_proj"],
        "sliding_window_width": window - 1 if window else None,
        "attention_config": [[["flash"], config.num_hidden_layers]],
        "rmsnorm_fusion": era.inside,
        "make_vocab_size_divisible_by": 1,
        "precision": {"float16": "fp16", "bfloat16": "bfloat16", "float32": "fp32"}[era.dtype],
        "vocab_file": "./tokenizer.json",
        "tokenizer_type": "HFTokenizer",
    }

"""Llama and Mistral: RMSNorm, gated MLP, grouped queries. One table of weights, and how gpt-neox fuses them.

Layer files hold one tensor of queries, keys and values, and since 2024-09 one of the MLP's two inputs. The order of
their rows on a rank with n heads of d numbers, k heads of keys and values, I rows of the MLP (gpt-neox's
megatron/model/transformer.py and TransformerEngine's multi_head_attention.py):

    per-head  until 2024-11-14, and always where k = n: [n][q: d | k: d k / n | v: d k / n]
    blocks    since then where k < n: [q: n d | k: k d | v: k d]
    TransformerEngine: [k][q: d n / k | k: d | v: d]
    MLP: [up: I | gate: I]; TransformerEngine: [gate: I | up: I]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv.arch.joins import column_parallel, head_parallel, norm_mean, row_bias, row_parallel, vocab_parallel
from neoxconv.arch.llama.config import PRESETS, from_gguf, from_hf, sayable, to_gguf, to_hf
from neoxconv.arch.llama.training import from_neox, to_neox, told
from neoxconv.core.model import Architecture
from neoxconv.core.table import Fused, ModelConfig, Weight

Rows = npt.NDArray[np.int64]

_BASE = "model."
L, B = _BASE + "layers.{i}.", "blk.{i}."
Q, K, V, DENSE = (L + f"self_attn.{name}_proj." for name in "qkvo")
GATE, UP, DOWN = (L + f"mlp.{name}_proj." for name in ("gate", "up", "down"))
NORM1, NORM2, NORM = L + "input_layernorm", L + "post_attention_layernorm", _BASE + "norm"
EMBEDDING, HEAD = _BASE + "embed_tokens", "lm_head"
_QKV, _PROJ = "attention.query_key_value.", "attention.dense."


def _rotated_apart(heads: Callable[[ModelConfig], int]) -> Callable[[ModelConfig], Rows]:
    """GGUF's order of rows: of each head its two halves in turn, because llama.cpp rotates neighbours."""

    def order(config: ModelConfig) -> Rows:
        count = heads(config)
        rows = np.arange(count * config.head_size).reshape(count, 2, config.head_size // 2)
        return rows.transpose(0, 2, 1).reshape(-1)

    return order


_queries_apart = _rotated_apart(lambda config: config.heads)
_keys_apart = _rotated_apart(lambda config: config.key_heads)


def _has_attention_bias(config: ModelConfig) -> bool:
    return config.attention_bias


def _has_mlp_bias(config: ModelConfig) -> bool:
    return config.mlp_bias


# fmt: off
_WEIGHTS = (
    #      stage    names in the layer file: the one to write, others (of what holds it alone, or fused: below)
    #               unified name, GGUF name, ...: as in arch/gpt_neox/weights.py
    Weight("embed", ("word_embeddings.weight",),                                     vocab_parallel,
                    EMBEDDING + ".weight", "token_embd.weight", role="embedding", shape=("rows", "hidden")),
    Weight("layer", ("input_layernorm.scale", "input_layernorm.norm.weight"),        norm_mean,
                    NORM1 + ".weight", B + "attn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", (_QKV + "weight", "attention.qkv.weight"),                       column_parallel,
                    Q + "weight", B + "attn_q.weight",
                    role="attn_q", shape=("hidden", "hidden"), gguf_order=_queries_apart, norm=NORM1),
    Weight("layer", (_QKV + "bias", "attention.qkv.bias"),                           column_parallel,
                    Q + "bias", B + "attn_q.bias", role="bias", shape=("hidden",),
                    gguf_order=_queries_apart, norm=NORM1, when=_has_attention_bias),
    Weight("layer", (_QKV + "weight", "attention.qkv.weight"),                       column_parallel,
                    K + "weight", B + "attn_k.weight",
                    role="attn_k", shape=("kv", "hidden"), gguf_order=_keys_apart, norm=NORM1),
    Weight("layer", (_QKV + "bias", "attention.qkv.bias"),                           column_parallel,
                    K + "bias", B + "attn_k.bias", role="bias", shape=("kv",),
                    gguf_order=_keys_apart, norm=NORM1, when=_has_attention_bias),
    Weight("layer", (_QKV + "weight", "attention.qkv.weight"),                       column_parallel,
                    V + "weight", B + "attn_v.weight", role="attn_v", shape=("kv", "hidden"), norm=NORM1),
    Weight("layer", (_QKV + "bias", "attention.qkv.bias"),                           column_parallel,
                    V + "bias", B + "attn_v.bias", role="bias", shape=("kv",), norm=NORM1, when=_has_attention_bias),
    Weight("layer", (_PROJ + "weight", "attention.proj.weight"),                    row_parallel,
                    DENSE + "weight", B + "attn_output.weight", role="attn_out", shape=("hidden", "hidden")),
    Weight("layer", (_PROJ + "bias", "attention.proj.bias"),                        row_bias,
                    DENSE + "bias", B + "attn_output.bias", role="bias", shape=("hidden",), when=_has_attention_bias),
    Weight("layer", ("post_attention_layernorm.scale", "mlp.layer_norm_weight",
                     "post_attention_layernorm.norm.weight"),                        norm_mean,
                    NORM2 + ".weight", B + "ffn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", ("mlp.linear1.weight", "mlp.w3.weight", "mlp.fc1_weight"),       column_parallel,
                    UP + "weight", B + "ffn_up.weight", role="mlp_in", shape=("ff", "hidden"), norm=NORM2),
    Weight("layer", ("mlp.linear1.bias", "mlp.fc1_bias"),                            column_parallel,
                    UP + "bias", B + "ffn_up.bias", role="bias", shape=("ff",), norm=NORM2, when=_has_mlp_bias),
    Weight("layer", ("mlp.linear1.weight", "mlp.w1.weight", "mlp.fc1_weight"),       column_parallel,
                    GATE + "weight", B + "ffn_gate.weight", role="mlp_in", shape=("ff", "hidden"), norm=NORM2),
    Weight("layer", ("mlp.linear1.bias", "mlp.fc1_bias"),                            column_parallel,
                    GATE + "bias", B + "ffn_gate.bias", role="bias", shape=("ff",), norm=NORM2, when=_has_mlp_bias),
    Weight("layer", ("mlp.linear2.weight", "mlp.w2.weight", "mlp.fc2_weight"),       row_parallel,
                    DOWN + "weight", B + "ffn_down.weight", role="mlp_out", shape=("hidden", "ff")),
    Weight("layer", ("mlp.linear2.bias", "mlp.fc2_bias"),                            row_bias,
                    DOWN + "bias", B + "ffn_down.bias", role="bias", shape=("hidden",), when=_has_mlp_bias),
    Weight("norm",  ("norm.scale", "norm.norm.weight"),                              norm_mean,
                    NORM + ".weight", "output_norm.weight", role="norm", shape=("hidden",)),
    Weight("head",  ("final_linear.weight",),                                        head_parallel,
                    HEAD + ".weight", "output.weight", role="head", shape=("rows", "hidden"), norm=NORM),
)
# fmt: on


def _in_turn(groups: int, *widths: int) -> Rows:
    """The order of parts that lie as `groups` groups, each with rows of every part: part p has `widths[p]` of them."""
    rows = np.arange(groups * sum(widths)).reshape(groups, -1)
    return np.concatenate([part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)])


def _per_head(config: ModelConfig, degree: int) -> Rows:
    heads, key = config.heads // degree, config.head_size * config.key_heads // config.heads
    return _in_turn(heads, config.head_size, key, key)


def _blocks(config: ModelConfig, degree: int) -> Rows:
    if config.key_heads == config.heads:
        return _per_head(config, degree)
    return np.arange(config.sizes["qkv"] // degree)


def _transformer_engine(config: ModelConfig, degree: int) -> Rows:
    groups, head = config.key_heads // degree, config.head_size
    return _in_turn(groups, head * config.heads // config.key_heads, head, head)


def _halves(config: ModelConfig, degree: int) -> Rows:
    return np.arange(2 * config.ff // degree)


def _fused() -> Iterator[Fused]:
    """What holds several weights, and of several biases."""
    for kind in ("weight", "bias"):
        qkv = (Q + kind, K + kind, V + kind)
        yield Fused(_QKV + kind, qkv, _blocks, "blocks")
        yield Fused(_QKV + kind, qkv, _per_head, "per-head")
        yield Fused("attention.qkv." + kind, qkv, _transformer_engine)
        yield Fused("mlp.linear1." + kind, (UP + kind, GATE + kind), _halves)
        yield Fused("mlp.fc1_" + kind, (GATE + kind, UP + kind), _halves)


def _has_rmsnorm(settings: Mapping[str, Any]) -> bool:
    """Whether a YAML of gpt-neox makes such a model, as far as one setting tells."""
    return settings.get("norm") in ("rmsnorm", "te_rmsnorm")


# Recomputed from the hyperparameters, or left by libraries: `fnmatch` patterns of every format's names.
_DROPPED = ("*rotary_emb.inv_freq", "*rotary_emb.*_cached", "*_extra_state", "rope_freqs.weight")

_IDS = {"bos": 1, "eos": 2}  # <s> and </s> of sentencepiece's; a Llama 3 tokenizer brings its own

LLAMA = Architecture(
    name="llama",
    gguf_name="llama",
    title="Llama",
    weights=_WEIGHTS,
    fused=tuple(_fused()),
    base=_BASE,
    dropped=_DROPPED,
    presets=PRESETS,
    config_of={"neox": from_neox, "unified": from_hf, "gguf": from_gguf},
    to_hf=to_hf,
    token_ids=_IDS,
    unset_ids=_IDS,
    sayable=sayable,
    to_gguf=to_gguf,
    gguf_head=False,
    to_neox=to_neox,
    trained=lambda settings: _has_rmsnorm(settings) and not settings.get("sliding_window_width"),
    layout_of=lambda index, config: told(index, "qkv_layout") if config.kv_heads else "per-head",
    mlx=(("", ""),),
    forward="neoxconv.arch.llama.forward",
    contradictions=lambda index, config: iter(()),
)
MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="Mistral",
    trained=lambda settings: _has_rmsnorm(settings) and bool(settings.get("sliding_window_width")),
)

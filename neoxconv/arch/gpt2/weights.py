"""GPT-2's one table of weights, and how gpt-neox fuses its queries, keys and values.

Hugging Face's files hold the layers' matrices as transformers' Conv1D does, [inputs, outputs]. Queries, keys and values
are one tensor there and in GGUF, [q: h | k: h | v: h]; on a rank of gpt-neox's with n heads of d numbers it is
[n][q: d | k: d | v: d]. So a rank's is put into the former order, and the ranks' thirds are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neoxconv.arch.gpt2.config import PRESETS, from_gguf, from_hf, from_neox, to_gguf, to_hf, to_neox
from neoxconv.arch.gpt2.positions import MADE, made_positions
from neoxconv.arch.joins import (
    by_rows,
    column_parallel,
    head_parallel,
    norm_mean,
    replica,
    row_bias,
    row_parallel,
    stacked,
    vocab_parallel,
)  # fmt: skip
from neoxconv.core.model import Architecture
from neoxconv.core.table import Fused, Join, ModelConfig, Ranks, Weight
from neoxconv.core.tensor import LazyTensor, band

BASE = "transformer."
L, B = BASE + "h.{i}.", "blk.{i}."
QKV, DENSE, UP, DOWN = L + "attn.c_attn.", L + "attn.c_proj.", L + "mlp.c_fc.", L + "mlp.c_proj."
NORM1, NORM2, NORM = L + "ln_1", L + "ln_2", BASE + "ln_f"
EMBEDDING, POSITIONS, HEAD = BASE + "wte", BASE + "wpe", "lm_head"
_QKV, _DENSE, _UP, _DOWN = (
    "attention.query_key_value.", "attention.dense.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.",
)  # fmt: skip


def _thirds(tensor: LazyTensor) -> list[LazyTensor]:
    """Queries, keys and values, which lie one below the other."""
    return [band(tensor, i * tensor.rows // 3, (i + 1) * tensor.rows // 3) for i in range(3)]


def _join_thirds(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """All ranks' queries, then their keys, then their values."""
    return stacked([part for kind in zip(*map(_thirds, ranks), strict=True) for part in kind], config)


def _split_thirds(tensor: LazyTensor, ranks: int, config: ModelConfig) -> list[LazyTensor]:
    """Each rank's queries, keys and values."""
    parts = [by_rows(third, ranks, config) for third in _thirds(tensor)]
    return [stacked(rank, config) for rank in zip(*parts, strict=True)]


_qkv_parallel = Join("column-parallel thirds", _join_thirds, _split_thirds)


# fmt: off
WEIGHTS = (
    #      stage    names in the layer file: legacy, since 2024-09, TransformerEngine        ranks join by
    #               unified name, GGUF name, ...: as in arch/gpt_neox/weights.py
    Weight("embed", ("word_embeddings.weight",),                                             vocab_parallel,
                    EMBEDDING + ".weight", "token_embd.weight", role="embedding", shape=("rows", "hidden")),
    Weight("embed", ("position_embeddings.weight",),                                         replica,
                    POSITIONS + ".weight", "position_embd.weight", role="positions", shape=("context", "hidden")),
    Weight("layer", ("input_layernorm.weight",),                                             norm_mean,
                    NORM1 + ".weight", B + "attn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", ("input_layernorm.bias",),                                               norm_mean,
                    NORM1 + ".bias", B + "attn_norm.bias", role="norm", shape=("hidden",)),
    Weight("layer", (_QKV + "weight", "attention.qkv.weight"),                               _qkv_parallel,
                    QKV + "weight", B + "attn_qkv.weight",
                    role="qkv", shape=("qkv", "hidden"), norm=NORM1, transposed=True),
    Weight("layer", (_QKV + "bias", "attention.qkv.bias"),                                   _qkv_parallel,
                    QKV + "bias", B + "attn_qkv.bias", role="bias", shape=("qkv",), norm=NORM1),
    Weight("layer", (_DENSE + "weight", "attention.proj.weight"),                            row_parallel,
                    DENSE + "weight", B + "attn_output.weight",
                    role="attn_out", shape=("hidden", "hidden"), transposed=True),
    Weight("layer", (_DENSE + "bias", "attention.proj.bias"),                                row_bias,
                    DENSE + "bias", B + "attn_output.bias", role="bias", shape=("hidden",)),
    Weight("layer", ("post_attention_layernorm.weight", "mlp.layer_norm_weight"),            norm_mean,
                    NORM2 + ".weight", B + "ffn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", ("post_attention_layernorm.bias", "mlp.layer_norm_bias"),                norm_mean,
                    NORM2 + ".bias", B + "ffn_norm.bias", role="norm", shape=("hidden",)),
    Weight("layer", (_UP + "weight", "mlp.linear1.weight", "mlp.fc1_weight"),                column_parallel,
                    UP + "weight", B + "ffn_up.weight",
                    role="mlp_in", shape=("ff", "hidden"), norm=NORM2, transposed=True),
    Weight("layer", (_UP + "bias", "mlp.linear1.bias", "mlp.fc1_bias"),                      column_parallel,
                    UP + "bias", B + "ffn_up.bias", role="bias", shape=("ff",), norm=NORM2),
    Weight("layer", (_DOWN + "weight", "mlp.linear2.weight", "mlp.fc2_weight"),              row_parallel,
                    DOWN + "weight", B + "ffn_down.weight",
                    role="mlp_out", shape=("hidden", "ff"), transposed=True),
    Weight("layer", (_DOWN + "bias", "mlp.linear2.bias", "mlp.fc2_bias"),                    row_bias,
                    DOWN + "bias", B + "ffn_down.bias", role="bias", shape=("hidden",)),
    Weight("norm",  ("norm.weight",),                                                        norm_mean,
                    NORM + ".weight", "output_norm.weight", role="norm", shape=("hidden",)),
    Weight("norm",  ("norm.bias",),                                                          norm_mean,
                    NORM + ".bias", "output_norm.bias", role="norm", shape=("hidden",)),
    Weight("head",  ("final_linear.weight",),                                                head_parallel,
                    HEAD + ".weight", "output.weight", role="head", shape=("rows", "hidden"), norm=NORM),
)
# fmt: on


def _per_head(config: ModelConfig, degree: int) -> npt.NDArray[np.int64]:
    """A rank's rows of query, key and value per head as all queries, all keys, all values."""
    rows = np.arange(3 * config.hidden // degree).reshape(config.heads // degree, 3, config.head_size)
    return rows.transpose(1, 0, 2).reshape(-1)


def fused(names: Sequence[str] = (_QKV, "attention.qkv.")) -> tuple[Fused, ...]:
    """What holds queries, keys and values of each head, under every name."""
    return tuple(Fused(name + kind, (QKV + kind,), _per_head) for name in names for kind in ("weight", "bias"))


# Buffers of transformers' attention, and of TransformerEngine: `fnmatch` patterns of every format's names.
DROPPED = (
    "*.attn.bias",
    "*.attn.masked_bias",
    "*attention.masked_bias",
    "*_extra_state",
    "0.position_embeddings.inv_freq",
)

GPT2 = Architecture(
    name="gpt2",
    gguf_name="gpt2",
    title="GPT-2",
    weights=WEIGHTS,
    fused=fused(),
    base=BASE,
    dropped=DROPPED,
    presets=PRESETS,
    config_of={"neox": from_neox, "unified": from_hf, "gguf": from_gguf},
    to_hf=to_hf,
    to_gguf=to_gguf,
    to_neox=to_neox,
    trained=lambda settings: settings.get("pos_emb") in MADE,  # learned ones are among the tensors, and tell it
    made=lambda index, config: {POSITIONS + ".weight": table} if (table := made_positions(index, config)) else {},
    forward="neoxconv.arch.gpt2.forward",
    contradictions=lambda index, config: iter(()),
)

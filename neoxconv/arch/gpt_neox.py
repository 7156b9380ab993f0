"""GPT-NeoX: the 20B model and Pythia. The one table of weights, the released models, and the hyperparameters' names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.arch.gpt_neox_config import from_gguf, from_hf, from_neox, to_gguf, to_hf
from neoxconv.arch.joins import column_parallel, head_parallel, norm_mean, row_bias, row_parallel, vocab_parallel
from neoxconv.model import Architecture, ModelConfig, Weight


def qkv_apart(config: ModelConfig) -> npt.NDArray[np.int64]:
    """Rows of query, key and value per head (NeoX, Hugging Face) as all queries, all keys, all values (GGUF)."""
    rows = np.arange(3 * config.hidden).reshape(config.heads, 3, config.head_size)
    return rows.transpose(1, 0, 2).reshape(-1)


def each(*names: str) -> tuple[str, ...]:
    """One source name per generation of gpt-neox: legacy, then since 2024-09, then TransformerEngine."""
    return names


L, B = "gpt_neox.layers.{i}.", "blk.{i}."
QKV, DENSE = "attention.query_key_value.", "attention.dense."
NORM1, NORM2, NORM = L + "input_layernorm", L + "post_attention_layernorm", "gpt_neox.final_layer_norm"

# fmt: off
WEIGHTS = (
    #      stage    names in the layer file                                                       ranks join by    unified name                   GGUF name                role         shape
    Weight("embed", each("word_embeddings.weight"),                                               vocab_parallel,  "gpt_neox.embed_in.weight",    "token_embd.weight",     "embedding", ("rows", "hidden")),
    Weight("layer", each("input_layernorm.weight"),                                               norm_mean,       NORM1 + ".weight",             B + "attn_norm.weight",  "norm",      ("hidden",)),
    Weight("layer", each("input_layernorm.bias"),                                                 norm_mean,       NORM1 + ".bias",               B + "attn_norm.bias",    "norm",      ("hidden",)),
    Weight("layer", each(QKV + "weight", "attention.qkv.weight"),                                 column_parallel, L + QKV + "weight",            B + "attn_qkv.weight",   "qkv",       ("qkv", "hidden"), qkv_apart, NORM1),
    Weight("layer", each(QKV + "bias", "attention.qkv.bias"),                                     column_parallel, L + QKV + "bias",              B + "attn_qkv.bias",     "bias",      ("qkv",), qkv_apart, NORM1),
    Weight("layer", each(DENSE + "weight", "attention.proj.weight"),                              row_parallel,    L + DENSE + "weight",          B + "attn_output.weight", "attn_out", ("hidden", "hidden")),
    Weight("layer", each(DENSE + "bias", "attention.proj.bias"),                                  row_bias,        L + DENSE + "bias",            B + "attn_output.bias",  "bias",      ("hidden",)),
    Weight("layer", each("post_attention_layernorm.weight", "mlp.layer_norm_weight"),             norm_mean,       NORM2 + ".weight",             B + "ffn_norm.weight",   "norm",      ("hidden",)),
    Weight("layer", each("post_attention_layernorm.bias", "mlp.layer_norm_bias"),                 norm_mean,       NORM2 + ".bias",               B + "ffn_norm.bias",     "norm",      ("hidden",)),
    Weight("layer", each("mlp.dense_h_to_4h.weight", "mlp.linear1.weight", "mlp.fc1_weight"),     column_parallel, L + "mlp.dense_h_to_4h.weight", B + "ffn_up.weight",    "mlp_in",    ("ff", "hidden"), None, NORM2),
    Weight("layer", each("mlp.dense_h_to_4h.bias", "mlp.linear1.bias", "mlp.fc1_bias"),           column_parallel, L + "mlp.dense_h_to_4h.bias",  B + "ffn_up.bias",      "bias",      ("ff",), None, NORM2),
    Weight("layer", each("mlp.dense_4h_to_h.weight", "mlp.linear2.weight", "mlp.fc2_weight"),     row_parallel,    L + "mlp.dense_4h_to_h.weight", B + "ffn_down.weight",  "mlp_out",   ("hidden", "ff")),
    Weight("layer", each("mlp.dense_4h_to_h.bias", "mlp.linear2.bias", "mlp.fc2_bias"),           row_bias,        L + "mlp.dense_4h_to_h.bias",  B + "ffn_down.bias",     "bias",      ("hidden",)),
    Weight("norm",  each("norm.weight"),                                                          norm_mean,       NORM + ".weight",              "output_norm.weight",    "norm",      ("hidden",)),
    Weight("norm",  each("norm.bias"),                                                            norm_mean,       NORM + ".bias",                "output_norm.bias",      "norm",      ("hidden",)),
    Weight("head",  each("final_linear.weight"),                                                  head_parallel,   "embed_out.weight",            "output.weight",         "head",      ("rows", "hidden"), None, NORM),
)
# fmt: on

# Recomputed from the hyperparameters, or left by libraries: `fnmatch` patterns of every format's names.
DROPPED = (
    "*attention.rotary_emb.inv_freq",
    "*attention.rotary_emb.*_cached",
    "*attention.masked_bias",
    "*.attention.bias",
    "*_extra_state",
    "rope_freqs.weight",
)

GPT_NEOX = Architecture(
    name="gpt_neox",
    weights=WEIGHTS,
    dropped=DROPPED,
    config_of={"neox": from_neox, "hf": from_hf, "safetensors": from_hf, "gguf": from_gguf},
    to_hf=to_hf,
    to_gguf=to_gguf,
)

"""GPT-NeoX: the 20B model and Pythia. The one table of weights, the released models, and the hyperparameters' names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from neoxconv.arch.gpt_neox.config import PRESETS, from_hf, from_neox, to_hf
from neoxconv.arch.gpt_neox.config_gguf import from_gguf, to_gguf
from neoxconv.arch.gpt_neox.evidence import contradictions
from neoxconv.arch.gpt_neox.shared_norm import trained_in_vain
from neoxconv.arch.gpt_neox.training import inverse_frequencies, to_neox
from neoxconv.arch.joins import column_parallel, head_parallel, norm_mean, row_bias, row_parallel, vocab_parallel
from neoxconv.core.model import Architecture, Index
from neoxconv.core.table import Buffer, ModelConfig, Weight


def qkv_apart(config: ModelConfig) -> npt.NDArray[np.int64]:
    """Rows of query, key and value per head (NeoX, Hugging Face) as all queries, all keys, all values (GGUF)."""
    rows = np.arange(3 * config.hidden).reshape(config.heads, 3, config.head_size)
    return rows.transpose(1, 0, 2).reshape(-1)


_BASE = "gpt_neox."
L, B = _BASE + "layers.{i}.", "blk.{i}."
QKV, DENSE, UP, DOWN = "attention.query_key_value.", "attention.dense.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."
NORM1, NORM2, NORM = L + "input_layernorm", L + "post_attention_layernorm", _BASE + "final_layer_norm"
EMBEDDING, HEAD = _BASE + "embed_in", "embed_out"

# fmt: off
WEIGHTS = (
    #      stage    names in the layer file: legacy, since 2024-09, TransformerEngine        ranks join by
    #               unified name, GGUF name, role, shape (GGUF's order of rows, the norm whose output it multiplies,
    #               other names in Hugging Face's files)
    Weight("embed", ("word_embeddings.weight",),                                             vocab_parallel,
                    EMBEDDING + ".weight", "token_embd.weight", role="embedding", shape=("rows", "hidden")),
    Weight("layer", ("input_layernorm.weight",),                                             norm_mean,
                    NORM1 + ".weight", B + "attn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", ("input_layernorm.bias",),                                               norm_mean,
                    NORM1 + ".bias", B + "attn_norm.bias", role="norm", shape=("hidden",)),
    Weight("layer", (QKV + "weight", "attention.qkv.weight"),                                column_parallel,
                    L + QKV + "weight", B + "attn_qkv.weight",
                    role="qkv", shape=("qkv", "hidden"), gguf_order=qkv_apart, norm=NORM1),
    Weight("layer", (QKV + "bias", "attention.qkv.bias"),                                    column_parallel,
                    L + QKV + "bias", B + "attn_qkv.bias",
                    role="bias", shape=("qkv",), gguf_order=qkv_apart, norm=NORM1),
    Weight("layer", (DENSE + "weight", "attention.proj.weight"),                             row_parallel,
                    L + DENSE + "weight", B + "attn_output.weight", role="attn_out", shape=("hidden", "hidden")),
    Weight("layer", (DENSE + "bias", "attention.proj.bias"),                                 row_bias,
                    L + DENSE + "bias", B + "attn_output.bias", role="bias", shape=("hidden",)),
    Weight("layer", ("post_attention_layernorm.weight", "mlp.layer_norm_weight"),            norm_mean,
                    NORM2 + ".weight", B + "ffn_norm.weight", role="norm", shape=("hidden",)),
    Weight("layer", ("post_attention_layernorm.bias", "mlp.layer_norm_bias"),                norm_mean,
                    NORM2 + ".bias", B + "ffn_norm.bias", role="norm", shape=("hidden",)),
    Weight("layer", (UP + "weight", "mlp.linear1.weight", "mlp.fc1_weight"),                 column_parallel,
                    L + UP + "weight", B + "ffn_up.weight", role="mlp_in", shape=("ff", "hidden"), norm=NORM2),
    Weight("layer", (UP + "bias", "mlp.linear1.bias", "mlp.fc1_bias"),                       column_parallel,
                    L + UP + "bias", B + "ffn_up.bias", role="bias", shape=("ff",), norm=NORM2),
    Weight("layer", (DOWN + "weight", "mlp.linear2.weight", "mlp.fc2_weight"),               row_parallel,
                    L + DOWN + "weight", B + "ffn_down.weight", role="mlp_out", shape=("hidden", "ff")),
    Weight("layer", (DOWN + "bias", "mlp.linear2.bias", "mlp.fc2_bias"),                     row_bias,
                    L + DOWN + "bias", B + "ffn_down.bias", role="bias", shape=("hidden",)),
    Weight("norm",  ("norm.weight",),                                                        norm_mean,
                    NORM + ".weight", "output_norm.weight", role="norm", shape=("hidden",)),
    Weight("norm",  ("norm.bias",),                                                          norm_mean,
                    NORM + ".bias", "output_norm.bias", role="norm", shape=("hidden",)),
    Weight("head",  ("final_linear.weight",),                                                head_parallel,
                    HEAD + ".weight", "output.weight", role="head", shape=("rows", "hidden"), norm=NORM,
                    also=("lm_head.weight",)),
)
# fmt: on

_BUFFERS = (Buffer("attention.rotary_emb.inv_freq", QKV + "bias", inverse_frequencies),)

# Recomputed from the hyperparameters, or left by libraries: `fnmatch` patterns of every format's names.
_DROPPED = (
    "*attention.rotary_emb.inv_freq",
    "*attention.rotary_emb.*_cached",
    "*attention.masked_bias",
    "*.attention.bias",
    "*_extra_state",
    "rope_freqs.weight",
)


def _unused(config: ModelConfig) -> dict[str, str]:
    """With one norm in a layer the first stands in the second's place."""
    return {f"{NORM2}.{part}": f"{NORM1}.{part}" for part in ("weight", "bias")} if config.shared_norm else {}


def _contradictions(index: Index, config: ModelConfig) -> Iterator[tuple[int, str, str]]:
    """Stored frequencies and norms that are not what the configuration says."""
    yield from contradictions(index, config)
    yield from trained_in_vain(index, config)


GPT_NEOX = Architecture(
    name="gpt_neox",
    gguf_name="gptneox",
    title="GPT-NeoX",
    weights=WEIGHTS,
    base=_BASE,
    dropped=_DROPPED,
    buffers=_BUFFERS,
    presets=PRESETS,
    config_of={"neox": from_neox, "unified": from_hf, "gguf": from_gguf},
    to_hf=to_hf,
    token_ids={"bos": 0, "eos": 0},  # <|endoftext|> of the 20B model's tokenizer
    unset_ids={"eos": 2},
    to_gguf=to_gguf,
    to_neox=to_neox,
    renamed={UP: "mlp.linear1.", DOWN: "mlp.linear2."},
    trained=lambda settings: (settings.get("norm", "layernorm"), settings.get("pos_emb")) == ("layernorm", "rotary"),
    mlx=((L.replace("{i}.", ""), "model.h."), (_BASE, "model."), ("", "model.")),
    forward="neoxconv.arch.gpt_neox.forward",
    unused=_unused,
    contradictions=_contradictions,
)

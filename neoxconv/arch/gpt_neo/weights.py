"""GPT-Neo: learned positions, local and global attention in turn, scores that are not scaled.

Only Hugging Face's files hold this family. GGUF holds it as GPT-2 up to a window's length: `stand_in`. gpt-neox cannot
hold it: what it calls local attention is block-sparse.
"""

from __future__ import annotations

from neoxconv.arch.gpt_neo.config import PRESETS, from_hf, to_hf
from neoxconv.arch.gpt_neo.names import (
    BASE,
    DENSE,
    DOWN,
    EMBEDDING,
    HEAD,
    NORM,
    NORM1,
    NORM2,
    POSITIONS,
    UP,
    K,
    Q,
    V,
)  # fmt: skip
from neoxconv.arch.gpt_neo.stand_in import as_gpt2, shorter
from neoxconv.arch.joins import (
    column_parallel,
    head_parallel,
    norm_mean,
    replica,
    row_bias,
    row_parallel,
    vocab_parallel,
)  # fmt: skip
from neoxconv.core.model import Architecture, StandIn
from neoxconv.core.table import Weight

# fmt: off
_WEIGHTS = (
    #      stage, no names of gpt-neox's, how ranks would join, unified name, none of GGUF's, role, shape, norm
    Weight("embed", (), vocab_parallel, EMBEDDING + ".weight", "", role="embedding", shape=("rows", "hidden")),
    Weight("embed", (), replica, POSITIONS + ".weight", "", role="positions", shape=("context", "hidden")),
    Weight("layer", (), norm_mean, NORM1 + ".weight", "", role="norm", shape=("hidden",)),
    Weight("layer", (), norm_mean, NORM1 + ".bias", "", role="norm", shape=("hidden",)),
    Weight("layer", (), column_parallel, Q + ".weight", "", role="attn_q", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), column_parallel, K + ".weight", "", role="attn_k", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), column_parallel, V + ".weight", "", role="attn_v", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), row_parallel, DENSE + ".weight", "", role="attn_out", shape=("hidden", "hidden")),
    Weight("layer", (), row_bias, DENSE + ".bias", "", role="bias", shape=("hidden",)),
    Weight("layer", (), norm_mean, NORM2 + ".weight", "", role="norm", shape=("hidden",)),
    Weight("layer", (), norm_mean, NORM2 + ".bias", "", role="norm", shape=("hidden",)),
    Weight("layer", (), column_parallel, UP + ".weight", "", role="mlp_in", shape=("ff", "hidden"), norm=NORM2),
    Weight("layer", (), column_parallel, UP + ".bias", "", role="bias", shape=("ff",), norm=NORM2),
    Weight("layer", (), row_parallel, DOWN + ".weight", "", role="mlp_out", shape=("hidden", "ff")),
    Weight("layer", (), row_bias, DOWN + ".bias", "", role="bias", shape=("hidden",)),
    Weight("norm", (), norm_mean, NORM + ".weight", "", role="norm", shape=("hidden",)),
    Weight("norm", (), norm_mean, NORM + ".bias", "", role="norm", shape=("hidden",)),
    Weight("head", (), head_parallel, HEAD + ".weight", "", role="head", shape=("rows", "hidden"), norm=NORM),
)
# fmt: on

# Buffers of transformers' attention: `fnmatch` patterns.
_DROPPED = ("*.attn.attention.bias", "*.attn.attention.masked_bias")
_IDS = {"bos": 50256, "eos": 50256}  # <|endoftext|> of GPT-2's vocabulary

GPT_NEO = Architecture(
    name="gpt_neo",
    gguf_name=None,
    title="GPT-Neo",
    weights=_WEIGHTS,
    base=BASE,
    dropped=_DROPPED,
    presets=PRESETS,
    config_of={"unified": from_hf},
    to_hf=to_hf,
    token_ids=_IDS,
    unset_ids=_IDS,
    to_gguf=None,
    to_neox=None,
    stand_ins={"gguf": {"gpt2": StandIn(as_gpt2, shorter)}},
    trained=lambda settings: False,
    forward="neoxconv.arch.gpt_neo.forward",
    contradictions=lambda index, config: iter(()),
)

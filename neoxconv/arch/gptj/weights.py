"""GPT-J-6B: one norm in a layer, neighbours rotated, no biases in attention, a bias of the head.

Only Hugging Face's files hold this family. GGUF and gpt-neox's shards hold it as GPT-NeoX: `stand_in`.
"""

from __future__ import annotations

from neoxconv.arch.gptj.config import PRESETS, from_hf, to_hf
from neoxconv.arch.gptj.names import BASE, DENSE, DOWN, EMBEDDING, HEAD, NORM, NORM1, UP, K, Q, V
from neoxconv.arch.gptj.stand_in import as_gpt_neox
from neoxconv.arch.joins import column_parallel, head_parallel, norm_mean, row_bias, row_parallel, vocab_parallel
from neoxconv.core.model import Architecture, StandIn
from neoxconv.core.table import Weight

# fmt: off
_WEIGHTS = (
    #      stage, no names of gpt-neox's, how ranks would join, unified name, none of GGUF's, role, shape, norm
    Weight("embed", (), vocab_parallel, EMBEDDING + ".weight", "", role="embedding", shape=("rows", "hidden")),
    Weight("layer", (), norm_mean, NORM1 + ".weight", "", role="norm", shape=("hidden",)),
    Weight("layer", (), norm_mean, NORM1 + ".bias", "", role="norm", shape=("hidden",)),
    Weight("layer", (), column_parallel, Q + ".weight", "", role="attn_q", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), column_parallel, K + ".weight", "", role="attn_k", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), column_parallel, V + ".weight", "", role="attn_v", shape=("hidden", "hidden"), norm=NORM1),
    Weight("layer", (), row_parallel, DENSE + ".weight", "", role="attn_out", shape=("hidden", "hidden")),
    Weight("layer", (), column_parallel, UP + ".weight", "", role="mlp_in", shape=("ff", "hidden"), norm=NORM1),
    Weight("layer", (), column_parallel, UP + ".bias", "", role="bias", shape=("ff",), norm=NORM1),
    Weight("layer", (), row_parallel, DOWN + ".weight", "", role="mlp_out", shape=("hidden", "ff")),
    Weight("layer", (), row_bias, DOWN + ".bias", "", role="bias", shape=("hidden",)),
    Weight("norm", (), norm_mean, NORM + ".weight", "", role="norm", shape=("hidden",)),
    Weight("norm", (), norm_mean, NORM + ".bias", "", role="norm", shape=("hidden",)),
    Weight("head", (), head_parallel, HEAD + ".weight", "", role="head", shape=("rows", "hidden"), norm=NORM),
    Weight("head", (), column_parallel, HEAD + ".bias", "", role="bias", shape=("rows",)),
)
# fmt: on

# Recomputed from the hyperparameters: `fnmatch` patterns.
_DROPPED = ("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions")
_IDS = {"bos": 50256, "eos": 50256}  # <|endoftext|> of GPT-2's vocabulary

GPT_J = Architecture(
    name="gptj",
    gguf_name=None,
    title="GPT-J",
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
    stand_ins={naming: {"gpt_neox": StandIn(as_gpt_neox)} for naming in ("gguf", "neox")},
    trained=lambda settings: False,
    forward="neoxconv.arch.gptj.forward",
    contradictions=lambda index, config: iter(()),
)

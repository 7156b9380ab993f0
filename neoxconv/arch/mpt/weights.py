"""Models with ALiBi: GPT-2's weights without its table of positions, under the names that GGUF gives both families."""

from __future__ import annotations

from dataclasses import replace

from neoxconv.arch.gpt2.weights import GPT2, WEIGHTS
from neoxconv.arch.mpt.config import PRESETS, from_gguf, from_hf, from_neox, to_gguf, to_hf, to_neox

MPT = replace(
    GPT2,
    name="mpt",
    gguf_name="mpt",
    title="MPT",
    weights=tuple(weight for weight in WEIGHTS if weight.role != "positions"),
    dropped=("*attention.alibi_embed.slopes", "*attention.masked_bias", "*_extra_state"),
    presets=PRESETS,
    config_of={"neox": from_neox, "unified": from_hf, "gguf": from_gguf},
    to_hf=to_hf,
    to_gguf=to_gguf,
    to_neox=to_neox,
    trained=lambda settings: settings.get("pos_emb") == "alibi",
    made=lambda index, config: {},
)

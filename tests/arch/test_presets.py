"""Released models that are GPT-NeoX with other settings: told by their shapes, small replicas against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neoxconv import open_checkpoint
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.presets import from_preset
from neoxconv.core.model import Index, Measured, ModelConfig, Opening
from neoxconv.errors import CheckpointError
from tests.gpt2 import converted
from tests.oracles import llama_logits, program
from tests.relatives import CLOSE, LLAMA_CPP, logits_of, native_logits, random_model, saved, some_tokens

RELATIVES = ["redpajama-incite-3b", "redpajama-incite-7b", "stablelm-alpha-3b", "stablelm-alpha-7b"]
TOKENS = some_tokens(320)


def told_by_shapes(config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    measured = Measured(layers=config.layers, hidden=config.hidden, ff=config.ff, rows=config.rows, tied=False)
    index = Index(format="neox", folder=Path("/model"), files=(), ranks=({},), settings={})
    return from_preset(index, measured, Opening(Path("/model")), GPT_NEOX.presets)


@pytest.mark.parametrize("name", ["redpajama-incite-3b", "stablelm-alpha-3b", "stablelm-alpha-7b", "pythia-2.8b"])
def test_shapes_tell_a_released_model(name: str) -> None:
    preset = GPT_NEOX.presets[name]
    config, notes = told_by_shapes(preset)
    assert config == preset and name in notes[0]


def test_of_two_with_the_same_shapes_both_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"pythia-6\.9b and redpajama-incite-7b have these shapes"):
        told_by_shapes(GPT_NEOX.presets["pythia-6.9b"])


@pytest.mark.parametrize("name", [*RELATIVES, "pythia-410m"])
def test_a_small_replica_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """The settings are the released model's, written from them into transformers' configuration by hand."""
    preset = GPT_NEOX.presets[name]
    config = program("transformers").GPTNeoXConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=256, vocab_size=320,
        max_position_embeddings=preset.context, rotary_pct=preset.rotary_pct, rotary_emb_base=preset.rotary_base,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rotary_base,
                         "partial_rotary_factor": preset.rotary_pct},
        use_parallel_residual=preset.parallel_residual, bos_token_id=0, eos_token_id=0,
        hidden_act="gelu" if preset.activation == "gelu" else "gelu_new", tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config)
    source, expected = saved(model, tmp_path / "hf"), logits_of(model, TOKENS)
    checkpoint = open_checkpoint(source)
    sizes = {"layers": 2, "hidden": 64, "heads": 2, "ff": 256, "rows": 320}
    assert checkpoint.config == replace(preset, **sizes)
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F16")
    assert np.abs(llama_logits(file, TOKENS) - expected).max() < LLAMA_CPP * expected.std()

"""Released models that are GPT-NeoX with other settings: told by their shapes, small replicas against transformers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neoxconv import open_checkpoint
from neoxconv.arch.gpt_neox.config import from_hf
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.presets import from_preset
from neoxconv.cli.formats import hollow_checkpoint
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError
from tests.gpt2 import converted
from tests.helpers import few
from tests.oracles import llama_logits, program
from tests.relatives import CLOSE, LLAMA_CPP, logits_of, native_logits, random_model, saved, some_tokens

PYTHIA = [name for name in GPT_NEOX.presets if name == "20B" or name.startswith("pythia")]
RELATIVES = [name for name in GPT_NEOX.presets if name not in PYTHIA]
SAME_SHAPES = [
    ("pythia-6.9b", "redpajama-incite-7b"),
    ("pythia-160m", "polycoder-160M"),
    ("pythia-410m", "polycoder-0.4B"),
    ("pythia-2.8b", "polycoder-2.7B"),
]
# From the released config.json files: hidden_size, num_attention_heads, num_hidden_layers, rotary_pct,
# use_parallel_residual, vocab_size. All have hidden_act gelu, layer_norm_eps 1e-05, max_position_embeddings 2048,
# rotary_emb_base 10000 and an intermediate_size of four times hidden_size; no embedding is tied.
PUBLISHED = {
    "dolly-v2-3b": (2560, 32, 32, 0.25, True, 50280),
    "dolly-v2-7b": (4096, 32, 32, 0.25, True, 50280),
    "dolly-v2-12b": (5120, 40, 36, 0.25, True, 50280),
    "oasst-pythia-12b": (5120, 40, 36, 0.25, True, 50288),
    "polyglot-ko-1.3b": (2048, 16, 24, 0.5, True, 30080),
    "polyglot-ko-3.8b": (3072, 24, 32, 0.5, True, 30080),
    "polyglot-ko-5.8b": (4096, 16, 28, 0.25, True, 30080),
    "polyglot-ko-12.8b": (5120, 40, 40, 0.5, True, 30080),
    "japanese-gpt-neox-small": (768, 12, 12, 1.0, False, 44416),
    "japanese-gpt-neox-3.6b": (2816, 22, 36, 1.0, False, 32000),
    "bilingual-gpt-neox-4b": (2816, 22, 36, 1.0, False, 65536),
    "open-calm-small": (768, 12, 12, 1.0, False, 52096),
    "open-calm-medium": (1024, 16, 24, 1.0, False, 52096),
    "open-calm-large": (1536, 16, 24, 1.0, False, 52096),
    "open-calm-1b": (2048, 16, 24, 1.0, False, 52096),
    "open-calm-7b": (4096, 32, 32, 1.0, False, 52224),
    "polycoder-160M": (768, 12, 12, 1.0, False, 50304),
    "polycoder-0.4B": (1024, 16, 24, 1.0, False, 50304),
    "polycoder-2.7B": (2560, 32, 32, 1.0, False, 50304),
}
TOKENS = some_tokens(320)


def told_by_shapes(config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    measured = Measured(layers=config.layers, hidden=config.hidden, ff=config.ff, rows=config.rows, tied=False)
    index = Index(format="neox", folder=Path("/model"), files=(), ranks=({},), settings={})
    return from_preset(index, measured, Opening(Path("/model")), GPT_NEOX.presets)


@pytest.mark.parametrize("name", sorted({*GPT_NEOX.presets}.difference(*SAME_SHAPES)))
def test_shapes_tell_a_released_model(name: str) -> None:
    preset = GPT_NEOX.presets[name]
    config, notes = told_by_shapes(preset)
    assert config == preset and name in notes[0]


@pytest.mark.parametrize("names", SAME_SHAPES, ids="-".join)
def test_of_two_with_the_same_shapes_both_are_named(names: tuple[str, str]) -> None:
    for name in names:
        with pytest.raises(CheckpointError, match=f"{' and '.join(map(re.escape, names))} have these shapes"):
            told_by_shapes(GPT_NEOX.presets[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_the_released_configuration_says(name: str) -> None:
    hidden, heads, layers, rotary_pct, parallel_residual, rows = PUBLISHED[name]
    settings = {
        "hidden_act": "gelu", "hidden_size": hidden, "intermediate_size": 4 * hidden, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": heads, "num_hidden_layers": layers,
        "rotary_emb_base": 10000, "rotary_pct": rotary_pct, "tie_word_embeddings": False,
        "use_parallel_residual": parallel_residual, "vocab_size": rows,
    }  # fmt: skip
    index = Index(format="hf", folder=Path("/model"), files=(), ranks=({},), settings=settings)
    measured = Measured(layers=layers, hidden=hidden, ff=4 * hidden, rows=rows, tied=False)
    config, _ = from_hf(index, measured, Opening(Path("/model")))
    trained = "gelu_tanh" if name == "polycoder-2.7B" else "gelu"  # its README: bias-gelu-fusion
    assert GPT_NEOX.presets[name] == replace(config, activation=trained)


# The card of polyglot-ko-12.8b counts 12,898,631,680, which is not what its own configuration gives.
@pytest.mark.parametrize(
    ("name", "parameters"), [("polyglot-ko-1.3b", 1_331_810_304), ("polyglot-ko-5.8b", 5_885_059_072)]
)
def test_the_parameters_are_those_of_the_model_card(name: str, parameters: int) -> None:
    preset = GPT_NEOX.presets[name]
    assert hollow_checkpoint(GPT_NEOX, preset).parameters == parameters


@pytest.mark.parametrize("name", few([*RELATIVES, "pythia-410m"], *RELATIVES[::4], "pythia-410m"))
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

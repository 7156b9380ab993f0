"""Llama and Mistral as GGUF: tensors and keys of llama.cpp's own converter, logits of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from tests.little_llamas import little_llama
from tests.oracles import llama_convert, llama_logits, program, transformers_logits

MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 5e5},
    "biased": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "grouped and biased": {"attention_bias": True, "intermediate_size": 160},
    "window": {"mistral": True, "sliding_window": 64},
}
# Where neither name nor card tells what a model is called, the family does; without effect for BPE.
MADE_ELSEWHERE = ("general.name", "general.basename", "general.tags", "tokenizer.ggml.add_space_prefix")


def as_gguf(source: Path, target: Path, mix: str = "F16") -> Path:
    return run(make_plan(open_checkpoint(source), Recipe("gguf", type=mix)), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    gguf, source = program("gguf"), little_llama(tmp_path / "hf", **MODELS[name])
    back = run(make_plan(open_checkpoint(as_gguf(source, tmp_path / "ours.gguf")), Recipe("hf")), tmp_path / "back")
    llama_convert(source, tmp_path / "theirs.gguf")
    llama_convert(back, tmp_path / "of_back.gguf")  # what we write, it reads
    ours, *theirs = (gguf.GGUFReader(tmp_path / file) for file in ("ours.gguf", "theirs.gguf", "of_back.gguf"))
    for read in theirs:
        found, wanted = ({t.name: (t.tensor_type, t.data.tobytes()) for t in r.tensors} for r in (ours, read))
        assert found == wanted
        found, wanted = ({k: (f.types, f.contents()) for k, f in r.fields.items()} for r in (ours, read))
        for key in (key for key in found | wanted if not key.startswith("GGUF.") and key not in MADE_ELSEWHERE):
            assert found.get(key) == wanted.get(key), key


@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf", **MODELS[name])
    tokens = np.random.default_rng(0).integers(0, 512, (2, 64))
    expected = transformers_logits(source, tokens)
    file = as_gguf(source, tmp_path / "x.gguf")
    assert np.abs(llama_logits(file, tokens) - expected).max() < 0.02 * expected.std()
    back = run(make_plan(open_checkpoint(file), Recipe("hf", dtype="F16")), tmp_path / "back")
    assert np.array_equal(transformers_logits(back, tokens), expected)
    assert verify_weights(open_checkpoint(source), open_checkpoint(file)).passed

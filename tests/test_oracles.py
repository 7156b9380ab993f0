"""The oracles agree with the logits that were recorded inside the training code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures import real
from tests.oracles import Logits, Tokens, llama_logits, transformers_logits

FP16_ROUNDING = 2e-3  # of logits, where the reference rounded nothing; 7.2e-4 measured


@pytest.fixture
def tiny() -> Path:
    return real("neox_2022_tp2_pp4")


@pytest.fixture
def tokens(tiny: Path) -> Tokens:
    return np.load(tiny / "reference" / "tokens.npy")


@pytest.fixture
def expected(tiny: Path) -> Logits:
    return np.load(tiny / "reference" / "logits_fp32.npy")


@pytest.fixture
def hf_folder(tiny: Path, tmp_path: Path) -> Path:
    """Return EleutherAI's own conversion with what its config.json lacks."""
    folder = shutil.copytree(tiny / "hf_official_converter", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_fast", "eos_token_id": 0}))
    return folder


def test_transformers_5_gives_the_recorded_logits(hf_folder: Path, tokens: Tokens, expected: Logits) -> None:
    assert np.abs(transformers_logits(hf_folder, tokens) - expected).max() < FP16_ROUNDING


def test_transformers_refuses_a_folder_that_lacks_a_weight(hf_folder: Path, tokens: Tokens) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(hf_folder / "model.safetensors")
    del weights["embed_out.weight"]
    save_file(weights, hf_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match="missing_keys"):
        transformers_logits(hf_folder, tokens)


def test_llama_cpp_runs_the_trained_model_to_the_recorded_choices() -> None:
    trained = real("trained_tp2_pp4")
    tokens, best = (np.load(trained / "reference" / f"{name}.npy")[:2] for name in ("tokens", "top1"))
    logits = llama_logits(trained / "llama_quantize" / "Q8_0.gguf", tokens)
    assert np.mean(logits.argmax(-1) == best) > 0.98

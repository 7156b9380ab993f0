"""Llama and Mistral as gpt-neox trains them: whatever its era stored, transformers computes the model again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.verify.logits.compare import compare_predictions
from tests.llama_shards import Era, llama, write
from tests.oracles import causal_logits, program

TOKENS = np.random.default_rng(3).integers(0, 280, (2, 40))
ERAS = {
    "per-head": Era("w", "per-head"),
    "blocks": Era("linear", "blocks", inside=True),
    "linear1 with heads": Era("linear", "per-head", inside=True),
    "TransformerEngine": Era("te", "te", te_norms=True),
    "TE norms": Era("linear", "blocks", te_norms=True),
    "TE attention": Era("linear", "te", inside=True),
}


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    program("transformers")


def logits_of(model: Any) -> Any:
    """What transformers computes with the model as it was made."""
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: tensor.floats(0, tensor.rows) for name, tensor in checkpoint.tensors.items()}


def check(folder: Path, model: Any, tmp_path: Path, **asked: Any) -> Checkpoint:
    """The source's tensors are the model's, its Hugging Face folder computes its logits, rank by rank it does too."""
    source = open_checkpoint(folder, **asked)
    made = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    before = {name: values.numpy() for name, values in model.state_dict().items()}
    if source.config.tied:
        del before["lm_head.weight"]
    found = weights_of(source)
    assert found.keys() == before.keys()
    assert all(np.array_equal(found[name], values) for name, values in before.items())
    again = causal_logits(made, TOKENS, "float32")
    assert np.array_equal(again, logits_of(model))
    report = compare_predictions(source, open_checkpoint(made), TOKENS)
    assert report.figures.mean < 1e-9
    assert report.figures.largest_difference < 1e-4 * np.abs(again).max()
    return source


@pytest.mark.parametrize(("groups", "tp"), [
    (4, 2), (2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 1), (4, 4), (2, 1), (1, 1)))
])  # fmt: skip
@pytest.mark.parametrize("name", ERAS)
def test_every_era_gives_the_model_that_was_trained(name: str, groups: int, tp: int, tmp_path: Path) -> None:
    model = llama(groups, rms_norm_eps=1e-8 if name in ("TransformerEngine", "per-head") else 1e-5, **biases(name))
    era = replace(ERAS[name], tp=tp)
    asked = {"qkv_layout": era.qkv} if name in ("blocks", "linear1 with heads", "TE norms") and groups < 4 else {}
    check(write(tmp_path / "run", model, era), model, tmp_path, **asked)


def biases(name: str) -> dict[str, bool]:
    """TransformerEngine's layers have biases whatever the YAML says."""
    return {"attention_bias": name in ("TransformerEngine", "TE attention"), "mlp_bias": name == "TransformerEngine"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pp", [0, 2])
def test_every_number_type_and_kind_of_files(pp: int, dtype: str, tmp_path: Path) -> None:
    model = llama(dtype=dtype)
    era = Era(pp=pp, dtype=dtype, inside=True)
    check(write(tmp_path / "run", model, era), model, tmp_path, qkv_layout="blocks")


@pytest.mark.parametrize("settings", [
    {"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True},
    {"tie_word_embeddings": True}, {"rope_theta": 1e6}, {"intermediate_size": 46}, {"window": 9},
], ids=lambda settings: " ".join(settings))  # fmt: skip
def test_biases_tied_heads_other_bases_odd_widths_and_windows(settings: dict[str, Any], tmp_path: Path) -> None:
    model = llama(**settings)
    source = check(write(tmp_path / "run", model, Era(inside=True)), model, tmp_path, qkv_layout="blocks")
    assert source.architecture.name == ("mistral" if "window" in settings else "llama")


@pytest.mark.parametrize(("era", "changes", "told"), [
    ("per-head", {"activation": None}, "activation: gelu is not supported"),  # the default of gpt-neox
    ("per-head", {"activation": "gelu"}, "activation: gelu is not supported"),
    ("blocks", {"activation": "silu"}, "activation: silu is not supported"),  # since 2024-09 it gates nothing
    ("blocks", {"sliding_window_width": 0}, "sliding_window_width is '0'; expected a whole number above zero"),
], ids=str)  # fmt: skip
def test_shards_of_another_function_are_refused_by_name(
    era: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "run", llama(), ERAS[era])
    [path] = source.rglob("*.yml")
    settings = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(source, qkv_layout=ERAS[era].qkv)

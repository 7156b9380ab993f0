"""Hugging Face folders of Llama as people have them: any file, any prefix, what transformers makes of old ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoxconv import open_checkpoint
from neoxconv.errors import CheckpointError, PlanError
from tests.little_llamas import little_llama

Tensors = dict[str, torch.Tensor]


def prefixed(before: str) -> Callable[[str], str]:
    return lambda name: before + name


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda name: name,
    "without a base": lambda name: name.removeprefix("model."),
    "DataParallel": prefixed("module."),
    "a trainer": prefixed("model."),
    "both": prefixed("_forward_module.model."),
    "compiled": prefixed("_orig_mod."),
}


def written(folder: Path, tensors: Tensors, file: str, **settings: Any) -> Path:
    """The folder with these tensors in another file, its configuration changed."""
    (folder / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling: str, tied: bool, file: str, tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf", tie_word_embeddings=tied)
    weights = load_file(source / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}  # of transformers 4
    names = {SPELLINGS[spelling](name): tensor for name, tensor in (weights | buffers).items()}
    checkpoint = open_checkpoint(written(source, names, file))
    assert set(checkpoint.tensors) == set(weights) and len(checkpoint.dropped) == 2
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.floats(0, tensor.rows).reshape(tensor.shape), weights[name].float().numpy()), name


def test_a_tied_model_may_store_its_head(tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    checkpoint = open_checkpoint(written(source, weights | {"lm_head.weight": embedding}, "model.safetensors"))
    assert "lm_head.weight" not in checkpoint.tensors and checkpoint.dropped == ("lm_head.weight",)


@pytest.mark.parametrize("kind", ["llama3", "linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("table", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_scaled_rotary_positions_are_refused_by_name(kind: str, table: str, word: str, tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope")}
    scaled = {table: {word: kind, "factor": 8.0, "rope_theta": 10000.0}}
    (source / "config.json").write_text(json.dumps(config | scaled))
    with pytest.raises(CheckpointError, match=f"config.json: rope_type is '{kind}', which is not supported"):
        open_checkpoint(source)


def test_what_an_old_configuration_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf", num_key_value_heads=4, rms_norm_eps=1e-6)
    weights = load_file(source / "model.safetensors")
    left_out = dict.fromkeys(("num_key_value_heads", "rms_norm_eps", "head_dim", "attention_bias", "mlp_bias",
                              "rope_parameters", "tie_word_embeddings", "hidden_act"), ...)  # fmt: skip
    config = open_checkpoint(written(source, weights, "model.safetensors", **left_out)).config
    assert (config.key_heads, config.norm_eps, config.rotary_base) == (4, 1e-6, 10000)
    assert not (config.tied or config.attention_bias or config.mlp_bias) and config.activation == "silu"


@pytest.mark.parametrize("settings", [
    {"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
], ids=" ".join)  # fmt: skip
def test_rotation_of_a_part_is_refused_because_programs_differ(settings: dict[str, Any], tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | settings))
    with pytest.raises(CheckpointError, match=r"config.json: partial_rotary_factor is 0.5, which is not supported"):
        open_checkpoint(source)


def test_a_window_of_no_named_family_is_refused(tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf", mistral=True, sliding_window=8)
    weights = load_file(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json: model_type is missing; expected llama"):
        open_checkpoint(written(source, weights, "model.safetensors", model_type=...))


def test_a_family_without_presets_offers_none(tmp_path: Path) -> None:
    source = little_llama(tmp_path / "hf")
    with pytest.raises(PlanError, match=f"--preset 20B: {source} is of a family without any"):
        open_checkpoint(source, preset="20B")
    (source / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no configuration beside the weights.* Put its config.json beside it\.$"
    ):
        open_checkpoint(source / "model.safetensors")


def test_heads_of_one_number_cannot_be_rotated(tmp_path: Path) -> None:
    """transformers makes two numbers of each, gpt-neox stops; nothing may be written of them."""
    source = little_llama(tmp_path / "hf", num_key_value_heads=4)
    weights = load_file(source / "model.safetensors")
    settings = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": ...}
    with pytest.raises(CheckpointError, match="1 numbers of each head are rotated; expected an even number above 0"):
        open_checkpoint(written(source, weights, "model.safetensors", **settings))

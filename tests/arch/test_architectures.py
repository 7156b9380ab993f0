"""The rows of ARCHITECTURES: each is whole, and another one needs no line of code outside of its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.forward import Forward, forward_of
from neoxconv.arch.gpt_neox.config_gguf import from_gguf, to_gguf
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.core.model import Architecture
from neoxconv.core.table import ModelConfig, Weight
from neoxconv.errors import CheckpointError
from neoxconv.sources import checkpoint
from tests.toy import toy


def renamed(name: str) -> str:
    """A tensor's name in another family."""
    return name.replace("gpt_neox.", "other.").replace("embed_out", "lm_head").replace("attn_qkv", "attn_all")


def renamed_weight(weight: Weight) -> Weight:
    norm = renamed(weight.norm) if weight.norm else None
    return replace(weight, unified=renamed(weight.unified), gguf=renamed(weight.gguf), norm=norm)


OTHER = replace(
    GPT_NEOX,
    name="other",
    gguf_name="othergguf",
    title="Other",
    weights=tuple(map(renamed_weight, GPT_NEOX.weights)),
    to_hf=lambda config, dtype: GPT_NEOX.to_hf(config, dtype) | {"model_type": "other"},
    to_gguf=lambda config: {key.replace("gptneox", "othergguf"): value for key, value in to_gguf(config).items()},
    config_of={
        **GPT_NEOX.config_of,
        "gguf": lambda index, measured, opening: from_gguf(
            replace(index, settings={k.replace("othergguf", "gptneox"): v for k, v in index.settings.items()}),
            measured, opening,
        ),
    },
)  # fmt: skip


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with a second row."""
    monkeypatch.setattr(checkpoint, "ARCHITECTURES", (GPT_NEOX, OTHER))
    yield


def folder_of_other(tmp_path: Path) -> Path:
    """A Hugging Face folder of the other family."""
    folder = tmp_path / "other"
    run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("hf")), folder)
    save_file({renamed(k): v for k, v in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "other"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").unlink()  # it names the family
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_row_is_whole(architecture: Architecture) -> None:
    roles = [weight.role for weight in architecture.weights]
    assert all(roles.count(role) == 1 for role in ("embedding", "head"))
    assert any(weight.linear for weight in architecture.weights)
    for preset in architecture.presets.values():
        assert all(size in preset.sizes for weight in architecture.weights for size in weight.shape)
        assert architecture.to_hf(preset, "float16")["model_type"] == architecture.name
    forward = forward_of(architecture)
    for name in ("embed", "block", "final", "logits"):
        theirs = list(signature(getattr(forward, name)).parameters)
        assert theirs == list(signature(getattr(Forward, name)).parameters)[1:], name


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("format", ["hf", "safetensors", "gguf", "bnb", "float8", "slim"])
def test_another_architecture_needs_its_row_only(format: str, tmp_path: Path) -> None:
    source = open_checkpoint(folder_of_other(tmp_path))
    assert source.architecture is OTHER and "lm_head.weight" in source.tensors
    target = tmp_path / f"x.{format}"
    run(make_plan(source, Recipe(format)), target)
    again = open_checkpoint(target)
    if format != "slim":  # there both have the same names: gpt-neox's
        assert again.architecture is OTHER
        assert verify_weights(source, again).passed
    if format == "gguf":
        assert again.index.settings["general.architecture"] == "othergguf"
        assert again.index.settings["general.name"].startswith("Other ")
    if format == "float8":
        assert again.index.settings["quantization_config"]["ignore"] == ["lm_head"]
    if format == "hf":
        assert "tags:\n- other\n" in (target / "README.md").read_text()


@pytest.mark.usefixtures("two")
def test_where_nothing_says_the_family_the_names_tell_it(tmp_path: Path) -> None:
    folder = folder_of_other(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).architecture is OTHER
    assert open_checkpoint(tmp_path / "toy").architecture is GPT_NEOX


@pytest.mark.usefixtures("two")
def test_an_unknown_family_is_told_with_all_that_are_known(tmp_path: Path) -> None:
    folder = folder_of_other(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "third"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is a third model; expected gpt_neox or gptneox or other or othergguf"):
        open_checkpoint(folder)


def test_a_model_is_spelled_once() -> None:
    config = GPT_NEOX.presets["20B"]
    assert GPT_NEOX.names(config) is GPT_NEOX.names(replace(config, context=4096))
    assert GPT_NEOX.names(config) is not GPT_NEOX.names(replace(config, tied=True))


def test_a_configuration_tells_every_field() -> None:
    config = GPT_NEOX.presets["20B"]
    assert ModelConfig(**config.facts) == config

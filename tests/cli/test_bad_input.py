"""Bad input, bad targets and unsupported models: one clear message each, no traceback, nothing half-made left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neoxconv.engine import publish
from tests.fixtures import fixture
from tests.helpers import cli, digests, writable_copy

NAME, STEP = "neox_2022_tp2_pp4", "global_step10"

Damage = Callable[[Path], Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return writable_copy(tmp_path)


# --- bad input -------------------------------------------------------------------------------------------------------


def layer(number: int, rank: int) -> str:
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def edited(number: int, rank: int, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A layer file with other tensors in it."""

    def damage(step: Path) -> None:
        tensors = torch.load(step / layer(number, rank), weights_only=True)
        change(tensors)
        torch.save(tensors, step / layer(number, rank))

    return damage


def with_setting(key: str, value: Any) -> Damage:
    """The YAML with another value; a later key of the same name wins in YAML."""

    def damage(step: Path) -> None:
        [path] = (step / "configs").glob("*.yml")
        head, tail = path.read_text().rsplit("}", 1)
        path.write_text(f'{head.rstrip()}\n  "{key}": {json.dumps(value)},\n}}{tail}')

    return damage


def without_layer(step: Path) -> None:
    for path in step.glob("layer_05-*"):
        path.unlink()


def narrower(tensors: dict[str, Any]) -> None:
    tensors["mlp.dense_h_to_4h.weight"] = tensors["mlp.dense_h_to_4h.weight"][:-8].clone()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(step: Path) -> None:
    shutil.rmtree(step.parent)
    step.parent.mkdir()


def empty_step(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


ENDLESS = "attention-config: &a [*a]\npos-emb: rotary\n"
BAD_INPUT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing path": (lambda step: shutil.rmtree(step.parent), ("checkpoints: does not exist",)),
    "empty folder": (empty, ("checkpoints: holds no model",)),
    "missing rank file": (lambda step: (step / layer(3, 1)).unlink(), (f"{layer(3, 1)}: is missing",)),
    "missing layer": (without_layer, (f"{layer(5, 0)}: is missing",)),
    "truncated": (lambda step: truncate(step / layer(4, 0)), (layer(4, 0),)),
    "not a zip": (lambda step: (step / layer(4, 1)).write_text("<html>404</html>" * 9), (layer(4, 1),)),
    "ranks disagree": (edited(4, 1, narrower), (layer(4, 1), "layers.2.mlp.dense_h_to_4h.weight", "on rank 1")),
    "hidden size": (with_setting("hidden-size", 128), ("embed_in.weight", "[512, 64]", "[512, 128]")),
    "layers": (with_setting("num-layers", 8), ("layers.7.", "missing")),
    "degree": (with_setting("model-parallel-size", 4), ("model_parallel_size 4", "2 rank")),
    "unknown tensor": (edited(4, 0, lambda t: t.update(gate=torch.ones(3))), (layer(4, 0), "4.gate")),
    "reward head": (edited(10, 0, lambda t: t.update({"rm_linear.weight": torch.ones(3)})), ("rm_linear.weight",)),
    "alibi": (with_setting("pos-emb", "alibi"), ("pos_emb: alibi",)),
    "rmsnorm": (with_setting("norm", "rmsnorm"), ("norm: rmsnorm",)),
    "gpt_j_tied": (
        with_setting("gpt_j_tied", True),
        ("layernorm.weight was trained", "gpt_j_tied is true"),
    ),
    "relu": (with_setting("activation", "relu"), ("activation: relu",)),
    "no heads": (with_setting("num-attention-heads", 0), (".yml: num_attention_heads is '0'", "whole number")),
    "null heads": (with_setting("num-attention-heads", None), (".yml: num_attention_heads is missing",)),
    "layers in words": (with_setting("num-layers", "six"), (".yml: num_layers is 'six'", "whole number")),
    "half a layer": (with_setting("num-layers", 6.5), ("num_layers is '6.5'",)),
    "no context": (with_setting("max-position-embeddings", -5), ("max_position_embeddings is '-5'",)),
    "more than all": (with_setting("rotary_pct", 7), ("rotary_pct is '7'", "1 at most")),
    "maybe": (with_setting("gpt_j_residual", "maybe"), ("gpt_j_residual is 'maybe'", "true or false")),
    "ranks of two types": (
        edited(4, 1, lambda t: t.update({"mlp.dense_h_to_4h.weight": t["mlp.dense_h_to_4h.weight"].float()})),
        ("layers.2.mlp.dense_h_to_4h.weight is F16 and F32",),
    ),
    "a million layers": (with_setting("num-layers", 3_000_000), ("says 3000000 layers but the files hold 6",)),
    "latest of nothing": (empty_step, ("global_step10: holds neither layer_NN",)),
    "lists without end": (
        lambda step: next((step / "configs").glob("*")).write_text(ENDLESS),
        ("cannot be read as YAML (it is nested deeper",),
    ),
    "empty latest": (lambda step: (step.parent / "latest").write_text(""), ("latest: names ''",)),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_one_message(case: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = BAD_INPUT[case]
    damage(source / STEP)
    target = source.parent / "out"
    assert cli("convert", source, target, "--to", "hf") == 1
    message = capsys.readouterr().err
    assert message.startswith("neoxconv: ") and "Traceback" not in message and len(message.splitlines()) <= 11
    assert all(words in message for words in expected), message
    assert not target.exists() and not publish.partial_of(target).exists()


def test_erf_gelu_becomes_gguf_with_a_warning(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_setting("bias-gelu-fusion", False)(source / STEP)
    assert cli("convert", source, source.parent / "x.gguf", "--to", "gguf") == 0
    assert "erf GELU" in capsys.readouterr().err


CONFIG_JSON: dict[str, tuple[dict[str, Any], str]] = {
    "model type": ({"model_type": []}, "is a [] model"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
    "long rope": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    "huge": ({"num_hidden_layers": 10**400}, "num_hidden_layers is '1000"),
    "no layers": ({"num_hidden_layers": None}, "config.json: num_hidden_layers is missing"),
}


@pytest.mark.parametrize("case", CONFIG_JSON)
def test_a_bad_config_json_is_named(case: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = CONFIG_JSON[case]
    folder = source.parent / "hf"
    assert cli("convert", source, folder, "--to", "hf", "--quiet") == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert cli("inspect", folder) == 1
    message = capsys.readouterr().err
    assert expected in message and "unexpected" not in message


@pytest.mark.parametrize("scaling", ["x", [1], {}])
def test_a_rope_section_that_says_nothing_is_none(scaling: Any, source: Path) -> None:
    folder = source.parent / "hf"
    assert cli("convert", source, folder, "--to", "hf", "--quiet") == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    assert cli("inspect", folder) == 0


def test_the_ends_of_text_survive(source: Path) -> None:
    folder, again, file = (source.parent / name for name in ("hf", "again", "x.gguf"))
    assert cli("convert", source, folder, "--to", "hf", "--quiet") == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 5, "eos_token_id": 77}))
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert cli("convert", folder, file, "--to", "gguf", "--quiet") == 0
    assert cli("convert", file, again, "--to", "hf", "--quiet") == 0
    for name in ("config.json", "generation_config.json"):
        made = json.loads((again / name).read_text())
        assert (made["bos_token_id"], made["eos_token_id"]) == (5, 77)


# --- bad targets -----------------------------------------------------------------------------------------------------


def test_a_target_that_exists_is_left_alone_unless_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "out"
    target.mkdir()
    assert cli("convert", source, target, "--to", "hf", "--quiet") == 0  # an empty folder counts as absent
    (target / "note.txt").write_text("mine")
    assert cli("convert", source, target, "--to", "hf") == 1
    assert "out: exists already" in capsys.readouterr().err
    assert cli("convert", source, target, "--to", "hf", "--overwrite") == 1
    assert "note.txt" in capsys.readouterr().err and (target / "note.txt").read_text() == "mine"
    (target / "note.txt").unlink()
    assert cli("convert", source, target, "--to", "hf", "--overwrite", "--quiet") == 0


def test_overwrite_replaces_no_folder_that_is_not_ours(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "thesis"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    assert cli("convert", source, target, "--to", "hf", "--overwrite") == 1
    assert "may hold other things" in capsys.readouterr().err
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_folder_never_replaces_a_file(source: Path) -> None:
    target = source.parent / "x"
    assert cli("convert", source, target, "--to", "safetensors", "--quiet") == 0
    before = target.read_bytes()
    assert cli("convert", source, target, "--to", "hf", "--overwrite", "--quiet") == 1
    assert target.read_bytes() == before and target.with_name("x.manifest.json").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_the_target(exists: bool, source: Path) -> None:
    real, link = source.parent / "real", source.parent / "link"
    link.symlink_to(real)
    if exists:
        assert cli("convert", source, real, "--to", "hf", "--quiet") == 0
    assert cli("convert", source, link, "--to", "hf", "--quiet", "--overwrite") == 0
    assert link.is_symlink() and (real / "config.json").is_file()
    assert sorted(p.name for p in source.parent.iterdir()) == ["checkpoints", "link", "real", "tiny_tokenizer.json"]


@pytest.mark.parametrize("name", ["notes.txt", "bad.safetensors", "bad.gguf", "bad.pt", "empty.pt"])
def test_a_file_that_is_no_model_never_stands_for_its_neighbour(
    name: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", source, source.parent / "good.gguf", "--to", "gguf", "--quiet") == 0
    stranger = source.parent / name
    stranger.write_bytes(b"" if name.startswith("empty") else b"hello, I am no model")
    assert cli("inspect", stranger) == 1
    assert f"{name}: is no model" in capsys.readouterr().err
    assert cli("verify", source, stranger) != 0


def test_ends_that_contradict_each_other_are_both_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source.parent / "hf"
    assert cli("convert", source, folder, "--to", "hf", "--quiet") == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 77}))
    assert cli("convert", folder, source.parent / "x.gguf", "--to", "gguf") == 0
    assert "eos_token_id is 77 in the source, 0 by the tokenizer's settings" in capsys.readouterr().err


def test_a_tokenizer_of_a_larger_vocabulary_is_told_and_by_gguf_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fixture("trained_tp2_pp4/tokenizer.json")
    assert cli("convert", source, source.parent / "out", "--to", "hf", "--tokenizer", other) == 0
    told = capsys.readouterr().err
    assert "the tokenizer has 8190 tokens, the model 512 rows" in told and "the source's own" in told
    assert cli("convert", source, source.parent / "out.gguf", "--to", "gguf", "--tokenizer", other) == 1
    assert "the embedding has 512 rows" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_target_that_cannot_be_written_is_named(place: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source.parent / "file").touch()
    assert cli("convert", source, source.parent / place, "--to", "hf", "--quiet") == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and Path(place).parts[-2] in message


def test_a_disk_too_small_is_told_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    before = digests(source.parent)
    assert cli("convert", source, source.parent / "out", "--to", "hf", "--quiet") == 1
    assert "are needed" in capsys.readouterr().err
    assert digests(source.parent) == before


def test_a_disk_that_fills_up_stops_the_run_and_the_same_command_finishes(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, command = source.parent / "out", ("--to", "hf", "--quiet")

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert cli("convert", source, target, *command) == 1
    message = capsys.readouterr().err
    assert "out: No space left on device: " in message and len(message.splitlines()) == 1
    assert not target.exists()
    assert cli("convert", source, target, *command) == 0


@pytest.mark.parametrize(
    "target", ["checkpoints", f"checkpoints/{STEP}", "checkpoints/out", f"checkpoints/{STEP}/x", "."]
)
def test_a_target_in_or_around_the_source_is_refused(
    target: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(source)
    assert cli("convert", source, source.parent / target, "--to", "hf", "--overwrite") == 1
    assert "outside of it" in capsys.readouterr().err
    assert digests(source) == before

"""The folders that people have: told by what is in them and read, or refused in words that say what they are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from tests.helpers import cli
from tests.toy import toy

Tensors = dict[str, torch.Tensor]
BASE, HEAD, EMBEDDING = "gpt_neox.", "embed_out.weight", "gpt_neox.embed_in.weight"
BUFFER = "gpt_neox.layers.1.attention.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    run(make_plan(open_checkpoint(toy(folder)), Recipe("hf")), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def weights(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def settings_of(model: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text()) | changes


def saved(folder: Path, model: Path, tensors: Tensors, name: str = "model.safetensors", **changes: Any) -> Path:
    """A folder of the model's configuration and these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings_of(model, **changes)))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file({key: value.clone() for key, value in tensors.items()}, folder / name)
    return folder


def assert_read(source: Path | Checkpoint, expected: Tensors) -> Checkpoint:
    """The source is that model, every tensor under its unified name, bit for bit."""
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.floats(0, tensor.rows), expected[name].float().numpy()), name
    return checkpoint


def renamed(tensors: Tensors, rule: Callable[[str], str]) -> Tensors:
    return {rule(name): tensor for name, tensor in tensors.items()}


# --- names under prefixes --------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[str], str]] = {
    "lm_head": lambda name: name.replace("embed_out", "lm_head"),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile within": lambda name: f"module._orig_mod.{name}",
    "torch.compile around": lambda name: f"_orig_mod.module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning with DeepSpeed": lambda name: f"_forward_module.model.{name}",
    "model for gpt_neox": lambda name: name.replace(BASE, "model.").replace("embed_out", "lm_head"),
    "wrapped, model for gpt_neox": lambda name: (
        "module." + name.replace(BASE, "model.").replace("embed_out", "lm_head")
    ),
    "no gpt_neox": lambda name: name.removeprefix(BASE),
    "wrapped, no gpt_neox": lambda name: "module." + name.removeprefix(BASE),
    "each layer compiled": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
    ),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_every_wrapper_are_read(
    spelling: str, file: str, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    assert_read(saved(tmp_path, model, renamed(weights, SPELLINGS[spelling]), file), weights)


def test_buffers_under_a_prefix_are_dropped(model: Path, weights: Tensors, tmp_path: Path) -> None:
    stored = renamed({**weights, BUFFER: torch.ones(4)}, SPELLINGS["torch.compile"])
    assert assert_read(saved(tmp_path, model, stored), weights).dropped == (f"_orig_mod.{BUFFER}",)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_under_a_prefix_are_held_against_the_settings(
    spelling: str, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    """As the rotary base of the settings they say nothing, else the tensor is named as it is in the file."""
    settings = settings_of(model)
    dims = int(settings["hidden_size"] / settings["num_attention_heads"] * settings["rotary_pct"])
    exponents = torch.arange(0, dims, 2) / dims
    for base in (10000.0, 500000.0):
        stored = renamed({**weights, BUFFER: base**-exponents}, SPELLINGS[spelling])
        doubts = assert_read(saved(tmp_path / f"{base:.0f}", model, stored), weights).doubts
        assert len(doubts) == (base != 10000)
    [doubt] = doubts
    assert f": {SPELLINGS[spelling](BUFFER)} holds rotary frequencies of base 500000 and {dims} dimensions" in doubt


@pytest.mark.parametrize("odd", [EMBEDDING, HEAD, "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"])
@pytest.mark.parametrize(("most", "one"), [("module.", ""), ("", "module."), ("_orig_mod.", "module.")])
def test_a_mixture_of_prefixes_names_the_tensor_as_it_is_in_the_file(
    most: str, one: str, odd: str, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    stored = renamed(weights, lambda name: (one if name == odd else most) + name)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {one}{odd} is not a tensor of gpt_neox"):
        open_checkpoint(saved(tmp_path, model, stored))


@pytest.mark.parametrize("name", ["score.weight", "module.v_head.summary.weight", "gpt_neox.layers.0.q_norm.weight"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_tensor_of_another_model_is_refused_by_name(
    name: str, prefix: str, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    stored = renamed({**weights, name: torch.ones(2)}, lambda name: prefix + name)
    with pytest.raises(CheckpointError, match=rf"{prefix}{name} is not a tensor of gpt_neox; a model of another kind"):
        open_checkpoint(saved(tmp_path, model, stored))


def test_names_that_are_all_unknown_are_shown(model: Path, weights: Tensors, tmp_path: Path) -> None:
    stored = renamed(weights, lambda name: "policy." + name)
    with pytest.raises(CheckpointError, match=rf"policy\.{EMBEDDING} is not a tensor|policy\.embed_out"):
        open_checkpoint(saved(tmp_path, model, stored))


def test_one_weight_under_two_names_is_refused(model: Path, weights: Tensors, tmp_path: Path) -> None:
    stored = {**weights, "lm_head.weight": weights[HEAD]}
    with pytest.raises(CheckpointError, match=r"gives embed_out\.weight a second time"):
        open_checkpoint(saved(tmp_path, model, stored))


@pytest.mark.parametrize("spelling", ["no gpt_neox", "model for gpt_neox", "DistributedDataParallel"])
def test_a_model_without_its_head_is_told(spelling: str, model: Path, weights: Tensors, tmp_path: Path) -> None:
    stored = renamed({k: v for k, v in weights.items() if k != HEAD}, SPELLINGS[spelling])
    with pytest.raises(CheckpointError, match=r"embed_out\.weight is missing; the model was saved without its head"):
        open_checkpoint(saved(tmp_path, model, stored))


# --- tied models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HEAD, "lm_head.weight"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_tied_model_may_store_its_head(name: str, file: str, model: Path, weights: Tensors, tmp_path: Path) -> None:
    tied = {k: v for k, v in weights.items() if k != HEAD}
    source = saved(tmp_path, model, {**tied, name: tied[EMBEDDING]}, file, tie_word_embeddings=True)
    checkpoint = assert_read(source, tied)
    assert checkpoint.dropped == (name,)
    assert checkpoint.notes == (f"{name} is the embedding once more, as tie_word_embeddings says, and is left out",)


@pytest.mark.parametrize("row", [0, 17, 511])
def test_a_tied_model_with_another_head_is_refused(row: int, model: Path, weights: Tensors, tmp_path: Path) -> None:
    head = weights[EMBEDDING].clone()
    head[row, 5] += 0.5
    source = saved(tmp_path, model, {**weights, HEAD: head}, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=rf"{HEAD} is not {EMBEDDING} \(the first other row is {row}\), but tie_"):
        open_checkpoint(source)


@pytest.mark.parametrize("head", [torch.ones(3, 64).half(), torch.ones(512, 64).int()])
def test_a_tied_head_of_another_shape_or_kind_is_refused(
    head: torch.Tensor, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    source = saved(tmp_path, model, {**weights, HEAD: head}, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=rf"{HEAD} is not {EMBEDDING} \(\w+ \[{len(head)}, 64\] and F16 \[512"):
        open_checkpoint(source)


# --- what a folder is ------------------------------------------------------------------------------------------------


def trained(folder: Path, tensors: Tensors, name: str = "mp_rank_00_model_states.pt", step: int = 500) -> Path:
    """DeepSpeed's part of a checkpoint of Hugging Face's Trainer."""
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "latest").write_text(f"global_step{step}")
    torch.save({"module": tensors, "ds_version": "0.14.0"}, folder / f"global_step{step}" / name)
    torch.save(
        {"optimizer_state_dict": {}}, folder / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    return folder


@pytest.mark.parametrize("damage", ["other weights", "no weights", "no zip", "gone", "two steps"])
def test_a_trainers_checkpoint_is_read_as_hugging_face(
    damage: str, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    """Whatever became of DeepSpeed's part."""
    other = {name: value + 1 for name, value in weights.items()}
    source = trained(saved(tmp_path / "checkpoint-500", model, weights), {} if damage == "no weights" else other)
    step = source / "global_step500"
    if damage == "no zip":
        (step / "mp_rank_00_model_states.pt").write_bytes(b"<html>")
    if damage == "gone":
        shutil.rmtree(step)
    if damage == "two steps":
        (source / "latest").unlink()
        shutil.copytree(step, source / "global_step400")
    assert assert_read(source, weights).index.format == "hf"


@pytest.mark.parametrize("spelling", [None, "DistributedDataParallel", "torch.compile", "lm_head"])
@pytest.mark.parametrize("config", ["checkpoint-500/global_step500", "checkpoint-500", "."])
def test_deepspeeds_part_alone_is_read(
    config: str, spelling: str | None, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    stored = renamed(weights, SPELLINGS[spelling]) if spelling else weights
    source = trained(tmp_path / "checkpoint-500", stored)
    shutil.copy(model / "config.json", tmp_path / config)
    step = source / "global_step500"
    for given in (source, step, source / "latest", step / "mp_rank_00_model_states.pt"):
        checkpoint = assert_read(given, weights)
        assert checkpoint.index.format == "deepspeed"
        assert checkpoint.index.set_aside == ("zero_pp_rank_0_mp_rank_00_optim_states.pt",)


def test_deepspeeds_part_without_a_configuration_says_what_it_needs(weights: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no configuration beside the weights.*Put its config\.json beside it"):
        open_checkpoint(trained(tmp_path / "checkpoint-500", weights))


def test_deepspeeds_part_of_several_ranks_is_refused(model: Path, weights: Tensors, tmp_path: Path) -> None:
    source = trained(tmp_path, weights)
    shutil.copy(
        source / "global_step500/mp_rank_00_model_states.pt", source / "global_step500/mp_rank_01_model_states.pt"
    )
    with pytest.raises(CheckpointError, match="holds 2 model-parallel ranks under names that are not gpt-neox's"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", None])
def test_weights_that_zero_3_emptied_are_told(name: str | None, model: Path, weights: Tensors, tmp_path: Path) -> None:
    empty = {key: torch.zeros(0, dtype=torch.half) for key in weights}
    source = trained(tmp_path, empty, name) if name else saved(tmp_path, model, empty)
    with pytest.raises(
        CheckpointError, match=r"is empty, as ZeRO stage 3 leaves it; make the model whole with.*zero_to"
    ):
        open_checkpoint(source)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("beside", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_gpt_neox_with_files_of_hugging_face_is_gpt_neox(
    beside: str, sequential: bool, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    source = toy(tmp_path, sequential=sequential)
    expected = open_checkpoint(source)
    for folder in (source, source / "global_step10"):
        (folder / beside).write_text(json.dumps(settings_of(model)))
        for given in (source, source / "global_step10"):
            found = open_checkpoint(given)
            assert found.index.format == "neox" and found.config == expected.config


def test_a_gguf_or_an_odd_name_beside_a_configuration_is_read(model: Path, weights: Tensors, tmp_path: Path) -> None:
    for name, format in (("weights.safetensors", "safetensors"), ("model.gguf", "gguf")):
        folder = saved(tmp_path / format, model, weights, "weights.safetensors")
        if format == "gguf":
            made, tokenizer = tmp_path / name, model / "tokenizer.json"
            run(make_plan(open_checkpoint(folder), Recipe("gguf", type="F16", tokenizer=tokenizer)), made)
            (folder / "weights.safetensors").unlink()
            made.rename(folder / name)
        assert open_checkpoint(folder).index.format == format


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_without_an_index_are_read(model: Path, weights: Tensors, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        part = {name: value for i, (name, value) in enumerate(weights.items()) if i % 3 == number - 1}
        saved(tmp_path, model, part, f"model-{number:05d}-of-00003.safetensors")
    assert_read(tmp_path, weights)
    assert_read(tmp_path / "model-00002-of-00003.safetensors", weights)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; download it into this folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_index_may_be_wrong_about_buffers(
    prefix: str, listed: bool, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    named = renamed(weights, lambda name: prefix + name)
    stored = named if listed else {**named, prefix + BUFFER: torch.ones(4)}
    saved(tmp_path, model, stored, "part.safetensors")
    places = dict.fromkeys([*named, *([prefix + BUFFER] if listed else [])], "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_read(tmp_path, weights)


# --- the hub ---------------------------------------------------------------------------------------------------------


def cached(root: Path, model: Path, *revisions: str) -> Path:
    """The hub's cache of a model: files in blobs, links to them in each snapshot."""
    (root / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, root / "blobs" / f"{number:040x}")
        for revision in revisions:
            (root / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
            (root / "snapshots" / revision / path.name).symlink_to(f"../../blobs/{number:040x}")
    return root


@pytest.mark.parametrize(
    ("revisions", "main"),
    [(["0123"], "0123"), (["0123"], None), (["0123"], "gone"), (["0123", "4567", "89ab"], "4567\n")],
)
def test_the_root_of_the_hubs_cache_is_its_snapshot(
    revisions: list[str], main: str | None, model: Path, weights: Tensors, tmp_path: Path
) -> None:
    root = cached(tmp_path / "models--org--tiny", model, *revisions)
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    found = assert_read(root, weights)
    assert found.index.folder == root / "snapshots" / (main or revisions[0]).strip().replace("gone", "0123")


@pytest.mark.parametrize("main", [None, "gone", "../../elsewhere", ""])
def test_of_several_snapshots_none_is_guessed(main: str | None, model: Path, tmp_path: Path) -> None:
    root = cached(tmp_path / "models--org--tiny", model, "0123", "4567")
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    with pytest.raises(CheckpointError, match=r"has 2 snapshots.*give one: .*snapshots/0123, .*snapshots/4567"):
        open_checkpoint(root)


def test_a_cache_of_several_models_lists_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"models--org--{name}").mkdir()
    with pytest.raises(CheckpointError, match=r"\(models--org--a, models--org--b\), and no model itself; give one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["EleutherAI/pythia-70m", "org/model_v1.0"])
def test_a_name_of_the_hub_is_hinted_at(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"^{path}: does not exist\. If .*hf download {path}\), or give hf://{path}\.$"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("path", ["gone", "../org/model", "/org/model", "a/b/c", "org/mo del"])
def test_other_paths_that_do_not_exist_are_no_names_of_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{path}: does not exist\.$"):
        open_checkpoint(path)


# --- what is no model ------------------------------------------------------------------------------------------------

FOREIGN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), "an adapter .*merge_and_unload"),
    "old adapter": (("adapter_config.json", "adapter_model.bin"), "an adapter .*merge_and_unload"),
    "ZeRO-3": (("latest", "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"), "ZeRO stage 3.*zero_to_fp32"),
    "ZeRO-3's folder": (("zero_pp_rank_0_mp_rank_00_model_states.pt",), "ZeRO stage 3.*zero_to_fp32"),
    "FSDP": (("config.json", "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"), "dcp_to_torch"),
    "DCP": (("__0_0.distcp", "__1_0.distcp", ".metadata"), "dcp_to_torch"),
    "universal": (("latest_universal", "global_step5_universal/zero/a.weight/fp32.pt"), "a universal checkpoint"),
    "universal's folder": (("zero/a.weight/fp32.pt", "zero/a.weight/exp_avg.pt"), "a universal checkpoint"),
    "Megatron-LM": (("latest_checkpointed_iteration.txt", "iter_5/mp_rank_00/model_optim_rng.pt"), "Megatron-LM"),
    "Flax": (("config.json", "flax_model.msgpack"), "a model for another framework"),
    "a run of a trainer": (
        ("checkpoint-500/config.json", "checkpoint-900/config.json"),
        "checkpoint-500, checkpoint-900",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_model_is_said_to_be_what_it_is(kind: str, weights: Tensors, tmp_path: Path) -> None:
    names, expected = FOREIGN[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"base_model.model.gpt_neox.layers.0.lora_A.weight": torch.ones(2)}, tmp_path / name)
        else:
            (tmp_path / name).write_text("global_step5" if name == "latest" else "{}")
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "zero_pp_rank_3_mp_rank_00_model_states.pt", "__0_0.distcp", "fp32.pt"]
)
def test_so_is_one_of_its_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4 whatever")
    with pytest.raises(CheckpointError, match=f"{name}: is (an adapter|ZeRO stage 3|a torch.distributed|a universal)"):
        open_checkpoint(tmp_path / name)


def test_an_adapter_beside_its_model_is_not_passed_over(model: Path, weights: Tensors, tmp_path: Path) -> None:
    source = saved(tmp_path, model, weights)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: makes of this model another.*or move it away"):
        open_checkpoint(source)
    assert_read(source / "model.safetensors", weights)


def test_zero_3_beside_the_gathered_model_is_left_alone(model: Path, weights: Tensors, tmp_path: Path) -> None:
    source = trained(saved(tmp_path, model, weights), {}, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert_read(source, weights)


def test_an_adapter_under_another_name_is_told_by_its_tensors(tmp_path: Path) -> None:
    name = "base_model.model.gpt_neox.layers.0.attention.dense.lora_A.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is not a tensor of gpt_neox"):
        open_checkpoint(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("given", [".", "global_step10_universal"])
def test_a_universal_checkpoint_of_gpt_neox_is_told(given: str, tmp_path: Path) -> None:
    """ds_to_universal.py copies the mp_rank files, which hold no weights, and leaves the layer files behind."""
    source = toy(tmp_path)
    step = (source / "global_step10").rename(source / "global_step10_universal")
    for path in step.glob("layer_*"):
        path.unlink()
    (step / "zero" / "2.attention.dense.weight").mkdir(parents=True)
    (source / "latest").rename(source / "latest_universal")
    with pytest.raises(CheckpointError, match=r"is a universal checkpoint of DeepSpeed"):
        open_checkpoint(source / given)


def test_gpt_neox_without_its_layer_files_says_so(tmp_path: Path) -> None:
    source = toy(tmp_path)
    for path in (source / "global_step10").glob("layer_*"):
        path.unlink()
    for given in (source, source / "global_step10", source / "global_step10" / "mp_rank_00_model_states.pt"):
        with pytest.raises(CheckpointError, match=r"holds no weights \(`module` is empty\), and no layer_NN"):
            open_checkpoint(given)


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["lm_head", "DistributedDataParallel"])
def test_the_commands_take_deepspeeds_part(
    spelling: str, model: Path, weights: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained(tmp_path / "checkpoint-500", renamed(weights, SPELLINGS[spelling]))
    shutil.copy(model / "config.json", source)
    assert cli("inspect", source, "--check") == 0
    told = capsys.readouterr().out
    assert "DeepSpeed checkpoint" in told and re.search(r"weights +1\b", told) and "every checksum fits" in told
    assert cli("convert", source, tmp_path / "made", "--to", "hf", "--quiet") == 0
    assert cli("verify", source, tmp_path / "made", "--level", "weights", "--quiet") == 0
    assert load_file(tmp_path / "made" / "model.safetensors").keys() == weights.keys()

"""Hugging Face folders: read as transformers wrote them, written so that it loads them, bad folders named."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neoxconv.core.layout import Entry
from neoxconv.dtypes import BF16, F16, F32, DType
from neoxconv.errors import CheckpointError
from neoxconv.formats import hf, safetensors
from tests.fixtures import fixture
from tests.tensor_files import OFFICIAL, TORCH, assert_same, entry, write

INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
Tensors = Mapping[str, torch.Tensor]

PT = {"format": "pt"}  # as torch's files say


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it: config.json and model.safetensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("saved")
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(saved: Path) -> Tensors:
    return load_file(saved / "model.safetensors")


def configured(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def write_index(path: Path, places: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- reading ---------------------------------------------------------------------------------------------------------


def assert_indexed(folder: Path, expected: Tensors, pattern: str) -> None:
    index = hf.index(folder)
    assert (index.format, index.folder) == ("hf", folder)
    assert index.settings == json.loads((folder / "config.json").read_text())
    assert [source.storage.path for source in index.files] == sorted(folder.glob(pattern))
    assert all(re.fullmatch("[0-9a-f]{64}", source.checksum) for source in index.files)
    assert_same(index.ranks[0], expected)


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_real_folder_is_read(name: str) -> None:
    path = fixture(f"{name}/hf_official_converter/model.safetensors")
    assert_indexed(path.parent, load_file(path), "*.safetensors")


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_what_transformers_saves_is_read(size: str, saved: Path, weights: Tensors, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPTNeoXForCausalLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "20KB")
    assert_indexed(tmp_path, weights, "*.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_are_read(shards: int, zipped: bool, weights: Tensors, tmp_path: Path) -> None:
    configured(tmp_path)
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" if shards > 1 else "pytorch_model.bin"
             for i in range(shards)]  # fmt: skip
    places = {tensor: names[i % shards] for i, tensor in enumerate(weights)}
    for name in names:
        part = {tensor: weights[tensor] for tensor, place in places.items() if place == name}
        torch.save(part, tmp_path / name, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        write_index(tmp_path / BIN_INDEX, places)
    assert_indexed(tmp_path, weights, "*.bin")


def test_the_file_that_transformers_would_load_is_preferred(tmp_path: Path) -> None:
    configured(tmp_path)
    torch.save({"from": torch.tensor([4.0])}, tmp_path / "part.bin")
    save_file({"from": torch.tensor([2.0])}, tmp_path / "part.safetensors")
    write_index(tmp_path / BIN_INDEX, {"from": "part.bin"})
    torch.save({"from": torch.tensor([3.0])}, tmp_path / "pytorch_model.bin")
    write_index(tmp_path / INDEX, {"from": "part.safetensors"})
    save_file({"from": torch.tensor([1.0])}, tmp_path / "model.safetensors")
    for place, name in enumerate(["model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX], 1):
        assert hf.index(tmp_path).ranks[0]["from"].read(0, 1) == [place]
        (tmp_path / name).unlink()


# --- writing ---------------------------------------------------------------------------------------------------------


def entries(weights: Tensors, dtype: DType = F32) -> list[Entry]:
    return [entry(name, tensor.float().numpy(), dtype) for name, tensor in weights.items()]


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("size", [1 << 30, 10_000, 1])
def test_transformers_loads_what_we_write(
    size: int, dtype: DType, saved: Path, weights: Tensors, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(saved / "config.json", tmp_path)
    files = hf.layout(entries(weights, dtype), size, PT)
    for file in files:
        write(tmp_path, file)
    if len(files) > 1:
        (tmp_path / INDEX).write_bytes(hf.weight_index(files))
    model, keys = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(keys.values()), keys
    expected = {name: tensor.to(TORCH[dtype]) for name, tensor in weights.items()}
    model.save_pretrained(tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert_indexed(tmp_path, expected, "*.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_index_is_the_one_that_transformers_writes(saved: Path, weights: Tensors, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPTNeoXForCausalLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size="20KB")
    theirs = json.loads((tmp_path / INDEX).read_text())
    ours = json.loads(hf.weight_index(hf.layout(entries(weights), 20_000, PT)))
    assert ours["metadata"] == theirs["metadata"]
    assert list(ours) == list(theirs) and list(ours["weight_map"]) == list(theirs["weight_map"])


SIZES = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([F32, F16, BF16])), max_size=20)


@given(SIZES, st.integers(1, 200))
@settings(max_examples=200)
def test_shards_are_filled_in_order_and_no_further_than_allowed(sizes: list[tuple[int, DType]], limit: int) -> None:
    given_entries = [entry(str(i), np.zeros(size, np.float32), dtype) for i, (size, dtype) in enumerate(sizes)]
    files = hf.layout(given_entries, limit, PT)
    held = [sorted((slot.entry for slot in file.slots), key=lambda e: int(e.name)) for file in files]
    assert [e for shard in held for e in shard] == given_entries
    totals = [sum(e.nbytes for e in shard) for shard in held]
    assert all(total <= limit or len(shard) == 1 for total, shard in zip(totals, held, strict=True))
    assert all(total + after[0].nbytes > limit for total, after in zip(totals, held[1:], strict=False))
    count = len(files)
    expected = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [file.name for file in files] == (expected if count > 1 else ["model.safetensors"])
    assert all(b'{"__metadata__":{"format":"pt"}' in file.pieces[0][1] for file in files)


def test_the_generation_config_is_read_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "generation_config.json").write_bytes(hf.generation_config({"bos_token_id": 0, "eos_token_id": 7}))
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id) == (0, 7)


# --- bad folders -----------------------------------------------------------------------------------------------------


def folder_as_shard(folder: Path) -> None:
    (folder / "sub").mkdir()
    place("sub")(folder)


def place(name: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder / INDEX, {"a": name, "b": "s.safetensors"})


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def bin_of(value: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / "pytorch_model.bin")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


OUTSIDE = ("../x", "/etc/passwd", "..", ".", "", "a/b", "..\\x", "C:\\x", "x\0")
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (remove("config.json"), "has no config.json"),
    "config that is no JSON": (text("config.json", "{"), "config.json: the file is not JSON"),
    "config that is a list": (text("config.json", "[]"), "config.json: the file is a list"),
    "deep config": (text("config.json", "[" * 100_000), "config.json: the file is not JSON"),
    "no weights": (lambda folder: None, "has a config.json but no weights"),
    "weights that are no safetensors": (text("model.safetensors", "<html>"), "model.safetensors: is not a safetensors"),
    "bin that is no zip": (text("pytorch_model.bin", "<html>"), "pytorch_model.bin: is not a PyTorch checkpoint"),
    "bin of a list": (bin_of([torch.ones(1)]), "pytorch_model.bin: holds a list"),
    "bin with numbers as names": (bin_of({3: torch.ones(1)}), "pytorch_model.bin: 3 is not a named tensor"),
    "bin with more than tensors": (bin_of({"a": torch.ones(1), "step": 3}), "'step' is not a named tensor"),
    "index that is no JSON": (text(INDEX, "{"), f"{INDEX}: the file is not JSON"),
    "index without a map": (text(INDEX, "{}"), f"{INDEX}: has no weight_map"),
    "empty map": (text(INDEX, '{"weight_map": {}}'), f"{INDEX}: has no weight_map"),
    "tensor placed twice": (text(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), "'a' stands in it twice"),
    "place that is no name": (place(3), f"{INDEX}: has no weight_map of file names"),
    "missing shard": (place("gone.safetensors"), "lacks 'gone.safetensors'"),
    "overlong name": (place("é" * 200), "lacks 'éé"),
    "lone surrogate": (place("\ud800"), r"lacks '\ud800'"),
    "folder as shard": (folder_as_shard, "lacks 'sub'"),
    "absent tensor": (place("s.safetensors"), "s.safetensors: lacks a, which"),
    "stray tensor": (lambda folder: write_index(folder / INDEX, {"b": "s.safetensors"}), "s.safetensors: holds c"),
    **{f"outside: {name!r}": (place(name), f"names the file {name!r}, which is not in its folder") for name in OUTSIDE},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_named_in_a_short_message(case: str, tmp_path: Path) -> None:
    damage, expected = BAD[case]
    configured(tmp_path)
    save_file({"b": torch.ones(2), "c": torch.ones(1)}, tmp_path / "s.safetensors")
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        hf.index(tmp_path)
    message = str(caught.value)
    assert expected in message and len(message) < 600 and message.encode()


def test_missing_shards_are_named_at_once_up_to_ten(tmp_path: Path) -> None:
    configured(tmp_path)
    write_index(tmp_path / INDEX, {f"t{i}": f"{i:02d}.safetensors" for i in range(12)})
    with pytest.raises(CheckpointError) as caught:
        hf.index(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and all(f"'{i:02d}.safetensors'" in lines[i] for i in range(10))
    assert lines[-1] == "... and 2 more"


# --- shards without an index, and an index that is wrong about what nobody needs --------------------------------------


def shards(folder: Path, *names: str) -> Path:
    """Files of these names, each with a tensor of its own."""
    configured(folder)
    for number, name in enumerate(names, 1):
        tensors = {f"t{number}": torch.tensor([float(number)])}
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)
    return folder


@pytest.mark.parametrize("form", ["model-{}-of-00003.safetensors", "pytorch_model-{}-of-00003.bin"])
def test_shards_whose_names_make_a_series_need_no_index(form: str, tmp_path: Path) -> None:
    names = [form.format(f"{number:05d}") for number in (1, 2, 3)]
    index = hf.index(shards(tmp_path, *names))
    assert [file.storage.path.name for file in index.files] == names
    assert {name: tensor.read(0, 1).tolist() for name, tensor in index.ranks[0].items()} == {
        "t1": [1.0],
        "t2": [2.0],
        "t3": [3.0],
    }


ONE, TWO, THREE = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
SERIES: dict[str, tuple[tuple[str, ...], str]] = {
    "the last is missing": ((ONE, TWO), f"{THREE}: is missing, and so is the index of the shards"),
    "the first is missing": ((TWO, THREE), f"{ONE}: is missing"),
    "two series": (
        (ONE, "model-00002-of-00002.safetensors"),
        "holds model-*-of-00002.safetensors and model-*-of-00003",
    ),
    "a stray": ((ONE, TWO, THREE, "model-00004-of-00003.safetensors"), "model-00004-of-00003.safetensors: is no shard"),
    "the zeroth": (
        (ONE, TWO, THREE, "model-00000-of-00003.safetensors"),
        "model-00000-of-00003.safetensors: is no shard",
    ),
    "of none": (("model-00001-of-00000.safetensors",), "model-00001-of-00000.safetensors: is no shard of 0"),
    "far too many": (("model-00001-of-99999.safetensors",), "holds 1 of 99999 shards; download the others"),
}


@pytest.mark.parametrize("case", SERIES)
def test_shards_that_make_no_series_are_named(case: str, tmp_path: Path) -> None:
    names, expected = SERIES[case]
    with pytest.raises(CheckpointError) as caught:
        hf.index(shards(tmp_path, *names))
    assert expected in str(caught.value)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    shards(tmp_path, ONE, TWO, THREE)
    shutil.copy(tmp_path / ONE, tmp_path / THREE)
    with pytest.raises(CheckpointError, match=rf"{THREE}: holds t1, which {ONE} holds too"):
        hf.index(tmp_path)
    assert list(hf.index(tmp_path, ("t1",)).ranks[0]) == ["t1", "t2"]


def test_safetensors_shards_are_preferred_but_a_single_file_or_an_index_is_surer(tmp_path: Path) -> None:
    shards(tmp_path, ONE, TWO, THREE, "pytorch_model-00001-of-00001.bin")
    assert list(hf.index(tmp_path).ranks[0]) == ["t1", "t2", "t3"]
    write_index(tmp_path / INDEX, {"t2": TWO})
    assert list(hf.index(tmp_path).ranks[0]) == ["t2"]
    (tmp_path / INDEX).unlink()
    torch.save({"whole": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(hf.index(tmp_path).ranks[0]) == ["whole"]


@pytest.mark.parametrize("names", [["t1", "t2"], ["t1", "t2", "t3", "x.inv_freq"], ["t1", "t2", "t3", "gone.inv_freq"]])
def test_an_index_may_lack_or_name_too_many_of_what_is_dropped(names: list[str], tmp_path: Path) -> None:
    """t3 is one of the dropped too; `gone` lies in a file that is not there."""
    shards(tmp_path, ONE, TWO, THREE)
    save_file({"t2": torch.ones(1), "t3": torch.ones(1)}, tmp_path / TWO)
    files = {"t1": ONE, "t2": TWO, "t3": TWO, "x.inv_freq": ONE, "gone.inv_freq": THREE}
    (tmp_path / THREE).unlink()
    write_index(tmp_path / INDEX, {name: files[name] for name in names})
    index = hf.index(tmp_path, ("t3", "*.inv_freq"))
    assert sorted(index.ranks[0]) == ["t1", "t2", "t3"]
    with pytest.raises(CheckpointError, match=r"lacks|holds t3"):
        hf.index(tmp_path)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["t1", "t2", "weight"], "lacks weight, which"),
        (["t1"], "lacks|holds t2, which"),
        (["t1", "t2", "t9"], "lacks t9"),
    ],
)
def test_an_index_that_is_wrong_about_weights_is_refused(names: list[str], problem: str, tmp_path: Path) -> None:
    shards(tmp_path, ONE)
    save_file({"t1": torch.ones(1), "t2": torch.ones(1)}, tmp_path / ONE)
    write_index(tmp_path / INDEX, dict.fromkeys(names, ONE))
    with pytest.raises(CheckpointError, match=problem):
        hf.index(tmp_path, ("*.inv_freq",))


# --- a single file as a source ---------------------------------------------------------------------------------------

INSIDE, BESIDE = {"model_type": "gpt_neox", "here": "inside"}, {"model_type": "gpt_neox", "here": "beside"}


@pytest.mark.parametrize(
    ("metadata", "beside", "expected"),
    [({"config": json.dumps(INSIDE)}, BESIDE, BESIDE), ({"config": json.dumps(INSIDE)}, None, INSIDE), ({}, None, {})],
    ids=["beside comes first", "inside", "none"],
)
def test_settings_come_from_beside_the_file_or_from_within(
    metadata: dict[str, str], beside: dict[str, str] | None, expected: dict[str, str], tmp_path: Path
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    index = safetensors.index(tmp_path / "x.safetensors")
    assert (index.format, index.folder, index.settings) == ("safetensors", tmp_path, expected)
    assert [source.storage.path for source in index.files] == [tmp_path / "x.safetensors"]
    assert list(index.ranks[0]) == ["a"]


@pytest.mark.parametrize("config", ["{", "[]", "[" * 100_000])
def test_a_damaged_configuration_is_named(config: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path, {"config": config})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the config in its metadata is"):
        safetensors.index(path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json: the file is"):
        safetensors.index(path)

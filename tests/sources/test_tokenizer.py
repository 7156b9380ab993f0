"""Where a tokenizer is looked for: near the checkpoint, or where the YAML points; never a guess between two."""

from __future__ import annotations

from pathlib import Path

import pytest

from neoxconv.errors import CheckpointError
from neoxconv.sources.tokenizer import find
from tests.fixtures import fixture


@pytest.mark.parametrize("tags", ["checkpoints", "checkpoints/global_step10"])
def test_a_run_of_gpt_neox_has_its_tokenizer_beside_the_checkpoints(tags: str) -> None:
    run = fixture("neox_2022_tp2_pp4")
    assert find(None, run / tags, {}, []) == run.absolute() / "tiny_tokenizer.json"


def place(path: Path, data: bytes = b"{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    """The folder of shards in a checkpoint that holds no tokenizer: run/saved/global_step1."""
    place(tmp_path / "run" / "saved" / "latest", b"global_step1")
    place(tmp_path / "run" / "saved" / "global_step1" / "configs" / "run.yml")
    return tmp_path / "run" / "saved" / "global_step1"


@pytest.mark.parametrize("where", ["", "..", "../.."])
@pytest.mark.parametrize("name", ["tokenizer.json", "20B_tokenizer.json", "my_tokenizer_v2.json"])
def test_a_tokenizer_is_found_in_and_near_the_checkpoint(tag: Path, where: str, name: str) -> None:
    expected = place((tag / where).resolve() / name)
    place(expected.with_name("tokenizer_config.json"))
    assert find(None, tag, {}, []) == expected


def test_the_nearest_tokenizer_wins_and_the_search_ends_above_the_checkpoint(tag: Path) -> None:
    place(tag.parents[2] / "tokenizer.json", b"too far")
    assert find(None, tag, {}, []) is None
    place(tag.parents[1] / "tokenizer.json", b"far")
    near = place(tag.parent / "tokenizer.json", b"near")
    assert find(None, tag, {}, []) == near


@pytest.mark.parametrize("key", ["vocab-file", "vocab_file"])
def test_the_yaml_settles_which_of_several_files_is_meant(tag: Path, key: str) -> None:
    place(tag / "a_tokenizer.json", b"a")
    b = place(tag / "b_tokenizer.json", b"b")
    assert find(None, tag, {key: "./elsewhere/b_tokenizer.json"}, [tag / "configs"]) == b


def test_the_yaml_points_from_its_own_folder_and_never_from_the_working_folder(
    tag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = {"vocab-file": "data/words.json", "tokenizer-type": "HFTokenizer"}
    place(tmp_path / "data" / "words.json", b"working folder")
    assert find(None, tag, configs, [tag / "configs"]) is None
    beside = place(tag / "configs" / "data" / "words.json", b"beside the YAML")
    assert find(None, tag, configs, [tag / "configs"]) == beside
    assert find(None, tag, {**configs, "tokenizer-type": "TiktokenTokenizer"}, [tag / "configs"]) is None


def test_two_candidates_must_agree(tag: Path) -> None:
    one, two = place(tag / "a_tokenizer.json", b"same"), place(tag / "b_tokenizer.json", b"same")
    assert find(None, tag, {}, []) == one
    place(two, b"other")
    with pytest.raises(CheckpointError, match=r"a_tokenizer.json and .*b_tokenizer.json differ.*--tokenizer"):
        find(None, tag, {}, [])
    assert find(two, tag, {}, []) == two


def test_the_yaml_and_the_folder_must_agree(tag: Path) -> None:
    near = place(tag / "tokenizer.json", b"one")
    pointed = place(tag / "configs" / "words.json", b"one")
    assert find(None, tag, {"vocab_file": "words.json"}, [tag / "configs"]) == near
    place(pointed, b"two")
    with pytest.raises(CheckpointError, match="differ"):
        find(None, tag, {"vocab_file": "words.json"}, [tag / "configs"])


def test_an_explicit_tokenizer_is_a_file_or_a_folder_with_one(tag: Path, tmp_path: Path) -> None:
    place(tag / "tokenizer.json")
    chosen = place(tmp_path / "mine" / "tokenizer.json")
    assert find(chosen, tag, {}, []) == find(chosen.parent, tag, {}, []) == chosen
    for missing in (tmp_path / "nowhere", tag / "configs"):
        with pytest.raises(CheckpointError, match="--tokenizer"):
            find(missing, tag, {}, [])

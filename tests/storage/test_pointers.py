"""A pointer of git-lfs in place of a file, whatever the file should hold: told by all who read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neoxconv.errors import CheckpointError
from neoxconv.formats import hf, imatrix, safetensors
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.neox.yaml_settings import read_yaml
from neoxconv.formats.pt import read_pt
from neoxconv.sources.checkpoint import open_checkpoint
from neoxconv.storage import open_storage
from tests.toy import toy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5e" * 32 + b"\nsize 4000000000\n"
READERS: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": safetensors.index,
    "model.gguf": gguf.index,
    "pytorch_model.bin": lambda path: read_pt(open_storage(path)),
    "config.json": safetensors.read_json,
    "model.yml": read_yaml,
    "matrix.dat": imatrix.read,
    "x": open_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("size", [24, 63, len(POINTER)])
def test_a_pointer_is_told_whatever_should_be_there(name: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(POINTER[:size])
    with pytest.raises(CheckpointError, match=f"{name}: is a git-lfs pointer.* `git lfs pull`"):
        READERS[name](path)


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(POINTER)
    if "-of-" in name:
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(CheckpointError, match=f"{name}: is a git-lfs pointer"):
        hf.index(tmp_path)


@pytest.mark.parametrize("name", ["layer_00-model_01-model_states.pt", "model.yml", "latest"])
def test_a_pointer_among_gpt_neox_files_is_named(name: str, tmp_path: Path) -> None:
    source = toy(tmp_path)
    (path,) = source.rglob(name)
    path.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: is a git-lfs pointer"):
        open_checkpoint(source)


@pytest.mark.parametrize("data", [b"", b"v", b"version ", b"version https://git-annex", POINTER[:22], b" " + POINTER])
def test_what_only_resembles_a_pointer_is_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert open_storage(tmp_path / "x").text() == data


def test_a_large_file_is_no_pointer(tmp_path: Path) -> None:
    data = POINTER.ljust(1024)
    (tmp_path / "x").write_bytes(data)
    assert open_storage(tmp_path / "x").text() == data

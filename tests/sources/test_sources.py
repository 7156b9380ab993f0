"""The rows of SOURCES: how each format is told from the others, by first bytes, by names and by folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.arch import ARCHITECTURES
from neoxconv.errors import CheckpointError
from neoxconv.sources import SOURCES
from neoxconv.targets import TARGETS
from tests.toy import toy


def converted(source: Path, target: Path, format: str) -> Path:
    run(make_plan(open_checkpoint(source), Recipe(format)), target)
    return target


def test_every_format_has_a_row_and_every_architecture_its_settings() -> None:
    assert list(SOURCES) == ["neox", "hf", "deepspeed", "ctranslate2", "gguf", "safetensors"]
    namings = {source.naming for source in SOURCES.values()}
    for architecture in ARCHITECTURES:  # one has no settings in a format that lacks its family
        words = {"unified": architecture.to_hf, "neox": architecture.to_neox, "gguf": architecture.to_gguf}
        assert set(architecture.config_of) == {naming for naming in namings if words[naming]}
        assert bool(architecture.gguf_name) == bool(architecture.to_gguf)


@pytest.mark.parametrize("format", TARGETS)
def test_every_target_is_told_as_the_source_that_it_is(format: str, tmp_path: Path) -> None:
    target = converted(toy(tmp_path), tmp_path / f"x.{format}", format)
    expected = "neox" if format == "slim" else format if format in SOURCES else "hf"
    assert open_checkpoint(target).index.format == expected
    if TARGETS[format].single:  # the only one of its folder
        folder = tmp_path / "alone"
        folder.mkdir()
        target.rename(folder / f"x.{format}")
        assert open_checkpoint(folder).index.format == expected


def test_first_bytes_are_surer_than_a_name(tmp_path: Path) -> None:
    made, folder = converted(toy(tmp_path), tmp_path / "x.gguf", "gguf"), tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("model.safetensors", "layer_00-model_00-model_states.pt"):
        (folder / name).write_bytes(made.read_bytes())
        assert open_checkpoint(folder / name).index.format == "gguf"


def test_a_file_beside_no_weights_is_no_model(tmp_path: Path) -> None:
    """Its name is gpt-neox's, but neither layer files nor mp_rank files lie beside it."""
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="mp_rank_MM_model_states"):
        open_checkpoint(file)


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_of_several_files_none_is_guessed(suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.{suffix}").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"holds 2 \.{suffix} files; give the one you mean"):
        open_checkpoint(tmp_path)

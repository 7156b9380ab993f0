"""The slim target beyond the fixtures: bookkeeping by rank, other degrees, types that are only copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.errors import PlanError
from tests.toy import toy


def slim(source: Path, target: Path, tp: int | None = None, config: tuple[Path, ...] = ()) -> Path:
    return run(make_plan(open_checkpoint(source, config=config), Recipe("slim", tp=tp)), target)


def edit_layer(source: Path, number: int, change: dict[str, torch.Tensor]) -> None:
    """Other tensors in every rank's file of a layer."""
    for file in source.glob(f"*/layer_{number:02d}-*"):
        torch.save(torch.load(file, weights_only=True) | change, file)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_missing_mp_rank_file_is_named(lost: int, tmp_path: Path) -> None:
    source = toy(tmp_path, pp=2)
    next(source.glob(f"*/mp_rank_0{lost}*")).unlink()
    with pytest.raises(PlanError, match="mp_rank files"):
        slim(source, tmp_path / "slim")


def test_mp_rank_files_are_told_by_their_number(tmp_path: Path) -> None:
    source = toy(tmp_path)
    for number in (0, 1):
        old = next(source.glob(f"*/mp_rank_0{number}*"))
        state = torch.load(old, weights_only=False)
        torch.save({**state, "global_steps": 100 + number}, old.with_name(f"mp_rank_{number:03d}_model_states.pt"))
        old.unlink()
    made = slim(source, tmp_path / "slim")
    steps = [torch.load(file, weights_only=True)["global_steps"] for file in sorted(made.glob("*/mp_rank*"))]
    assert steps == [100, 101]


@pytest.mark.parametrize(("dtype", "degree"), [("F16", 4), ("F32", 1), ("BF16", 4)])
def test_another_degree_verifies(dtype: str, degree: int, tmp_path: Path) -> None:
    source = toy(tmp_path, dtype=dtype)
    if dtype == "F32":
        with pytest.raises(PlanError, match="does not divide"):
            slim(source, tmp_path / "three", tp=3)
    made = slim(source, tmp_path / "slim", tp=degree)
    report = verify_weights(open_checkpoint(source), open_checkpoint(made))
    assert report.passed, report.findings[:3]


def test_minus_zero_survives_a_split(tmp_path: Path) -> None:
    source = toy(tmp_path, tp=1)
    edit_layer(source, 2, {"attention.dense.bias": torch.full((64,), -0.0, dtype=torch.float16)})
    made = slim(source, tmp_path / "slim", tp=2)
    assert verify_weights(open_checkpoint(source), open_checkpoint(made)).passed


def test_equal_norms_of_three_ranks_stay_as_they_are(tmp_path: Path) -> None:
    source = toy(tmp_path, tp=1, dtype="F32", heads=6, hidden=96, rows=384)
    made = slim(source, tmp_path / "slim", tp=3)
    assert verify_weights(open_checkpoint(source), open_checkpoint(made)).passed


def test_float64_is_written_as_float32_where_it_is_split_anew(tmp_path: Path) -> None:
    source = toy(tmp_path)
    for file in source.glob("*/layer_*"):
        torch.save({k: v.double() for k, v in torch.load(file, weights_only=True).items()}, file)
    before, after = open_checkpoint(source), open_checkpoint(slim(source, tmp_path / "slim", tp=4))
    for name, tensor in before.tensors.items():
        ours = after.tensors[name]
        assert np.allclose(tensor.floats(0, tensor.rows), ours.floats(0, ours.rows), rtol=1e-6), name


def test_a_changed_buffer_is_found(tmp_path: Path) -> None:
    source = toy(tmp_path)
    made = slim(source, tmp_path / "slim")
    assert verify_weights(open_checkpoint(source), open_checkpoint(made)).passed
    edit_layer(made, 2, {"attention.rotary_emb.inv_freq": torch.full((2,), 99.0, dtype=torch.float16)})
    found = verify_weights(open_checkpoint(source), open_checkpoint(made)).findings
    assert {finding.where.split(" of ")[0] for finding in found} == {"2.attention.rotary_emb.inv_freq"}


def test_two_configs_of_one_name_are_refused(tmp_path: Path) -> None:
    source = toy(tmp_path)
    [config] = source.glob("*/configs/*.yml")
    (tmp_path / "other").mkdir()
    shutil.copy(config, tmp_path / "other" / config.name)
    with pytest.raises(PlanError, match="two have one name"):
        slim(source, tmp_path / "slim", config=(config, tmp_path / "other" / config.name))

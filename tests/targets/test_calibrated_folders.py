"""bnb and float8 folders whose codes were chosen together: as bitsandbytes reads them, proved, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.core.layout import FACTORS
from neoxconv.formats.calibration.read import moments_in
from neoxconv.quant import floats
from tests.helpers import cli, digests
from tests.oracles import causal_logits, program
from tests.scaled import (
    ALL,
    BNB,
    CONFIG,
    FILE,
    L0,
    SCALE,
    Change,
    Tensors,
    assert_bitsandbytes_reads,
    edited,
    planted,
    put,
    small,
    weights,
)
from tests.toy import toy

TOKENS = (np.arange(6 * 64) * 7 % 256).reshape(6, 64)
CHOSEN = {name: recipe for name, recipe in ALL.items() if not name.endswith("none")}
every = pytest.mark.parametrize("name", CHOSEN)


def calibration(source: Path) -> Path:
    """A calibration of the source, beside it."""
    np.save(source.parent / "tokens.npy", TOKENS)
    made = source.parent / "cal.gguf"
    words = ("--tokens", source.parent / "tokens.npy", "--covariance", "--quiet")
    assert cli("calibrate", source, "-o", made, *words) == 0
    return made


def chosen(source: Path, target: Path, name: str, by: Path | None, **options: Any) -> Path:
    """The source in a type, its codes chosen together."""
    recipe = replace(CHOSEN[name], calibration=by)
    return run(make_plan(open_checkpoint(source), recipe), target, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose biggest matrices run over the ends of bands, in float32."""
    return small(tmp_path_factory.mktemp("source"), dtype="F32")


@pytest.fixture(scope="module")
def by(source: Path) -> Path:
    return calibration(source)


@pytest.fixture(scope="module")
def targets(source: Path, by: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in every type."""
    folder = tmp_path_factory.mktemp("targets")
    return {name: chosen(source, folder / name, name, by) for name in CHOSEN}


def faults(source: Path, target: Path, by: Path | None) -> set[str]:
    """The tensors that the weights level finds something in."""
    report = verify_weights(open_checkpoint(source), open_checkpoint(target), calibration=by)
    return {finding.where for finding in report.findings}


def costs(source: Path, target: Path, by: Path) -> float:
    """The sum of tr(E H E^T) over the matrices of the layers."""
    checkpoint, found, total = open_checkpoint(source), moments_in(by), 0.0
    names = {weight.unified: weight.gguf for _, weight in checkpoint.architecture.names(checkpoint.config)}
    for name, values in weights(target).items():
        tensor = checkpoint.tensors[name]
        errors = (floats(tensor.read(0, tensor.rows), tensor.dtype) - values).astype(np.float64)
        total += float(((errors @ found[names[name]].read()) * errors).sum())
    return total


# --- what is made ----------------------------------------------------------------------------------------------------


@every
def test_it_costs_less_than_half_at_the_same_bytes(
    name: str, source: Path, by: Path, targets: dict[str, Path], tmp_path: Path
) -> None:
    alone = chosen(source, tmp_path / "alone", name, None)
    ours, theirs = load_file(targets[name] / FILE), load_file(alone / FILE)
    assert {key: (t.dtype, t.shape) for key, t in ours.items() if "state" not in key} == {
        key: (t.dtype, t.shape) for key, t in theirs.items() if "state" not in key
    }
    assert costs(source, targets[name], by) < 0.5 * costs(source, alone, by)
    settings = json.loads((targets[name] / CONFIG).read_text())
    assert settings.pop("neoxconv_calibration") and settings == json.loads((alone / CONFIG).read_text())


@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes_reads_the_same_numbers(name: str, targets: dict[str, Path]) -> None:
    assert_bitsandbytes_reads(name, targets[name], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NF4 double", "INT8"])
def test_transformers_runs_it(name: str, targets: dict[str, Path], tmp_path: Path) -> None:
    program("bitsandbytes")
    wide = run(make_plan(open_checkpoint(targets[name]), Recipe("hf")), tmp_path / "wide")
    assert "neoxconv_calibration" not in json.loads((wide / CONFIG).read_text())
    tokens = TOKENS[:2, :24]
    far = np.abs(causal_logits(targets[name], tokens, "float32") - causal_logits(wide, tokens, "float32")).max()
    assert far <= 0.01  # as of codes that are chosen alone (test_linear.py)


@pytest.mark.parametrize("name", ["NF4 double", "INT8", "E4M3 tensor"])
def test_jobs_and_slabs_never_change_a_byte(
    name: str, source: Path, by: Path, targets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digests(targets[name])
    monkeypatch.setattr("neoxconv.engine.memory.SLAB", 1000)
    monkeypatch.setattr("neoxconv.engine.encode.FEEDBACK_ROWS", 5)
    assert digests(chosen(source, tmp_path / "small", name, by, jobs=4)) == whole


@pytest.mark.parametrize("name", ["NF4", "FP4 double"])
def test_blocks_may_run_over_the_ends_of_rows(name: str, tmp_path: Path) -> None:
    source = small(tmp_path, hidden=40, rotary_pct=1.0, dtype="F32")
    made = calibration(source)
    target = chosen(source, tmp_path / "x", name, made)
    assert not faults(source, target, made) and not faults(source, target, None)
    assert costs(source, target, made) < 0.5 * costs(source, chosen(source, tmp_path / "y", name, None), made)


# --- the proof -------------------------------------------------------------------------------------------------------


@every
def test_right_files_pass_with_the_calibration_and_without(
    name: str, source: Path, by: Path, targets: dict[str, Path]
) -> None:
    assert not faults(source, targets[name], by)
    assert not faults(source, targets[name], None)


def test_rows_of_very_different_sizes_are_no_fault(tmp_path: Path) -> None:
    """A block much smaller than the mean may get a scale below 0, as in bitsandbytes; no code makes up for it."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((128, 64)) * 0.02 * np.exp(2 * random.standard_normal((128, 1)))
    source = planted(small(tmp_path, dtype="F32"), "mlp.dense_h_to_4h.weight", rows.reshape(-1).astype(np.float32))
    made = calibration(source)
    for name in CHOSEN:
        target = chosen(source, tmp_path / name, name, made)
        assert not faults(source, target, made) and not faults(source, target, None), name


def moved(tensors: Tensors) -> None:
    """One code becomes another."""
    codes = "weight_packed" if L0 + "weight_packed" in tensors else "weight"
    tensors[L0 + codes].view(torch.uint8).view(-1)[300] ^= 1


def exchanged(tensors: Tensors) -> None:
    """Two rows change their places, with their scales."""
    for part in (name for name in tensors if name.startswith(L0 + "weight") or name == L0 + "SCB"):
        rows = tensors[part].view(64, -1) if tensors[part].numel() % 64 == 0 and tensors[part].numel() > 16 else None
        if rows is not None:
            rows[[3, 7]] = rows[[7, 3]].clone()


@every
def test_planted_faults_are_found(name: str, source: Path, by: Path, targets: dict[str, Path], tmp_path: Path) -> None:
    doubled: Change = put(SCALE[name], lambda t: t * 2)
    for number, (change, alone) in enumerate([(moved, False), (doubled, True), (exchanged, True)]):
        if change is exchanged and "double" in name:
            continue  # scales of 8 bits go with those beside them
        bad = edited(targets[name], tmp_path / str(number), change)
        assert faults(source, bad, by) == {L0 + "weight"}, number
        assert faults(source, bad, None) == ({L0 + "weight"} if alone else set()), number


def test_the_command_line_proves_it(
    source: Path, by: Path, targets: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    assert cli("verify", source, targets["NF4"], "--calibration", by) == 0
    bad = edited(targets["NF4"], tmp_path / "bad", moved)
    assert cli("verify", source, bad, "--calibration", by) == 3
    assert "of 4096 weights are not the source's as NF4" in capsys.readouterr().out
    alone = chosen(source, tmp_path / "alone", "NF4", None)
    assert cli("verify", source, alone, "--calibration", by) == 1
    assert "another calibration" in capsys.readouterr().err


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_knows_the_calibration_and_counts_its_factors(source: Path, by: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    plans = [make_plan(checkpoint, Recipe("bnb", type="NF4", calibration=path)) for path in (None, by)]
    assert plans[0].fingerprint != plans[1].fingerprint and plans[0].total < plans[1].total < plans[0].total + 200
    assert plans[0].kept < FACTORS * 256**2 < plans[1].kept
    assert any(note.startswith("codes chosen together in 8 matrices") for note in plans[1].notes)


@pytest.mark.parametrize(("words", "code", "message"), [
    (("--to", "bnb", "--type", "nf4", "--bits", "4"), 2, "--bits is for gguf, not for bnb"),
    (("--to", "float8", "--size", "1MB"), 2, "--size is for gguf, not for float8"),
    (("--to", "float8", "--scale", "none"), 1, "--calibration is for float8 with scales"),
    (("--to", "hf"), 2, "mlx, ctranslate2, not for hf"),
])  # fmt: skip
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], code: int, message: str, source: Path, by: Path, tmp_path: Path, capsys: Any
) -> None:
    assert cli("convert", source, tmp_path / "x", *words, "--calibration", by) == code
    assert message in capsys.readouterr().err


def test_another_models_calibration_is_refused(by: Path, tmp_path: Path, capsys: Any) -> None:
    for other in (toy(tmp_path / "wide", hidden=128), toy(tmp_path / "deep", layers=3)):
        assert cli("convert", other, tmp_path / "x", "--to", "bnb", "--calibration", by) == 1
        assert ("another model's" if "wide" in str(other) else "calibrate this model again") in capsys.readouterr().err

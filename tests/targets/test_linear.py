"""The bnb and float8 targets: equal to what bitsandbytes and transformers make, read back, verified, resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes
from neoxconv.cli.main import main
from tests.fixtures import real
from tests.helpers import digests
from tests.machines import needs_avx2
from tests.oracles import causal_logits, program
from tests.scaled import (
    ALL,
    BNB,
    CODES,
    CONFIG,
    FILE,
    L0,
    L1,
    SCALE,
    Change,
    Tensors,
    assert_bitsandbytes_reads,
    assert_same,
    compared,
    edited,
    every,
    made,
    planted,
    put,
    small,
    weights,
    with_state,
)

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several, torch adds up in another order, and bitsandbytes' double quantization depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def targets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in every type."""
    folder = tmp_path_factory.mktemp("targets")
    return {name: made(source, folder / name, recipe) for name, recipe in ALL.items()}


# --- bitsandbytes and transformers -----------------------------------------------------------------------------------

SOURCES: dict[str, dict[str, Any]] = {
    "usual": {},
    "blocks across rows, bf16": {"hidden": 56, "dtype": "BF16", "rotary_pct": 1.0},
    "many groups of scales": {"hidden": 80, "rotary_pct": 1.0},
    # attention.dense has 7 blocks: torch adds less than 8 numbers up in another order
    "last block cut short, f32": {"hidden": 20, "heads": 2, "dtype": "F32"},
}


def transformers_saved(hf: Path, recipe: Recipe, folder: Path) -> Path:
    """What transformers saves when it has quantized a Hugging Face folder itself."""
    program("bitsandbytes")
    transformers, kind, double = program("transformers"), str(recipe.type).lower(), recipe.double_quant
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    asked = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(hf, quantization_config=asked, dtype="auto", device_map="cpu").save_pretrained(folder)
    return folder


def assert_as_transformers(source: Path, folder: Path, name: str, norms: str = "mean") -> Path:
    if "double" in name:
        needs_avx2()
    hf = made(source, folder / f"{name} hf", Recipe("hf"), norms)
    ours, theirs = made(source, folder / name, BNB[name], norms), transformers_saved(hf, BNB[name], folder / "saved")
    assert_same(load_file(ours / FILE), load_file(theirs / FILE))
    asked, told = (json.loads((f / CONFIG).read_text())["quantization_config"] for f in (ours, theirs))
    assert {key: value for key, value in asked.items() if "compute" not in key}.items() <= told.items()
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("name", BNB)
@pytest.mark.parametrize("changes", SOURCES)
def test_every_tensor_is_the_one_that_transformers_saves(changes: str, name: str, tmp_path: Path) -> None:
    source = small(tmp_path, **SOURCES[changes])
    planted(source, "mlp.dense_h_to_4h.weight", [0.0] * 160 + [-3.0, 1e-7])  # blocks of zeros, an outlier
    assert_as_transformers(planted(source, "attention.dense.weight", [0.0] * (56 * 28)), tmp_path, name)


def most_apart(name: str) -> float:
    """How far logits of about 0.15 may be from those of the weights that are read back, by what multiplies them.

    LLM.int8 quantizes the inputs too. On a processor with AVX512-BF16 bitsandbytes multiplies 4-bit weights in
    bfloat16 (1.1e-3 measured). What its codes stand for is compared bit for bit below.
    """
    if name == "INT8":
        return 0.01
    return 0.005 if name in BNB else 1e-5


@pytest.mark.slow
@every
def test_transformers_runs_the_weights_that_are_read_back(name: str, tmp_path: Path) -> None:
    program("bitsandbytes" if name in BNB else "compressed_tensors")
    target = made(small(tmp_path, dtype="F32"), tmp_path / "x", ALL[name])
    wide = made(target, tmp_path / "wide", Recipe("hf"))
    far = np.abs(causal_logits(target, TOKENS, "float32") - causal_logits(wide, TOKENS, "float32")).max()
    assert far <= most_apart(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT8", "NF4 double"])
def test_a_trained_model_with_folded_norms_keeps_its_predictions(name: str, tmp_path: Path) -> None:
    model = real("trained_tp2_pp4")
    target = assert_as_transformers(model / "checkpoints", tmp_path, name, "fold")
    assert compared(model / "checkpoints", target, "fold").passed
    ours = torch.from_numpy(causal_logits(target, np.load(model / "reference" / "tokens.npy")[:2, :64], "float16"))
    before = torch.from_numpy(np.load(model / "reference" / "logits_fp32_replicas_as_is_first2x64.npy"))
    kl = (before.softmax(-1) * (before.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    assert 0 < kl < (0.001 if name == "INT8" else 0.05)


@pytest.mark.parametrize("name", ["INT8", "NF4 double", "E4M3 channel", "E5M2 none"])
def test_a_head_that_is_the_embedding_is_left_out(name: str, tmp_path: Path) -> None:
    source = small(tmp_path, dtype="F32")
    [yaml] = source.glob("*/configs/*.yml")
    yaml.write_text(yaml.read_text().replace('"no-weight-tying": true', '"no-weight-tying": false'))
    for file in source.glob("*/layer_06-*"):
        file.unlink()
    target = assert_as_transformers(source, tmp_path, name) if name in BNB else made(source, tmp_path / "x", ALL[name])
    assert "embed_out.weight" not in load_file(target / FILE) and compared(source, target).passed
    program("bitsandbytes" if name in BNB else "compressed_tensors")
    wide = causal_logits(made(target, tmp_path / "wide", Recipe("hf")), TOKENS, "float32")
    assert np.abs(causal_logits(target, TOKENS, "float32") - wide).max() <= most_apart(name)


# --- reading back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BNB)
def test_what_is_read_back_is_what_bitsandbytes_makes_of_it(name: str, targets: dict[str, Path]) -> None:
    assert_bitsandbytes_reads(name, targets[name], torch.float16)


@every
def test_it_becomes_every_other_format(name: str, targets: dict[str, Path], tmp_path: Path) -> None:
    read = weights(targets[name])
    for recipe in (Recipe("hf"), Recipe("safetensors"), Recipe("gguf", type="F16")):
        plan = make_plan(open_checkpoint(targets[name]), recipe)
        assert any(note.startswith("the source is quantized (") for note in plan.notes)
        again = open_checkpoint(run(plan, tmp_path / f"x.{recipe.format}"))
        for weight, values in read.items():
            tensor = again.tensors[weight]
            assert np.array_equal(tensor.floats(0, tensor.rows), values.astype(np.float16).astype(np.float32)), weight


@pytest.mark.parametrize("name", ["NF4", "INT8"])
def test_quantized_again_in_its_type_it_stays_what_it_is(name: str, targets: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(targets[name]), ALL[name])
    assert any("quantized a second time" in note for note in plan.notes)
    assert digests(run(plan, tmp_path / "again"))[FILE] == digests(targets[name])[FILE]


@pytest.mark.parametrize("file", [FILE, "other.safetensors"])
def test_one_file_beside_its_configuration_is_read(file: str, targets: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(targets["NF4"] / FILE, tmp_path / file)
    shutil.copy(targets["NF4"] / CONFIG, tmp_path)
    found, whole = weights(tmp_path / file), weights(targets["NF4"])
    assert len(found) == 8 and all(np.array_equal(found[name], whole[name]) for name in whole)


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["mean", "fold"])
@every
def test_every_type_passes_both_levels(name: str, norms: str, source: Path, tmp_path: Path) -> None:
    target = made(source, tmp_path / "x", ALL[name], norms)
    report = compared(source, target, norms)
    assert verify_bytes(target).passed and report.passed and 0 < report.relative < 0.2


def flip(part: str, bit: int) -> Change:
    return lambda tensors: tensors[L0 + part].view(torch.uint8).view(-1)[5:6].bitwise_xor_(bit)


def swap(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(L0) and "bias" not in name]:
        other = name.replace(L0, L1)
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


FAULTS: dict[str, dict[str, Change]] = {
    "": {"two tensors": swap},
    **{name: {"a scale": put(part, lambda t: t * 2)} for name, part in SCALE.items()},
    "NF4": {"a scale": put(SCALE["NF4"], lambda t: t * 2), "a table": put("weight.quant_map", lambda t: t * 1.01)},
    "NF4 double": {
        "a scale": flip("weight.absmax", 64),
        "a nested scale": put(SCALE["NF4 double"], lambda t: t * 1.1),
        "the nested table": put("weight.nested_quant_map", lambda t: t * 1.1),
        "the offset": with_state(lambda text: re.sub('(offset": 0.0)[1-9]', r"\g<1>7", text)),
    },
}


@every
def test_the_weights_level_names_the_tensor_of_every_fault(
    name: str, source: Path, targets: dict[str, Path], tmp_path: Path
) -> None:
    for fault, change in ({"a code": flip(CODES[name], 1)} | FAULTS[""] | FAULTS.get(name, {})).items():
        report = compared(source, edited(targets[name], tmp_path / fault, change))
        wanted = {L0 + "weight", L1 + "weight"} if change is swap else {L0 + "weight"}
        assert {finding.where for finding in report.findings} == wanted, fault


def test_the_command_line_verifies(source: Path, targets: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["verify", str(source), str(targets["NF4 double"])]) == 0
    assert "weights ok" in capsys.readouterr().out
    bad = edited(targets["NF4 double"], tmp_path / "bad", flip("weight", 1))
    assert main(["verify", str(source), str(bad), "--level", "weights"]) == 3
    assert f"{L0}weight: 1 of 4096 weights" in capsys.readouterr().out


@pytest.mark.parametrize("name", BNB)
def test_rows_of_very_different_sizes_are_no_fault(name: str, tmp_path: Path) -> None:
    # a block much smaller than the mean may get a scale below 0, as in bitsandbytes
    random = np.random.default_rng(0)
    rows = random.standard_normal((128, 64)) * 0.02 * np.exp(2 * random.standard_normal((128, 1)))
    source = planted(small(tmp_path, dtype="F32"), "mlp.dense_h_to_4h.weight", rows.reshape(-1).astype(np.float32))
    assert compared(source, assert_as_transformers(source, tmp_path, name)).passed

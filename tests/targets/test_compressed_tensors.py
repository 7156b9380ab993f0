"""The compressed-tensors target: equal to what the library makes, loaded by transformers; what others wrote is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, open_checkpoint
from neoxconv.cli.main import main
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.names import GROUPS
from neoxconv.targets.compressed_tensors import RECIPES
from neoxconv.verify.logits.compare import compare_predictions
from tests.fixtures import real
from tests.helpers import few
from tests.oracles import causal_logits, program
from tests.scaled import (
    CONFIG,
    FILE,
    FLOAT8,
    L0,
    PACKED,
    Change,
    Tensors,
    assert_same,
    compared,
    edited,
    made,
    planted,
    put,
    small,
    vllm_logits,
    weights,
)

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24))
WEIGHT = L0 + "weight"


def library() -> ModuleType:
    program("compressed_tensors")
    from compressed_tensors import quantization

    return quantization


def arguments(bits: int, group: int | str, symmetric: bool) -> Any:
    """The library's own of a type: `group` columns, or channel or tensor."""
    by = {"strategy": group} if isinstance(group, str) else {"strategy": "group", "group_size": group}
    return library().QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **by)


def compress(module: str, weight: torch.Tensor, asked: Any, part: float = 1) -> tuple[Tensors, torch.Tensor]:
    """What the library stores of a module's weight, with a part of the scales of its formula, and reads of that."""
    library()
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization.utils import calculate_qparams

    rows = {"channel": weight[:, None], "tensor": weight.reshape(1, 1, -1)}
    groups = rows[asked.strategy] if asked.strategy in rows else weight.unflatten(-1, (-1, asked.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    ends = (low.reshape(1), high.reshape(1)) if asked.strategy == "tensor" else (low, high)
    scale, zero = calculate_qparams(*ends, asked)
    scale = scale * part
    scheme = library().QuantizationScheme(targets=["Linear"], weights=asked)
    state = Compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    return {module + part: tensor for part, tensor in state.items()}, Compressor.decompress(state, scheme)["weight"]


def by_library(hf: Path, folder: Path, asked: Any, scale: float = 1) -> dict[str, torch.Tensor]:
    """A folder whose layers' matrices the library packed; what it reads of them."""
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors, read = load_file(hf / FILE), {}
    for name in [name for name in tensors if "layers" in name and tensors[name].ndim == 2]:
        packed, read[name] = compress(name.removesuffix("weight"), tensors.pop(name), asked, scale)
        tensors |= packed
    save_file(tensors, folder / FILE, {"format": "pt"})
    return read


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 columns, with a row of zeros, one of tiny numbers and one above zero."""
    source = small(tmp_path_factory.mktemp("source"), hidden=128)
    odd = [*[0.0] * 128, *[2.0**-24] * 128, *np.linspace(0.01, 0.9, 128)]
    return planted(source, "mlp.dense_h_to_4h.weight", odd)


@pytest.fixture(scope="module")
def hf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as a Hugging Face folder of each type."""
    folder = tmp_path_factory.mktemp("hf")
    return {dtype: made(source, folder / dtype, Recipe("hf", dtype=dtype)) for dtype in ("F16", "BF16", "F32")}


@pytest.mark.parametrize("dtype", few(["F16", "BF16", "F32"], "BF16"))
@pytest.mark.parametrize("group", GROUPS)
def test_every_tensor_is_the_one_that_compressed_tensors_makes(
    dtype: str, group: str, hf: dict[str, Path], tmp_path: Path
) -> None:
    for recipe in (recipe for recipe in RECIPES if recipe.group == group):
        asked = arguments(int(str(recipe.type)[1]), int(group) if group.isdigit() else group, not recipe.asymmetric)
        name = f"{recipe.type} {recipe.asymmetric}"
        by_library(hf[dtype], tmp_path / f"{name} theirs", asked)
        ours = made(hf[dtype], tmp_path / name, recipe)
        assert_same(load_file(ours / FILE), load_file(tmp_path / f"{name} theirs" / FILE))
        told = json.loads((ours / CONFIG).read_text())["quantization_config"]
        assert told.pop("dequantize", False) == recipe.asymmetric  # for transformers alone
        config = library().QuantizationConfig(**told)
        assert config.format == "pack-quantized" and config.config_groups["group_0"].weights == asked
        report = compared(hf[dtype], ours)
        assert report.passed and 0 < report.relative < 0.2, report.findings


@pytest.mark.parametrize("kind", ["W4A16", "W8A16", "FP8_DYNAMIC"])
def test_settings_are_those_of_the_preset(kind: str, source: Path, tmp_path: Path) -> None:
    preset = library().preset_name_to_scheme(kind, ["Linear"])
    target = made(source, tmp_path / "x", Recipe("compressed-tensors", type=kind))
    told = json.loads((target / CONFIG).read_text())["quantization_config"]
    [group] = library().QuantizationConfig(**told).config_groups.values()
    assert (group.weights, group.input_activations) == (preset.weights, preset.input_activations)
    assert set(told["ignore"]) == {"embed_out", "lm_head"}


def test_dynamic_float8_has_the_tensors_of_float8(source: Path, tmp_path: Path) -> None:
    ours = made(source, tmp_path / "x", Recipe("compressed-tensors", type="FP8_DYNAMIC"))
    theirs = made(source, tmp_path / "y", FLOAT8["E4M3 channel"])
    assert (ours / FILE).read_bytes() == (theirs / FILE).read_bytes() and compared(source, ours).passed


@pytest.mark.parametrize("name", ["W4A16 64", "W8A16 64 asymmetric", "FP8_DYNAMIC"])
def test_transformers_loads_the_folder_and_goes_on_from_a_few_tokens(name: str, source: Path, tmp_path: Path) -> None:
    program("compressed_tensors")
    recipe = PACKED.get(name, Recipe("compressed-tensors", type=name))
    target = made(source, tmp_path / "x", recipe)
    model = program("transformers").AutoModelForCausalLM.from_pretrained(target)
    spoken = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=4, do_sample=False)
    assert spoken.shape == (1, 8)
    if name in PACKED:
        wide = made(target, tmp_path / "wide", Recipe("hf"))
        far = np.abs(causal_logits(target, TOKENS, "float16") - causal_logits(wide, TOKENS, "float16")).max()
        assert far <= 1e-4  # the same float16 numbers


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [False, True])
def test_vllm_predicts_as_the_weights_that_are_read_back(asymmetric: bool, tmp_path: Path) -> None:
    model = real("trained_tp2_pp4")
    target = made(model / "checkpoints", tmp_path / "x", Recipe("compressed-tensors", asymmetric=asymmetric))
    tokens = np.load(model / "reference" / "tokens.npy")[:2, :64]
    read = open_checkpoint(target)
    logits = vllm_logits(target, read, tokens)
    assert compare_predictions(read, read, tokens, engine="vllm", logits=logits).figures.mean < 1e-5  # in float16


def test_groups_that_do_not_divide_the_columns_are_refused(tmp_path: Path) -> None:
    source = small(tmp_path)
    with pytest.raises(PlanError, match=r"--group 128: .*query_key_value.weight has 64 .* --group channel or 64"):
        made(source, tmp_path / "x", Recipe("compressed-tensors", group="128"))
    target = made(source, tmp_path / "y", Recipe("compressed-tensors"))
    assert load_file(target / FILE)[L0 + "weight_scale"].shape == (64, 1)  # of 64 columns
    for words in (["--type", "FP8_DYNAMIC", "--group", "64"], ["--type", "FP8_DYNAMIC", "--asymmetric"]):
        assert main(["convert", str(source), str(tmp_path / "x"), "--to", "compressed-tensors", *words]) == 2


# --- what other programs wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", few(range(2, 9), 3, 4, 8))
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_library_packed_is_read_as_it_reads_it(
    bits: int, symmetric: bool, hf: dict[str, Path], tmp_path: Path
) -> None:
    for group in (32, 16, "channel", "tensor"):
        asked = arguments(bits, group, symmetric)
        expected = by_library(hf["F16"], tmp_path / str(group), asked)
        found = weights(tmp_path / str(group))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert np.array_equal(values.astype(np.float16), expected[name].numpy()), (group, name)
        wide = made(tmp_path / str(group), tmp_path / f"{group} wide", Recipe("hf"))
        assert open_checkpoint(wide).tensors[WEIGHT].dtype.name == "F16"


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, 16, False), (8, "tensor", True)])
def test_scales_that_another_program_chose_are_judged_by_distance(
    bits: int, group: int | str, symmetric: bool, hf: dict[str, Path], tmp_path: Path
) -> None:
    """As an observer chooses them that cuts the largest weights off for less error of the others."""
    asked = arguments(bits, group, symmetric)
    by_library(hf["F16"], tmp_path / "x", asked, scale=0.8)
    assert compared(hf["F16"], tmp_path / "x").passed == (
        group != 32
    )  # ours, which has other scales, has only this one
    report = compared(hf["F16"], tmp_path / "x", foreign=True)
    assert report.passed and "scales of 8 tensors are taken as they are stored" in report.lines[0], report.findings

    def moved(words: torch.Tensor) -> torch.Tensor:
        words[3, 2] ^= 1 << (bits - 1)
        return words

    report = compared(hf["F16"], edited(tmp_path / "x", tmp_path / "y", put("weight_packed", moved)), foreign=True)
    assert [finding.where for finding in report.findings] == [WEIGHT] and "1 of " in report.findings[0].what
    larger = edited(tmp_path / "x", tmp_path / "z", put("weight_scale", lambda scale: scale * 2))
    assert [finding.where for finding in compared(hf["F16"], larger, foreign=True).findings] == [WEIGHT]


def test_float8_scales_that_are_no_powers_of_two_are_judged_by_distance(hf: dict[str, Path], tmp_path: Path) -> None:
    """As llm-compressor has them: the largest weight over 448."""
    ours, weights = made(hf["BF16"], tmp_path / "x", FLOAT8["E4M3 channel"]), load_file(hf["BF16"] / FILE)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            weight = weights[name.removesuffix("_scale")]
            scale = (weight.abs().amax(1, keepdim=True).float() / 448).clamp(min=1e-9)
            codes = (weight / scale.to(weight.dtype)).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors |= {name: scale.to(weight.dtype), name.removesuffix("_scale"): codes}

    folder = edited(ours, tmp_path / "y", change)
    assert not compared(hf["BF16"], folder).passed
    report = compared(hf["BF16"], folder, foreign=True)
    assert report.passed, report.findings
    beyond = edited(folder, tmp_path / "z", put("weight_scale", lambda scale: scale * 1.3))
    assert [finding.where for finding in compared(hf["BF16"], beyond, foreign=True).findings] == [WEIGHT]


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_the_order_of_activations_are_read(symmetric: bool, hf: dict[str, Path], tmp_path: Path) -> None:
    """As compressed-tensors once had it: column c is of group weight_g_idx[c]; where it has -1 it says nothing."""
    weight = load_file(hf["F16"] / FILE)[WEIGHT]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    packed, read = compress(L0, weight[:, order], arguments(4, 32, symmetric))
    back, groups = torch.empty_like(weight), torch.empty(128, dtype=torch.int32)
    back[:, order], groups[order] = read, torch.arange(128, dtype=torch.int32) // 32
    codes = library_codes(packed[L0 + "weight_packed"])
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    packed[L0 + "weight_packed"] = library_words(unordered)

    def change(more: Tensors) -> Change:
        return lambda tensors: (tensors.pop(WEIGHT), tensors.update(packed | more))

    folder = edited(hf["F16"], tmp_path / "x", change({L0 + "weight_g_idx": groups}))
    assert np.array_equal(weights(folder)[WEIGHT].astype(np.float16), back.numpy())
    unset = edited(hf["F16"], tmp_path / "y", change({L0 + "weight_g_idx": torch.full_like(groups, -1)}))
    none = edited(hf["F16"], tmp_path / "z", change({}))
    assert np.array_equal(weights(unset)[WEIGHT], weights(none)[WEIGHT])
    beyond = edited(hf["F16"], tmp_path / "b", change({L0 + "weight_g_idx": groups + 1}))
    with pytest.raises(CheckpointError, match=r"weight_g_idx has groups beyond the 4"):
        open_checkpoint(beyond)


def library_codes(words: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return unpack_from_int32(words, 4, torch.Size((words.shape[0], 8 * words.shape[1])))


def library_words(codes: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    return pack_to_int32(codes, 4)


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(L0 + part)


MISFITS: dict[str, tuple[Change, str]] = {
    "no shape": (drop("weight_shape"), "HERE.weight_shape is missing"),
    "no scale": (drop("weight_scale"), "lacks HERE.weight_scale"),
    "no codes": (drop("weight_packed"), "HERE.weight is missing"),
    "negative shape": (put("weight_shape", lambda t: -t), "HERE.weight_shape is I64 [2] [-64, -64]; expected"),
    "three sizes": (put("weight_shape", lambda t: torch.cat([t, t[:1]])), "HERE.weight_shape is I64 [3]"),
    "shape of floats": (put("weight_shape", lambda t: t.half()), "HERE.weight_shape is F16 [2]"),
    "more rows": (put("weight_shape", lambda t: t * torch.tensor([2, 1])), "HERE.weight_packed is I32 [64, 8]"),
    "more columns": (put("weight_shape", lambda t: t * 16), "HERE.weight_packed has rows of 8 words for 1024 columns"),
    "bytes": (put("weight_packed", lambda t: t.view(torch.uint8)), "HERE.weight_packed is U8 [64, 32]; expected I32"),
    "flat": (put("weight_packed", lambda t: t.reshape(-1)), "HERE.weight_packed is I32 [512]; expected I32"),
    "short scale": (put("weight_scale", lambda t: t[:-2]), "HERE.weight_scale is F16 [62, 2]"),
    "odd groups": (put("weight_scale", lambda t: t[:, :1].repeat(1, 3)), "HERE.weight_scale has 3 groups"),
    "scale of codes": (put("weight_scale", lambda t: t.view(torch.int16)), "HERE.weight_scale is I16 [64, 2]"),
    "short zeros": (put("weight_zero_point", lambda t: t[:-1]), "HERE.weight_zero_point is I32 [7, 2]"),
    "wide index": (lambda tensors: tensors.update({L0 + "weight_g_idx": torch.zeros(64)}), "g_idx is F32 [64]"),
    "a weight too": (lambda tensors: tensors.update({WEIGHT: torch.zeros(64, 64)}), "HERE.weight_packed lies beside"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    change, expected = MISFITS[case]
    target = made(small(tmp_path), tmp_path / "made", PACKED["W4A16 32 asymmetric"])
    folder = edited(target, tmp_path / "x", change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert expected.replace("HERE.", L0) in str(caught.value) and str(folder) in str(caught.value)

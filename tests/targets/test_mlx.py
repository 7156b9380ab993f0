"""MLX's folders: the bytes of mlx_lm.convert, its logits, folders read back, and models that mlx_lm does not run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.cli.formats import hollow_checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import PLAIN, Floats, narrow, widen
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.names import MLX_TYPES
from neoxconv.quant.scaled.mlx import BITS, GROUPS, MLX
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.compare import compare_predictions
from neoxconv.verify.logits.trial import Engine
from tests.fixtures import real
from tests.helpers import cli
from tests.oracles import mlx_convert, mlx_python, mlx_quantize
from tests.scaled import CONFIG, FILE, compared, made
from tests.toy import toy

QKV, UP = ("model.h.0." + name for name in ("attention.query_key_value.", "mlp.dense_h_to_4h."))
ODD = "model.h.0.attention.dense."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("source"), hidden=128, rows=288)


@pytest.fixture(scope="module")
def four(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, tmp_path_factory.mktemp("target") / "mlx", Recipe("mlx", type="4bit", group="32"))


@pytest.mark.parametrize("kind", MLX_TYPES)
def test_every_type_is_written_read_back_and_verified(source: Path, kind: str, tmp_path: Path) -> None:
    target = made(source, tmp_path / "mlx", Recipe("mlx", type=kind))
    assert compared(source, target).passed
    tensors = open_checkpoint(target).tensors
    quantized = {name for name, tensor in tensors.items() if tensor.dtype.quantized}
    assert quantized == {name for name, tensor in tensors.items() if len(tensor.shape) == 2}


def test_the_folder_is_what_mlx_lm_expects(four: Path) -> None:
    tensors, config = load_file(four / FILE), json.loads((four / CONFIG).read_text())
    with safe_open(four / FILE, "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert {"rotary_pct", "rotary_emb_base"} <= config.keys()
    assert all(name.startswith("model.") for name in tensors)
    shapes = {name: tuple(tensors[QKV + name].shape) for name in ("weight", "scales", "biases", "bias")}
    assert shapes == {"weight": (384, 16), "scales": (384, 4), "biases": (384, 4), "bias": (384,)}
    assert tensors[QKV + "weight"].dtype == torch.uint32 and tensors[QKV + "scales"].dtype == torch.float16
    assert "library_name: mlx\n" in (four / "README.md").read_text()


def test_shards_and_few_threads_hold_the_same_tensors(source: Path, four: Path, tmp_path: Path) -> None:
    target = made(source, tmp_path / "mlx", Recipe("mlx", type="4bit", group="32", shard_size=100_000), jobs=1)
    files = sorted(target.glob("model-*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(four / FILE)
    assert len(files) > 2 and index.keys() == tensors.keys() == whole.keys()
    assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())


def test_a_folder_converts_to_others_and_to_itself(four: Path, tmp_path: Path) -> None:
    plain = made(four, tmp_path / "hf", Recipe("hf", dtype="F32"))
    assert compared(four, plain).passed
    assert "quantization" not in json.loads((plain / CONFIG).read_text())
    again = made(four, tmp_path / "again", Recipe("mlx", type="4bit", group="32"))
    assert compared(four, again).passed


def test_columns_that_no_group_divides_stay_as_they_are(tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=96, rows=288)
    plan = make_plan(open_checkpoint(source), Recipe("mlx", type="4bit", group="64"))
    assert any("not quantized, as 64 does not divide" in note and ".attention.dense" in note for note in plan.notes)
    target = run(plan, tmp_path / "mlx")
    tensors = load_file(target / FILE)
    assert tensors[ODD + "weight"].dtype == torch.float16 and ODD + "scales" not in tensors
    assert "model.h.0.mlp.dense_4h_to_h.scales" in tensors  # 384 columns
    assert compared(source, target).passed


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight", lambda t: t.view(torch.int32).__setitem__((3, 2), t.view(torch.int32)[3, 2] ^ 0x10)),
        ("scales", lambda t: t.__setitem__((3, 1), t[3, 1] * 2)),
        ("biases", lambda t: t.__setitem__((3, 1), -t[3, 1])),
        ("scales", lambda t: t.view(torch.int16).__setitem__((3, 1), t.view(torch.int16)[3, 1] ^ 4)),
    ],
    ids=["code", "scale", "bias", "a bit of a scale"],
)
def test_a_fault_is_found_in_its_tensor(source: Path, four: Path, part: str, change: Any, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "mlx", ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(four / FILE)
    change(tensors[UP + part])
    save_file(tensors, tmp_path / "mlx" / FILE, {"format": "mlx"})
    report = compared(source, tmp_path / "mlx")
    assert not report.passed and all("layers.0.mlp.dense_h_to_4h.weight" in str(each) for each in report.findings)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "config.json's quantization of it is null"),
        ({"group_size": 32, "bits": 7}, '"bits": 7'),
        ({"group_size": 64, "bits": 4}, "model.embed_in.scales is F16"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "expected U8"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_named(four: Path, told: Any, said: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four, tmp_path / "mlx"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"quantization": told}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert said in str(error.value)


def test_a_layer_may_have_settings_of_its_own(source: Path, four: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four, tmp_path / "mlx", ignore=shutil.ignore_patterns("manifest.json")))
    eight = load_file(made(source, tmp_path / "eight", Recipe("mlx", type="8bit", group="128")) / FILE)
    tensors, config = load_file(four / FILE), json.loads((folder / CONFIG).read_text())
    save_file(tensors | {name: eight[name] for name in tensors if name.startswith(UP)}, folder / FILE)
    config["quantization"][UP.removesuffix(".")] = {"group_size": 128, "bits": 8}
    (folder / CONFIG).write_text(json.dumps(config))
    assert compared(source, folder).passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "mxfp4"])
def test_codes_chosen_together_are_proved_and_a_moved_one_is_found(source: Path, kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", (np.arange(6 * 64) * 7 % 256).reshape(6, 64))
    by, words = tmp_path / "cal.gguf", ("--tokens", tmp_path / "tokens.npy", "--covariance", "--quiet")
    assert cli("calibrate", source, "-o", by, *words) == 0
    target = made(source, tmp_path / "mlx", Recipe("mlx", type=kind, calibration=by))
    plain = made(source, tmp_path / "plain", Recipe("mlx", type=kind))
    changed = {name for name, t in load_file(target / FILE).items() if not t.equal(load_file(plain / FILE)[name])}
    assert len(changed) == 9 and "model.embed_in.weight" not in changed  # of 2 layers and the head, the codes alone
    opened = open_checkpoint(source), open_checkpoint(target)
    assert verify_weights(*opened, calibration=by).passed and verify_weights(*opened).passed
    tensors = load_file(target / FILE)
    tensors[UP + "weight"].view(torch.int32)[3, 2] ^= 0x20
    (target / "manifest.json").unlink()
    save_file(tensors, target / FILE, {"format": "mlx"})
    report = verify_weights(opened[0], open_checkpoint(target), calibration=by)
    assert {finding.where for finding in report.findings} == {"gpt_neox.layers.0.mlp.dense_h_to_4h.weight"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"activation": "gelu"}, "GELU is the exact one"), ({"ff": 256}, "4 times as wide"), ({"tied": True}, "tied")],
)
def test_models_that_mlx_lm_runs_otherwise_are_refused(source: Path, changes: dict[str, Any], said: str) -> None:
    opened = open_checkpoint(source)
    with pytest.raises(PlanError) as error:
        make_plan(replace(opened, config=replace(opened.config, **changes)), Recipe("mlx"))
    assert said in str(error.value) and "--to hf" in str(error.value)


def test_families_that_mlx_lm_lacks_are_refused_by_name() -> None:
    for family in ("gpt2", "gpt_neo", "gptj", "mpt"):
        architecture = next(each for each in ARCHITECTURES if each.name == family)
        with pytest.raises(PlanError, match=f"{architecture.title} is not written for MLX"):
            make_plan(hollow_checkpoint(architecture, GPT_NEOX.presets["pythia-14m"]), Recipe("mlx"))


def test_a_group_that_mlx_lacks_is_refused(source: Path) -> None:
    with pytest.raises(PlanError, match="groups of 32, 64, 128; found 4bit in groups of 16"):
        make_plan(open_checkpoint(source), Recipe("mlx", type="4bit", group="16"))


# --- MLX itself -------------------------------------------------------------------------------------------------------


def hard() -> Floats:
    """Weights [256, 512] of many sizes: rows of zeros, of one sign, of ties, of numbers near a type's ends."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((256, 512)) * 0.02 * np.exp(2 * random.standard_normal((256, 1)))
    rows[3], rows[4], rows[5] = 0, np.abs(rows[4]), -np.abs(rows[5])
    rows[6:9] *= np.array([[1e-5], [1e-3], [1e5]])
    rows[9:40] = random.integers(-24, 25, (31, 512)) / 4
    rows[40:60] = random.integers(-448, 449, (20, 512)) / 16
    rows[60] = np.tile(np.arange(-16, 16) + 0.5, 16)
    return rows.astype(np.float32)


@pytest.mark.slow
def test_bytes_and_values_are_those_of_mlx(tmp_path: Path) -> None:
    kinds = {encoding.name: kind for kind, encoding in MLX.items()}
    rows, theirs = hard(), mlx_quantize(hard(), kinds, tmp_path / "mlx.npz")
    for encoding in MLX.values():
        for native in (PLAIN["F16"], PLAIN["BF16"], PLAIN["F32"]):
            values = widen(narrow(rows, native), native)
            tensor = LazyTensor(rows.shape, PLAIN["F32"], lambda start, stop, v=values: v[start:stop], native)
            sizes = encoding.sizes(values)
            ours = [encoding.encode(values, sizes, native).tobytes(), *encoding.finish(tensor, sizes)]
            parts, stored = encoding.parts(tensor), {}
            for part, data in zip(parts, ours, strict=True):
                found = theirs[f"{encoding.name}.{native.name}.{part.name}"]
                assert (found.shape, found.tobytes()) == (part.shape, data), (encoding.name, native.name, part.name)
                array = np.frombuffer(data, part.dtype.numpy).reshape(part.shape)
                stored[part.name] = LazyTensor(part.shape, part.dtype, lambda a, b, r=array: r[a:b], part.dtype)
            read = encoding.decode(stored, rows.shape)(0, len(rows))
            assert np.array_equal(read, theirs[f"{encoding.name}.{native.name}.values"])
            wrong = encoding.check(values, read, encoding.scales(sizes, native), encoding.groups.width(rows.shape))
            assert not wrong.any(), (encoding.name, native.name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MLX, ids=lambda kind: "-".join(map(str, kind)))
def test_a_folder_is_that_of_mlx_lm_convert(kind: tuple[str, int, int], tmp_path: Path) -> None:
    mode, bits, group = kind
    source = open_checkpoint(real("neox_2022_tp2_pp4") / "checkpoints")
    hf = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    name = f"{bits}bit" if mode == "affine" else mode
    ours = run(
        make_plan(source, Recipe("mlx", type=name, group=str(group) if mode == "affine" else None)), tmp_path / "ours"
    )
    mlx_convert(hf, tmp_path / "theirs", bits, group, mode)
    tensors, others = load_file(ours / FILE), load_file(tmp_path / "theirs" / FILE)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and tensor.equal(others[name]), name
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (ours, tmp_path / "theirs")]
    assert configs[0] == configs[1]
    assert compared(hf, tmp_path / "theirs").passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit", "mxfp4", "mxfp8", "nvfp4"])
def test_mlx_lm_runs_the_folder_to_our_logits(kind: str, tmp_path: Path) -> None:
    trained = real("trained_tp2_pp4")
    tokens = np.load(trained / "reference" / "tokens.npy")[:1, :64]
    target = made(trained / "checkpoints", tmp_path / "mlx", Recipe("mlx", type=kind))
    opened = open_checkpoint(target)
    with program(Engine("mlx", mlx_python()), target, opened) as ask:
        logits = ask(tokens)
    assert compare_predictions(opened, opened, tokens, engine="mlx", logits=logits).figures.mean < 1e-9


def test_the_table_of_types_is_what_is_offered() -> None:
    assert {f"{bits}bit" for bits in BITS} | {mode for mode, *_ in MLX if mode != "affine"} == set(MLX_TYPES)
    assert {group for mode, _, group in MLX if mode == "affine"} == set(GROUPS)

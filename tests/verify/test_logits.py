"""`verify --level logits`: right targets pass, planted faults are found and named, the exact merge is exact."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.sources.checkpoint import open_checkpoint as opened
from neoxconv.verify.logits.compare import compare_predictions
from tests.fixtures import fixture, real
from tests.toy import toy

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
Tensors = dict[str, np.ndarray]


FOLDER = tempfile.TemporaryDirectory()  # goes with the process


@cache
def source() -> Path:
    """A model of the trained one's sizes but for the vocabulary."""
    return toy(Path(FOLDER.name), layers=8, hidden=256, heads=8, rows=1024, context=512)


def trained() -> Path:
    """Whose predictions hang on each setting, as those of random weights do not."""
    return fixture("trained_tp2_pp4/checkpoints")


def verify(*words: object, length: int = 96) -> int:
    options = ["--level", "logits", "--length", str(length), "--sequences", "2"]
    return main(["verify", *map(str, words), *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder of float16."""
    return run(make_plan(open_checkpoint(source()), Recipe("hf")), tmp_path_factory.mktemp("logits") / "hf")


@pytest.fixture(scope="module")
def made_of_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(make_plan(open_checkpoint(trained()), Recipe("hf")), tmp_path_factory.mktemp("trained") / "hf")


# --- planted faults -------------------------------------------------------------------------------------------------

L, QKV, UP = "gpt_neox.layers.{}.", "attention.query_key_value.weight", "mlp.dense_h_to_4h.weight"
DENSE = "attention.dense.weight"
L3 = L.format(3)


def doubled_biases(tensors: Tensors) -> None:
    tensors[L3 + "mlp.dense_4h_to_h.bias"] *= 2


def qkv_order(tensors: Tensors) -> None:
    weight = tensors[L3 + QKV]
    tensors[L3 + QKV] = weight.reshape(8, 3, 32, 256).transpose(1, 0, 2, 3).reshape(768, 256)


def swapped_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(L.format(2))]:
        other = name.replace("layers.2.", "layers.5.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def exchanged_halves(tensors: Tensors) -> None:
    tensors[L3 + UP] = np.roll(tensors[L3 + UP], 512, axis=0)


def another_checkpoints_tensor(tensors: Tensors) -> None:
    other = np.random.default_rng(0).standard_normal(tensors[L3 + DENSE].shape) * 0.03
    tensors[L3 + DENSE] = other.astype(np.float16)


def scaled_norm(tensors: Tensors) -> None:
    tensors["gpt_neox.final_layer_norm.weight"] *= np.float16(1.1)


def layer_0_norm(tensors: Tensors) -> None:
    tensors[L.format(0) + "input_layernorm.bias"] += np.float16(1)


def not_a_number(tensors: Tensors) -> None:
    tensors[L.format(2) + UP][5, 7] = np.nan


def shifted_words(tensors: Tensors) -> None:
    tensors["gpt_neox.embed_in.weight"] = np.roll(tensors["gpt_neox.embed_in.weight"], 1, axis=0)


def rope(theta: float, share: float) -> dict[str, Any]:
    return {
        "rotary_emb_base": theta,
        "rotary_pct": share,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share},
    }


FAULTS: dict[str, tuple[Callable[[Tensors], None] | dict[str, Any], str]] = {
    "biases doubled": (doubled_biases, L3 + "mlp.dense_4h_to_h.bias"),
    "QKV order": (qkv_order, L3 + QKV),
    "two layers swapped": (swapped_layers, "layer 2 goes wrong"),
    "one rank's half exchanged": (exchanged_halves, L3 + UP),
    "one tensor of another checkpoint": (another_checkpoints_tensor, L3 + DENSE),
    "final norm": (scaled_norm, "gpt_neox.final_layer_norm.weight"),
    "a norm of layer 0": (layer_0_norm, L.format(0) + "input_layernorm.bias"),
    "not a number": (not_a_number, "layer 2 goes wrong"),
    "words shifted": (shifted_words, "gpt_neox.embed_in.weight"),
    "rotary base": (rope(20000, 0.25), "the hyperparameters"),
    "rotary_pct": (rope(10000, 0.5), "the hyperparameters"),
    "epsilon": ({"layer_norm_eps": 1e-12}, "the hyperparameters"),
}


OF_TRAINED = ("final norm", "rotary base", "rotary_pct", "epsilon")  # too small for a model of random weights


def with_fault(made: Path, folder: Path, fault: Callable[[Tensors], None] | dict[str, Any]) -> Path:
    """A copy of the folder with other tensors or another configuration, without a manifest that would tell."""
    shutil.copytree(made, folder)
    (folder / "manifest.json").unlink()
    if isinstance(fault, dict):
        config = json.loads((folder / "config.json").read_text()) | fault
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    tensors = safetensors.load_file(folder / "model.safetensors")
    fault(tensors)
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    safetensors.save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_logits_and_named(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, culprit = FAULTS[name]
    model, made = (trained(), "made_of_trained") if name in OF_TRAINED else (source(), "made")
    assert verify(model, with_fault(request.getfixturevalue(made), tmp_path / "bad", fault), "--bisect") == 3
    out = capsys.readouterr().out
    assert "logits differ" in out and "mean KL divergence is" in out
    assert culprit in next(line for line in out.splitlines() if "bisect:" in line)


def test_another_gelu_is_found_where_the_merge_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two forms of GELU are nearly equal: their difference drowns in what averaging the norms costs."""
    exact = run(make_plan(open_checkpoint(source(), norms="fold"), Recipe("hf", dtype="F32")), tmp_path / "exact")
    assert verify(source(), exact) == 0
    bad = with_fault(exact, tmp_path / "bad", {"hidden_act": "gelu"})
    assert verify(source(), bad, "--norms", "fold", "--bisect") == 3
    assert "the hyperparameters" in capsys.readouterr().out


def test_one_flipped_bit_in_a_scale_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run(make_plan(open_checkpoint(source()), Recipe("gguf", type="Q8_0")), tmp_path / "model.gguf")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.4.ffn_up.weight")
    with open(file, "r+b") as stream:
        stream.seek(tensor.data_offset + 34 * 100 + 1)
        upper = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([upper ^ 0x40]))  # the top bit of the exponent
    file.with_name("model.gguf.manifest.json").unlink()
    assert verify(source(), file, "--bisect") == 3
    out = capsys.readouterr().out
    assert "weights differ, tokenizer ok, logits differ" in out and "gpt_neox.layers.4.mlp.dense_h_to_4h.weight" in out


# --- right targets --------------------------------------------------------------------------------------------------


RECIPES = (
    Recipe("hf"),
    Recipe("safetensors", dtype="BF16"),
    Recipe("slim", tp=4),
    Recipe("gguf", type="Q4_K_M"),
    Recipe("gguf", type="Q8_0", tensor_type=(("ffn_down", "Q2_K"),)),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.format}-{r.type or r.dtype or r.tp}")
def test_a_right_target_passes(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run(make_plan(open_checkpoint(source()), recipe), tmp_path / "target")
    assert verify(source(), target) == 0
    beside = "" if recipe.format == "safetensors" else "tokenizer ok, "
    assert f"PASS: bytes ok, weights ok, {beside}logits ok" in capsys.readouterr().out


def test_slim_predicts_what_was_trained_to_the_last_bit(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained())
    target = run(make_plan(checkpoint, Recipe("slim")), tmp_path / "slim")
    tokens = np.load(trained().parent / "reference" / "tokens.npy")[:2, :64]
    assert compare_predictions(checkpoint, open_checkpoint(target), tokens).figures.largest_difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neox_2022_tp2_pp4", "trained_tp2_pp4"])
def test_the_exact_merge_is_exact(name: str, tmp_path: Path) -> None:
    folder = real(name)
    tokens = np.load(folder / "reference" / "tokens.npy")[:4, :128]
    checkpoint = opened(folder / "checkpoints")

    def divergence(norms: str, dtype: str) -> float:
        plan = make_plan(opened(folder / "checkpoints", norms=norms), Recipe("hf", dtype=dtype))
        return compare_predictions(checkpoint, opened(run(plan, tmp_path / (norms + dtype))), tokens).figures.mean

    assert divergence("fold", "F32") <= 1e-11  # float32's own: 5e-13 on an AMD, 1.8e-12 on an Intel with AVX512
    assert divergence("fold", "F16") <= 0.1 * divergence("mean", "F16")


def test_a_serial_models_exact_merge_passes(tmp_path: Path) -> None:
    shards = fixture("neox_2026_bf16_tp2_pp2/checkpoints")
    target = run(make_plan(open_checkpoint(shards, norms="fold"), Recipe("hf", dtype="F32")), tmp_path / "hf")
    assert verify(shards, target, length=48) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "recipe"), [
    ("transformers", Recipe("hf")), ("llama.cpp", Recipe("gguf", type="Q5_K_M")),
])  # fmt: skip
def test_the_program_that_will_run_a_target_judges_it(
    engine: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip({"llama.cpp": "llama_cpp"}.get(engine, engine), reason=f"{engine} is not installed")
    target = run(make_plan(open_checkpoint(source()), recipe), tmp_path / "target")
    assert verify(source(), target, "--engine", engine) == 0
    assert f"by {engine}" in capsys.readouterr().out
    assert verify(source(), target, "--engine", "llama.cpp" if engine == "transformers" else "transformers") == 1


# --- what people see and may get wrong ------------------------------------------------------------------------------


def test_json_has_every_layer_and_figure(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(source(), made, "--json") == 0
    level = json.loads(capsys.readouterr().out)["levels"][-1]
    assert level["level"] == "logits" and len(level["layers"]) == 9 and level["limits"][0]["found"] == level["mean"]
    assert {"median", "p99", "top1", "perplexity", "rms_probability"} <= set(level)


def test_limits_can_be_asked_for(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(source(), made, "--max-kl", "1e-9") == 3
    assert verify(source(), made, "--min-top1", "0.5", "--max-ppl-ratio", "1.1", "--max-kl-p99", "0.1") == 0
    assert "expected at most 1e-09" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--text", "none.txt"], 1, "none.txt"),
    (["--tokens", "{ids}", "--text", "{ids}"], 2, "exclude each other"),
    (["--tokens", "{ids}"], 1, "has ids from 0 to 99999"),
    (["--device", "cuda"], 1, "no CUDA device"),
    (["--device", "abacus"], 1, "expected cpu, cuda"),
    (["--html", "{target}/page.html"], 1, "would be written into"),
    (["--html", "none/page.html"], 1, "is no folder"),
    (["--tokens", "{empty}"], 1, "is no .npy file"),
    (["--max-kl", "-1"], 2, "-1"),
])  # fmt: skip
def test_wrong_options_are_told(
    words: list[str], code: int, message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", np.array([[0, 99999]]))
    (tmp_path / "empty.npy").write_bytes(b"")
    names = {"ids": tmp_path / "ids.npy", "empty": tmp_path / "empty.npy", "target": made}
    assert verify(source(), made, *(word.format(**names) for word in words)) == code
    assert message in capsys.readouterr().err


def test_options_of_the_logits_level_are_refused_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(toy(tmp_path)), str(tmp_path), "--max-kl", "1"]) == 2
    assert "--max-kl is for --level logits" in capsys.readouterr().err


def test_models_of_other_sizes_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(make_plan(open_checkpoint(toy(tmp_path, layers=3)), Recipe("hf")), tmp_path / "hf")
    assert verify(source(), other) == 3
    assert "cannot be compared, as it has layers 3" in capsys.readouterr().out

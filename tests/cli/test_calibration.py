"""`calibrate --covariance`, `convert --calibration`, `verify --calibration`: what they make of each other."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint
from neoxconv.formats import imatrix
from neoxconv.formats.calibration.read import moments_in, outputs_in
from neoxconv.verify.logits.gradients import squares_of_gradients
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.needs import inputs_of
from neoxconv.verify.logits.stream import Side
from tests.fixtures import fixture
from tests.helpers import PowerCut, cli, digests
from tests.oracles import llama_quantize
from tests.toy import toy

TOKENS = (np.arange(6 * 64) * 7 % 512).reshape(6, 64)
WIDTHS = {"hidden": 64, "layers": 3}
HEAD = 16  # of four


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", TOKENS)
    return toy(tmp_path, **WIDTHS)


def calibration(source: Path, name: str = "cal.gguf", *words: str) -> Path:
    """A calibration of the source by the tokens beside it."""
    made = source.parent / name
    assert cli("calibrate", source, "-o", made, "--tokens", source.parent / "tokens.npy", "--covariance", *words) == 0
    return made


def test_moments_are_those_of_what_transformers_multiplies_with(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert cli("convert", source, tmp_path / "hf", "--to", "hf", "--dtype", "f32") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected: dict[str, np.ndarray] = {}

    def hook(name: str) -> object:
        def seen(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].double().flatten(0, 1)
            expected[name] = (flat.T @ flat / len(flat)).numpy()

        return seen

    layers = model.gpt_neox.layers
    for i, layer in enumerate(layers):
        for module, gguf in (
            (layer.attention.query_key_value, "attn_qkv"), (layer.attention.dense, "attn_output"),
            (layer.mlp.dense_h_to_4h, "ffn_up"), (layer.mlp.dense_4h_to_h, "ffn_down"),
        ):  # fmt: skip
            module.register_forward_pre_hook(hook(f"blk.{i}.{gguf}.weight"))
    model.get_output_embeddings().register_forward_pre_hook(hook("output.weight"))
    with torch.inference_mode():
        model(torch.from_numpy(TOKENS))
    found = moments_in(calibration(source))
    assert set(found) == set(expected) and len(found) == 13
    for name, square in expected.items():
        assert np.allclose(found[name].read(), square, rtol=1e-3, atol=1e-4 * np.abs(square).max()), name


def test_it_is_an_importance_matrix_too(source: Path) -> None:
    made = calibration(source)
    sums = calibrate(open_checkpoint(source), TOKENS)
    read = imatrix.read(made)
    assert read.chunks == 6 and set(read.entries) == {*sums, "output.weight"}
    for name, values in sums.items():
        assert np.allclose(read.entries[name], values / values.mean(), rtol=1e-4), name


def test_llama_quantize_takes_it(tmp_path: Path) -> None:
    source = fixture("trained_tp2_pp4/checkpoints")
    np.save(tmp_path / "tokens.npy", TOKENS)
    made, f16 = tmp_path / "cal.gguf", tmp_path / "f16.gguf"
    assert cli("calibrate", source, "-o", made, "--tokens", tmp_path / "tokens.npy", "--covariance") == 0
    assert cli("convert", source, f16, "--to", "gguf", "--type", "f16") == 0
    llama_quantize(f16, tmp_path / "theirs.gguf", "Q3_K_M", imatrix=imatrix.read(made).entries)


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(calibration(source))
    run = Side.layer
    counted = []

    def cut(self: Side, number: int, streams: list[torch.Tensor], **words: Any) -> list[torch.Tensor]:
        counted.append(number)
        if len(counted) == 3:
            raise PowerCut
        return run(self, number, streams, **words)

    with monkeypatch.context() as patch:
        patch.setattr(Side, "layer", cut)
        with pytest.raises(PowerCut):
            calibration(source, "cut.gguf")
    assert not (source.parent / "cut.gguf").exists()
    counted.clear()
    monkeypatch.setattr(
        Side,
        "layer",
        lambda self, number, streams, **words: (counted.append(number), run(self, number, streams, **words))[1],
    )
    assert digests(calibration(source, "cut.gguf")) == whole
    assert counted == [2]
    assert not list(source.parent.glob("cut.gguf.*"))


def test_what_is_not_ours_is_left_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = source.parent / "cal.gguf.partial"
    stranger.write_text("mine")
    words = ("calibrate", source, "-o", source.parent / "cal.gguf", "--tokens", source.parent / "tokens.npy")
    assert cli(*words, "--covariance") == 1
    assert "cal.gguf.partial" in capsys.readouterr().err and stranger.read_text() == "mine"
    stranger.unlink()
    stranger.symlink_to(source.parent / "elsewhere")
    assert cli(*words, "--covariance") == 1 and not (source.parent / "elsewhere").exists()


def converted(source: Path, made: Path, *words: str) -> Path:
    target = source.parent / "model.gguf"
    options = (
        "--to",
        "gguf",
        "--type",
        "f16",
        "--tensor-type",
        "blk.*weight=q4_0",
        "--calibration",
        made,
        "--overwrite",
    )
    assert cli("convert", source, target, *options, *words) == 0
    return target


def test_a_file_of_codes_chosen_together_is_verified(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source)
    target = converted(source, made)
    first = digests(target)
    assert digests(converted(source, made, "--jobs", "1")) == first
    assert cli("verify", source, target) == 0
    assert cli("verify", source, target, "--calibration", made) == 0
    other = calibration(source, "other.gguf", "--sequences", "3")
    capsys.readouterr()
    assert cli("verify", source, target, "--calibration", other) == 1
    assert "another calibration" in capsys.readouterr().err


def change(target: Path, name: str, at: int) -> None:
    """Change one of the two codes in a byte of a tensor of a GGUF file, and forget the manifest."""
    import gguf

    tensor = next(t for t in gguf.GGUFReader(target).tensors if t.name == name)
    data = bytearray(target.read_bytes())
    at += int(tensor.data_offset)
    data[at] = (data[at] & 0xF0) | ((data[at] & 0x0F) ^ 1)
    target.write_bytes(bytes(data))
    for manifest in target.parent.glob("*manifest*"):
        manifest.unlink()


def test_a_moved_code_is_found_with_the_calibration(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source)
    target = converted(source, made)
    change(target, "blk.1.ffn_up.weight", 40 * 18 + 2 + 5)
    capsys.readouterr()
    assert cli("verify", source, target, "--calibration", made) == 3
    assert "layers.1.mlp.dense_h_to_4h.weight" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (("--imatrix", "{cal}", "--calibration", "{cal}"), "leave --imatrix out"),
    (("--calibration", "{plain}"), "holds no second moments"),
    (("--calibration", "{nowhere}"), "cannot be opened"),
])  # fmt: skip
def test_wrong_files_are_told(
    words: tuple[str, ...], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, plain = calibration(source), source.parent / "plain.gguf"
    assert cli("calibrate", source, "-o", plain, "--tokens", source.parent / "tokens.npy") == 0
    told = [word.format(cal=made, plain=plain, nowhere=source.parent / "nowhere") for word in words]
    assert cli("convert", source, source.parent / "m.gguf", "--to", "gguf", "--type", "q4_0", *told) == 1
    assert message in capsys.readouterr().err


def test_damage_is_found_when_moments_are_read(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source)
    data = bytearray(made.read_bytes())
    data[-200 - 4 * 64 * 65 // 2] ^= 1  # before the head's, which come last
    made.write_bytes(bytes(data))
    words = ("--to", "gguf", "--type", "f16", "--tensor-type", "blk.*weight=q4_0", "--calibration", made)
    assert cli("convert", source, source.parent / "m.gguf", *words) == 1
    assert "are damaged" in capsys.readouterr().err


def test_what_shares_its_inputs_is_measured_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(toy(tmp_path, **WIDTHS))
    layers = inputs_of(checkpoint)
    assert [[each.names for each in layer.values()] for layer in layers][1] == [
        ("blk.1.attn_qkv.weight",), ("blk.1.attn_output.weight",), ("blk.1.ffn_up.weight",), ("blk.1.ffn_down.weight",),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY", b"x" * 999])
def test_unfinished_work_that_cannot_be_read_is_named(
    damage: bytes, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source.parent / "cal.gguf.streams").write_bytes(damage)
    words = ("calibrate", source, "-o", source.parent / "cal.gguf", "--tokens", source.parent / "tokens.npy")
    assert cli(*words, "--covariance") == 1
    assert "cal.gguf.streams" in capsys.readouterr().err


def test_the_calibration_is_not_replaced_by_the_target(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source)
    before = digests(made)
    words = ("--to", "gguf", "--type", "q4_0", "--calibration", made, "--overwrite")
    assert cli("convert", source, made, *words) == 1
    assert "which is read" in capsys.readouterr().err and digests(made) == before


def test_another_models_calibration_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = calibration(source)
    other = toy(tmp_path / "other", hidden=128, layers=3)
    assert cli("convert", other, tmp_path / "m.gguf", "--to", "gguf", "--type", "q4_0", "--calibration", made) == 1
    assert "the matrix is another model's" in capsys.readouterr().err


def test_what_it_takes_is_told_beforehand(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source)
    assert "of memory" in capsys.readouterr().err
    taken = sum(64 * 65 // 2 * 3 + 256 * 257 // 2 for _ in range(3)) * 4 + 64 * 65 // 2 * 4
    assert taken < made.stat().st_size < taken + 60_000


def with_outputs(source: Path) -> Path:
    """A calibration by which rows too are chosen together."""
    return calibration(source, "both.gguf", "--outputs")


def test_outputs_are_in_the_order_of_a_gguf_files_rows(source: Path) -> None:
    found = outputs_in(with_outputs(source))
    expected: dict[str, np.ndarray] = {}
    squares_of_gradients(open_checkpoint(source), TOKENS, outputs=expected.__setitem__)
    assert len(found) == len(expected) == 12
    apart = np.arange(192).reshape(-1, 3, HEAD).transpose(1, 0, 2).ravel()  # per head q, k, v -> all q, k, v
    assert apart[1] == 1 and apart[HEAD] != HEAD
    for layer in range(3):
        square = expected[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
        assert np.array_equal(found[f"blk.{layer}.attn_qkv.weight"].read(), square[apart][:, apart])
        square = expected[f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight"]
        assert np.array_equal(found[f"blk.{layer}.ffn_down.weight"].read(), square)


def test_a_file_of_rows_chosen_together_is_verified(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = with_outputs(source)
    target = converted(source, made)
    first = digests(target)
    assert first != digests(converted(source, calibration(source)))
    assert digests(converted(source, made, "--jobs", "1")) == digests(converted(source, made, "--jobs", "3")) == first
    assert cli("verify", source, target, "--calibration", made) == 0
    change(target, "blk.1.attn_qkv.weight", 70 * 36 + 2 + 5)
    capsys.readouterr()
    assert cli("verify", source, target, "--calibration", made) == 3
    assert "layers.1.attention.query_key_value.weight" in capsys.readouterr().out


def test_a_plan_tells_the_memory_of_a_whole_matrix(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = make_plan(open_checkpoint(source), Recipe("gguf", type="Q4_0", calibration=with_outputs(source))).steps
    kept = {step.entry.name: step.entry.kept for step in entries}
    assert kept["blk.0.ffn_up.weight"] == 8 * (64**2 + 256**2) + 36 * 64 * 256


def test_outputs_that_are_damaged_or_missing_are_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = with_outputs(source)
    whole = made.read_bytes()
    made.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    words = ("--to", "gguf", "--type", "f16", "--tensor-type", "blk.*weight=q4_0", "--calibration", made)
    assert cli("convert", source, source.parent / "m.gguf", *words) == 1
    assert "the outputs of blk.2.ffn_down.weight are damaged" in capsys.readouterr().err
    made.write_bytes(whole.replace(b"blk.2.ffn_down.weight.outputs", b"blk.2.ffn_down.weight.outputz"))
    assert cli("convert", source, source.parent / "m.gguf", *words) == 1
    assert "the outputs of blk.2.ffn_down.weight are missing" in capsys.readouterr().err


def stored(files: list[Path]) -> dict[str, bytes]:
    """The bytes of every tensor of GGUF files, by name."""
    import gguf

    return {tensor.name: tensor.data.tobytes() for file in files for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_matrices_with_the_same_inputs_share_factors_whatever_the_jobs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neoxconv.quant.feedback import shared
    from tests.little_llamas import little_llama
    from tests.oracles import program
    from tests.relatives import random_model, saved

    if family == "gptj":
        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": 320}
        model = random_model(program("transformers").GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0))
        source = saved(model, tmp_path / "hf")
    else:
        source = little_llama(tmp_path / "hf")
    np.save(tmp_path / "tokens.npy", TOKENS % 300)
    calibrated = ("calibrate", source, "-o", tmp_path / "cal.gguf", "--tokens", tmp_path / "tokens.npy", "--covariance")
    assert cli(*calibrated) == 0
    made: list[str] = []
    factors_of = shared.factors_of
    monkeypatch.setattr(shared, "factors_of", lambda moments, name: (made.append(name), factors_of(moments, name))[1])
    words = ("--to", "gguf", "--type", "q5_0", "--pure", "--calibration", tmp_path / "cal.gguf")
    assert cli("convert", source, tmp_path / "1.gguf", *words, "--jobs", "1") == 0
    found = moments_in(tmp_path / "cal.gguf")
    assert len(made) == len({each.digest for each in found.values()}) < len(found) or family == "gptj"
    gc.collect()  # of what an error of an earlier test may still hold
    assert shared.SHARED.last is None and not shared.SHARED.used
    assert cli("convert", source, tmp_path / "8.gguf", *words, "--jobs", "8") == 0
    assert digests(tmp_path / "8.gguf") == digests(tmp_path / "1.gguf")
    assert cli("convert", source, tmp_path / "split.gguf", *words, "--split-size", "30KB") == 0
    split = sorted((tmp_path / "split.gguf").glob("*.gguf"))
    assert len(split) > 1 and stored(split) == stored([tmp_path / "1.gguf"])
    assert cli("verify", source, tmp_path / "1.gguf", "--calibration", tmp_path / "cal.gguf") == 0

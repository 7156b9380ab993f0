"""`calibrate`: importances are the mean squares of what transformers multiplies each matrix with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.cli.main import main
from neoxconv.formats import imatrix
from neoxconv.verify.logits.importance import calibrate
from tests.fixtures import fixture
from tests.little_llamas import little_llama
from tests.oracles import llama_quantize
from tests.toy import toy

# transformers' modules, by the GGUF name of what they multiply with.
LINEAR = {
    "query_key_value": "attn_qkv", "dense": "attn_output", "dense_h_to_4h": "ffn_up", "dense_4h_to_h": "ffn_down",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.parametrize(("make", "matrices"), [
    (lambda folder: toy(folder, hidden=64), 8), (lambda folder: little_llama(folder / "hf"), 14),
], ids=["neox", "llama"])  # fmt: skip
def test_importances_are_what_transformers_multiplies_with(
    make: Callable[[Path], Path], matrices: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    checkpoint = open_checkpoint(make(tmp_path))
    tokens = np.arange(96, dtype=np.int64).reshape(3, 32) * 5 % 512
    folder = run(make_plan(checkpoint, Recipe("hf", dtype="F32")), tmp_path / "f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected: dict[str, np.ndarray] = {}

    def hook(name: str) -> object:
        def seen(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            expected[name] = inputs[0].double().square().sum((0, 1)).numpy()

        return seen

    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in LINEAR and "layers" in parts:
            module.register_forward_pre_hook(hook(f"blk.{parts[2]}.{LINEAR[parts[-1]]}.weight"))
    with torch.inference_mode():
        model(torch.from_numpy(tokens))
    found = calibrate(checkpoint, tokens)
    assert set(found) == set(expected) and len(found) == matrices
    for name, sums in found.items():
        assert np.allclose(sums, expected[name], rtol=1e-4), name


def test_a_matrix_is_made_read_used_and_accepted_by_llama_quantize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fixture("trained_tp2_pp4/checkpoints")
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text() * 2)
    matrix = tmp_path / "imatrix.gguf"
    command = ["calibrate", str(source), "--text", str(text), "-o", str(matrix), "--length", "128", "--sequences", "6"]
    assert main(command) == 0
    assert "importances of 32 tensors from 768 tokens of text.txt" in capsys.readouterr().out
    first = matrix.read_bytes()
    assert main(command) == 1 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and matrix.read_bytes() == first
    read = imatrix.read(matrix)
    assert len(read.entries) == 32 and read.chunks == 6
    checkpoint = open_checkpoint(source)
    ours = run(make_plan(checkpoint, Recipe("gguf", type="Q3_K_M", imatrix=matrix)), tmp_path / "ours.gguf")
    assert verify_weights(checkpoint, open_checkpoint(ours)).passed
    f16 = run(make_plan(checkpoint, Recipe("gguf", type="F16")), tmp_path / "f16.gguf")
    llama_quantize(f16, tmp_path / "theirs.gguf", "Q3_K_M", imatrix=read.entries)


@pytest.mark.oracle
def test_llama_quantize_uses_a_matrix_of_separate_queries_keys_and_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    source, matrix = little_llama(tmp_path / "hf", hidden_size=256, intermediate_size=256), tmp_path / "m.gguf"
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 512, (8, 64)))
    assert main(["calibrate", str(source), "--tokens", str(tmp_path / "ids.npy"), "-o", str(matrix)]) == 0
    entries, checkpoint = imatrix.read(matrix).entries, open_checkpoint(source)
    plan = make_plan(checkpoint, Recipe("gguf", type="Q4_K_M", imatrix=matrix))
    assert verify_weights(checkpoint, open_checkpoint(run(plan, tmp_path / "ours.gguf"))).passed
    f16 = run(make_plan(checkpoint, Recipe("gguf", type="F16")), tmp_path / "f16.gguf")
    llama_quantize(f16, tmp_path / "with.gguf", "Q4_K_M", imatrix=entries)
    llama_quantize(f16, tmp_path / "without.gguf", "Q4_K_M")
    ours, used, unused = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "with", "without")
    )
    assert {name: t.tensor_type for name, t in ours.items()} == {name: t.tensor_type for name, t in used.items()}
    for name in entries:
        assert used[name].data.tobytes() != unused[name].data.tobytes(), name


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--text", "{folder}/short.txt"], 1, "at least 2 are needed"),
    (["--text", "{folder}/bytes"], 1, "is not UTF-8 text"),
])  # fmt: skip
def test_wrong_input_is_told(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    options = [word.format(folder=tmp_path) for word in words]
    assert main(["calibrate", str(toy(tmp_path)), "-o", str(tmp_path / "m.gguf"), *options]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "m.gguf").exists()


def test_nothing_that_is_read_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tokens = toy(tmp_path), tmp_path / "ids.npy"
    np.save(tokens, np.arange(16).reshape(2, 8))
    for output in (source / "m.gguf", tokens):
        command = ["calibrate", str(source), "--tokens", str(tokens), "-o", str(output), "--overwrite"]
        assert main(command) == 1 and "which is read" in capsys.readouterr().err
    assert np.load(tokens).shape == (2, 8)

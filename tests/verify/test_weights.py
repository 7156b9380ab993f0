"""Verification finds what is wrong in every type, and a manifest that was tampered with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes, verify_weights
from neoxconv.cli.main import main
from neoxconv.core.tensor import LazyTensor, in_memory
from neoxconv.dtypes import Bytes
from neoxconv.errors import CheckpointError
from neoxconv.quant import ENCODINGS
from neoxconv.verify.weights import _Pair, compare
from tests.fixtures import fixture
from tests.golden.make_blocks import ggml_encode
from tests.oracles import ggml_library
from tests.toy import toy


def made(source: Path, target: Path, **recipe: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe(**recipe)), target)


def test_sums_are_those_that_sha256sum_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    for name, single in (("hf", False), ("safetensors", True)):
        target = made(source, tmp_path / "made" / name, format=name)
        assert main(["verify", str(target), "--sha256sums"]) == 0
        told = dict(line.split("  ")[::-1] for line in capsys.readouterr().out.splitlines())
        files = [target] if single else [path for path in target.rglob("*") if path.is_file()]
        assert told == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert main(["verify", str(source), str(target), "--sha256sums"]) == 2
    assert main(["verify", str(tmp_path / "none"), "--sha256sums"]) == 1


def test_float64_is_compared_exactly(tmp_path: Path) -> None:
    source = toy(tmp_path)
    folder = made(source, tmp_path / "hf", format="hf", dtype="F32")
    tensors = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify_weights(open_checkpoint(source), open_checkpoint(folder)).passed
    tensors["gpt_neox.embed_in.weight"][3, 4] *= 1.001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    [finding] = verify_weights(open_checkpoint(source), open_checkpoint(folder)).findings
    assert "1 of" in finding.what and "[3, 4]" in finding.what


def test_vectors_in_gguf_are_compared_as_float32(tmp_path: Path) -> None:
    source = toy(tmp_path)
    file = made(source, tmp_path / "x.gguf", format="gguf", type="F16")
    manifest = json.loads(file.with_name("x.gguf.manifest.json").read_text())
    [place] = [r for f in manifest["files"] for r in f["ranges"] if r["name"] == "blk.0.attn_output.bias"]
    values = np.fromfile(file, np.float32, place["bytes"] // 4, offset=place["offset"]) * np.float32(1.0001)
    with open(file, "r+b") as stream:
        stream.seek(place["offset"])
        stream.write(values.tobytes())
    [finding] = verify_weights(open_checkpoint(source), open_checkpoint(file)).findings
    assert finding.where == "gpt_neox.layers.0.attention.dense.bias" and "as F32" in finding.what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q2_K", "Q4_K_M"])
def test_types_that_are_only_read_are_told_from_other_weights(name: str, tmp_path: Path) -> None:
    source = fixture("trained_tp2_pp4/checkpoints")
    original = fixture(f"trained_tp2_pp4/llama_quantize/{name}.gguf")
    file = tmp_path / "x.gguf"
    data = bytearray(original.read_bytes())
    wanted = ("attn_qkv.weight", "ffn_up.weight", "ffn_down.weight", "output.weight", "token_embd.weight")

    def found() -> set[str]:
        file.write_bytes(data)
        report = verify_weights(open_checkpoint(source), open_checkpoint(file))
        return {finding.where for finding in report.findings if "_K" in finding.what}

    assert not found()
    from gguf import GGUFReader

    tensor = next(t for t in GGUFReader(original).tensors if t.name.endswith(wanted) and "K" in t.tensor_type.name)
    start, count = int(tensor.data_offset), int(tensor.n_bytes)
    half = count // 2
    data[start : start + count] = data[start + half : start + count] + data[start : start + half]
    assert len(found()) == 1


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda file: file.__setitem__(key, value)


TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no ranges": put("ranges", []),
    "a gap": lambda file: file["ranges"].pop(1),
    "before the file": lambda file: file["ranges"][0].update(offset=-1),
    "no name": put("name", None),
    "size in words": put("bytes", "many"),
    "digest of nothing": put("sha256", 7),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_manifest_that_was_tampered_with_proves_nothing(change: str, tmp_path: Path) -> None:
    folder = made(toy(tmp_path), tmp_path / "hf", format="hf")
    manifest = json.loads((folder / "manifest.json").read_text())
    TAMPERED[change](manifest["files"][0])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest"):
        verify_bytes(folder)


def test_a_hint_of_every_kind_of_nonsense_is_skipped(tmp_path: Path) -> None:
    source, target = toy(tmp_path), tmp_path / "x.safetensors"
    whole = made(source, tmp_path / "whole.safetensors", format="safetensors")
    calls: list[int] = []

    def cut(count: int) -> None:
        calls.append(count)
        if len(calls) > 9:
            raise KeyboardInterrupt

    plan = make_plan(open_checkpoint(source), Recipe("safetensors"))
    with pytest.raises(KeyboardInterrupt):
        run(plan, target, progress=cut, jobs=1)
    journal = tmp_path / "x.safetensors.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    lines[2] = lines[2].replace('"crc32": 0', '"crc32": null')
    journal.write_text("\n".join([*lines, "[]", "{", '{"step": 1, "sha256": [], "crc32": 0}']) + os.linesep)
    assert run(plan, target).read_bytes() == whole.read_bytes()


def test_what_ggmls_own_encoder_got_wrong_is_no_finding_and_exchanged_rows_are() -> None:
    """Of IQ2_XXS it keeps some entries that are not the nearest for the scale that it ends with."""
    encoding, random = ENCODINGS["IQ2_XXS"], np.random.default_rng(1000)
    rows = (random.standard_normal((192, 1024)) * 0.02).astype(np.float32)
    spiky = np.where(random.random(1024) < 0.02, 100, 1).astype(np.float32)
    stored = ggml_encode(ggml_library(), encoding.name, rows, spiky)

    def found(data: Bytes) -> bool:
        target = LazyTensor(rows.shape, encoding.dtype, lambda start, stop: data[start:stop], encoding.dtype)
        return compare(_Pair("x", in_memory(rows), target, joined=False, weighted=True), lambda _: None)[1] is not None

    assert not found(stored)
    assert found(np.ascontiguousarray(stored[::-1]))

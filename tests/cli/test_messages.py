"""What a user reads: no traceback, no advice that cannot be followed, nothing destroyed, the file named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv.cli.main import main
from neoxconv.errors import CheckpointError
from neoxconv.quant import decode_any
from tests.toy import toy

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command line; its exit code, and all that it printed."""

    def run(*words: object) -> tuple[int, str]:
        code = main([str(word) for word in words])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return toy(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, source: Path, said: Said) -> Path:
    """A Hugging Face folder made from `source`."""
    assert said("convert", source, tmp_path / "hf", "--to", "hf")[0] == 0
    return tmp_path / "hf"


def test_a_device_is_no_source(said: Said) -> None:
    assert said("inspect", "/dev/null") == (
        1,
        "neoxconv: /dev/null: is neither a file nor a folder; give a checkpoint.\n",
    )


@pytest.mark.parametrize("command", ["convert", "calibrate", "verify"])
def test_a_pipe_is_not_replaced(command: str, tmp_path: Path, source: Path, folder: Path, said: Said) -> None:
    """As root a rename would put a file in the place of /dev/null."""
    pipe, text = tmp_path / "pipe", tmp_path / "text"
    os.mkfifo(pipe)
    text.write_text("hello there")
    words = {
        "convert": (source, pipe, "--to", "gguf", "--overwrite"),
        "calibrate": (source, "-o", pipe, "--text", text, "--overwrite"),
        "verify": (source, folder, "--level", "logits", "--html", pipe),
    }
    code, told = said(command, *words[command])
    assert code == 1 and f"{pipe}: is a device or a pipe, which cannot be replaced" in told
    assert pipe.is_fifo()


def test_the_root_is_no_target(source: Path, said: Said) -> None:
    code, told = said("convert", source, "/", "--to", "hf")
    assert code == 1 and "/: is no place for a target" in told


def test_a_configuration_is_not_ignored(tmp_path: Path, folder: Path, said: Said) -> None:
    code, told = said("inspect", folder, "--config", tmp_path / "absent.yml")
    assert code == 2 and f"--config is for gpt-neox checkpoints; {folder} has its own settings" in told


def test_another_models_preset_is_told(source: Path, folder: Path, said: Said) -> None:
    for path in (source, folder):
        code, told = said("inspect", path, "--preset", "20B")
        assert code == 1 and "--preset 20B: has hidden size 6144" in told and len(told.splitlines()) == 1


def test_a_preset_of_other_depth_is_not_the_yamls_fault(tmp_path: Path, said: Said) -> None:
    code, told = said("inspect", toy(tmp_path, hidden=2048, heads=8, rows=512, tp=1), "--preset", "pythia-1b")
    assert code == 1 and "global_step10: the configuration says 16 layers" in told and "model.yml" not in told


def test_advice_for_a_folder_can_be_followed(folder: Path, said: Said) -> None:
    (folder / "config.json").rename(folder / "config.old")
    code, told = said("inspect", folder)
    assert code == 1 and "Put its config.json beside it" in told and "--config" not in told


def test_a_missing_tensor_of_gguf_has_its_own_name(tmp_path: Path, source: Path, said: Said) -> None:
    target = tmp_path / "a.gguf"
    assert said("convert", source, target, "--to", "gguf")[0] == 0
    whole = target.read_bytes()
    target.write_bytes(whole.replace(b"blk.1.attn_norm.bias", b"blx.1.attn_norm.bias", 1))
    told = said("inspect", target)[1]
    assert f"{target}: blk.1.attn_norm.bias (gpt_neox.layers.1.input_layernorm.bias) is missing" in told
    target.write_bytes(whole.replace(b"gptneox.block_count", b"gptneox.block_counx", 1))
    assert f"{target}: gptneox.block_count is missing" in said("inspect", target)[1]
    target.write_bytes(whole.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.xodel", 1))
    told = said("convert", target, tmp_path / "b", "--to", "hf")
    assert told[0] == 0 and f"left out: {target}: tokenizer None of kind 'olmo'" in told[1]


def test_a_file_shorter_than_its_length_field(folder: Path, said: Said) -> None:
    os.truncate(folder / "model.safetensors", 5)
    assert "is cut short: it has 5 bytes; download it again." in said("inspect", folder)[1]


def test_what_keeps_a_target_shut_is_told_line_by_line(folder: Path, source: Path, said: Said) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    code, told = said("verify", source, folder)
    assert code == 3 and "\\n" not in told
    assert f"    {folder}/model.safetensors: gpt_neox.layers.2.attention.dense.bias is missing" in told


def test_values_that_are_not_finite_are_the_sources(tmp_path: Path, source: Path, said: Said) -> None:
    path = source / "global_step10/layer_02-model_00-model_states.pt"
    tensors = torch.load(path, weights_only=True)
    tensors["attention.dense.bias"].fill_(float("nan"))
    torch.save(tensors, path)
    code, told = said("convert", source, tmp_path / "a.gguf", "--to", "gguf")
    assert code == 1 and f"{path.parent}: gpt_neox.layers.0.attention.dense.bias has 64 values" in told


@pytest.mark.parametrize("kind", ["text", "huge", "archive", "broken archive"])
def test_a_file_of_no_token_ids(kind: str, tmp_path: Path, source: Path, said: Said) -> None:
    path = tmp_path / "ids.npy"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999, 9), }".ljust(117) + b"\n"
    if kind == "archive":
        with open(path, "wb") as stream:
            np.savez(stream, ids=np.ones(3, int))
    else:
        huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        path.write_bytes({"text": b"hello", "huge": huge, "broken archive": b"PK\x03\x04" + bytes(40)}[kind])
    code, told = said("calibrate", source, "-o", tmp_path / "i.gguf", "--tokens", path)
    assert (code, told) == (1, f"neoxconv: {path}: is no .npy file of token ids; make one with numpy.save.\n")


def test_a_limit_is_a_number(source: Path, folder: Path, said: Said) -> None:
    for wrong in ("nan", "-1", "x"):
        code, told = said("verify", source, folder, "--level", "logits", "--max-kl", wrong)
        assert code == 2 and f"'{wrong}' is no number from 0 on" in told


def test_digests_take_no_other_options(folder: Path, said: Said) -> None:
    for words in (("--json",), ("--level", "bytes"), ("--text", "absent")):
        assert said("verify", "--sha256sums", folder, *words)[0] == 2


def test_a_closed_stderr_stops_no_conversion(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, "-m", "neoxconv", "convert", str(source), str(tmp_path / "out"), "--to", "hf"]
    subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], check=True, timeout=120)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_ctrl_c_during_the_imports_leaves_no_traceback() -> None:
    script = """
import runpy, sys

class Stop:
    def find_spec(self, name, *rest):
        if name == "neoxconv.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
runpy.run_module("neoxconv", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "neoxconv: stopped.\n")


def test_gguf_decodes_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    try:
        decode_any("MXFP4", np.full((1, 17), 255, np.uint8))
    except CheckpointError:
        pytest.skip("this gguf does not know the type")
    assert not recwarn.list

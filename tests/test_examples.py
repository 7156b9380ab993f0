"""Every example runs as a reader would run it, and does what its first line says."""

from __future__ import annotations

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import program, transformers_logits
from tests.toy import toy

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """What an example printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def example(name: str, *words: object) -> Done:
    """Run an example as a script; here, since most of a process of its own would be imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {
        "to_hf",
        "to_gguf",
        "to_ctranslate2",
        "to_mlx",
        "quantized",
        "check",
    }


@pytest.mark.parametrize("tp", [1, 4])
def test_to_hf_makes_a_folder_that_transformers_loads_and_check_accepts(tp: int, tmp_path: Path) -> None:
    source, target = toy(tmp_path, tp=tp), tmp_path / "hf"
    done = example("to_hf", source, target)
    assert done.returncode == 0 and "bytes in" in done.stdout, done.stderr
    assert np.isfinite(transformers_logits(target, np.arange(32).reshape(1, 32))).all()
    checked = example("check", source, target, "fold")
    assert checked.returncode == 0 and checked.stdout.count(": ok") == 2, checked.stdout + checked.stderr


def test_to_gguf_tells_how_far_it_is_and_check_accepts_it(tmp_path: Path) -> None:
    source, target = toy(tmp_path), tmp_path / "x.gguf"
    done = example("to_gguf", source, target, "Q8_0")
    assert done.returncode == 0 and done.stderr.split()[-4] == "100%", done.stderr
    assert example("check", source, target).returncode == 0


def test_quantized_makes_folders_that_transformers_loads_and_runs(tmp_path: Path) -> None:
    for name in ("transformers", "bitsandbytes", "compressed_tensors"):
        program(name)
    done = example("quantized", toy(tmp_path), tmp_path / "made")
    assert done.returncode == 0 and done.stdout.count("bytes on disk") == 5, done.stderr


def test_to_ctranslate2_makes_a_folder_that_ctranslate2_goes_on_from(tmp_path: Path) -> None:
    program("ctranslate2")
    source, target = toy(tmp_path), tmp_path / "made"
    done = example("to_ctranslate2", source, target)
    assert done.returncode == 0 and "largest logit" in done.stdout, done.stderr
    assert example("check", source, target).returncode == 0


def test_to_mlx_makes_a_folder_that_check_accepts_and_mlx_runs(tmp_path: Path) -> None:
    source, target = toy(tmp_path), tmp_path / "mlx"
    done = example("to_mlx", source, target)
    assert done.returncode == 0 and "bytes" in done.stdout, done.stderr
    assert example("check", source, target).returncode == 0


def test_check_names_what_differs(tmp_path: Path) -> None:
    source, target = toy(tmp_path), tmp_path / "hf"
    assert example("to_hf", source, target).returncode == 0
    wrong_norms = example("check", source, target, "rank0")
    assert wrong_norms.returncode == 3 and "bytes" in wrong_norms.stdout and "layernorm" in wrong_norms.stdout
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-200] ^= 0x40
    file.write_bytes(data)
    flipped = example("check", source, target, "fold")
    assert flipped.returncode == 3 and flipped.stdout.count("differs") >= 2

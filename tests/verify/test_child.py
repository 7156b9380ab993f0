"""Programs of somebody else's run a target in a process of their own: whatever becomes of them, ours goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.errors import VerifyError
from neoxconv.verify.engines import serve
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.compare import compare_predictions
from neoxconv.verify.logits.trial import Engine
from neoxconv.verify.tasks import exam
from tests.toy import toy

# A package llama_cpp of ours, which does a deed where the real one loads a model.
FAKE = """
import os, signal, sys, time
from types import SimpleNamespace

def llama_model_default_params():
    return SimpleNamespace()

def llama_model_load_from_file(path, settings):
    print("noise on stdout", flush=True)
    print("GGML_ASSERT(false) failed\\n", file=sys.stderr, flush=True)
    {deed}
"""
DEEDS = {
    "os.kill(os.getpid(), signal.SIGILL)": "llama.cpp died of SIGILL; its build may be for another processor",
    "os.kill(os.getpid(), signal.SIGSEGV)": "llama.cpp died of SIGSEGV; it said last: GGML_ASSERT(false) failed",
    "os.kill(os.getpid(), signal.SIGKILL)": "llama.cpp died of SIGKILL; memory may have run out",
    "os.kill(os.getpid(), signal.SIGTERM)": "llama.cpp died of SIGTERM; it said last: GGML_ASSERT(false) failed",
    "os._exit(7)": "llama.cpp ended by itself with exit code 7; it said last: GGML_ASSERT(false) failed",
    "sys.exit('no')": "llama.cpp ended by itself with exit code 1; it said last: no",
    "raise RuntimeError('no room')": "llama.cpp cannot run it (RuntimeError: no room); leave --engine out",
    "return None": "llama.cpp cannot load it; see why with llama.cpp's own tools",
}
Faked = Callable[[str], Path]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A source and a GGUF file made of it."""
    source = toy(tmp_path)
    return source, run(make_plan(open_checkpoint(source), Recipe("gguf", type="F16")), tmp_path / "model.gguf")


@pytest.fixture
def faked(tmp_path: Path) -> Faked:
    """A folder with a package llama_cpp that does a deed."""

    def make(deed: str) -> Path:
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "llama_cpp.py").write_text(FAKE.format(deed=deed))
        return folder

    return make


def command(source: Path, target: Path, *more: str) -> list[str]:
    return ["verify", str(source), str(target), "--level", "logits", "--length", "32", *more]


@pytest.mark.parametrize("deed", DEEDS)
def test_its_death_is_a_line_and_the_other_verdicts_stand(
    deed: str,
    files: tuple[Path, Path],
    faked: Faked,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(faked(deed))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    refused = "cannot load" in DEEDS[deed]  # which is a verdict on the target; else the level could not be carried out
    assert main(command(*files, "--engine", "llama.cpp")) == (3 if refused else 1)
    told = capfd.readouterr()
    assert f"{files[1]}: {DEEDS[deed]}" in (told.out if refused else told.err)
    assert len(told.err.splitlines()) == (0 if refused else 1)
    assert told.out.splitlines()[-1].endswith("bytes ok, weights ok, tokenizer ok, logits not checked")
    assert "noise" not in told.out
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(("name", "package"), [("llama_cpp", "llama-cpp-python"), ("torch", "torch")])
def test_a_package_that_is_not_there_is_told_as_such(
    name: str,
    package: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, (source, target), engine = tmp_path / "fake", files, "llama.cpp"
    folder.mkdir()
    (folder / f"{name}.py").write_text("raise ImportError")
    if name == "torch":
        pytest.importorskip("transformers")
        target, engine = run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "hf"), "transformers"
    monkeypatch.syspath_prepend(folder)
    assert main(command(source, target, "--engine", engine)) == 1
    assert (
        f"{package} is not installed; pip install {package}, name a Python that has it with --engine-python, or "
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(("number", "code"), [
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    (signal.SIGKILL, -9),
])  # fmt: skip
def test_it_ends_with_ours(
    number: signal.Signals, code: int, files: tuple[Path, Path], faked: Faked, tmp_path: Path
) -> None:
    """The signal goes to our process alone; from a keyboard Ctrl-C would reach both."""
    note = tmp_path / "pid"
    deed = f"open({str(note)!r}, 'w').write(str(os.getpid())); os.rename({str(note)!r}, {str(note) + 's'!r}); "
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(faked(deed + "time.sleep(600)")), *sys.path])}
    words = [sys.executable, "-m", "neoxconv", *command(*files, "--engine", "llama.cpp")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pid = int(wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text()))
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code and b"Traceback" not in error
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())


def wait_for(found: Callable[[], object], seconds: float = 60) -> str:
    """What `found` returns once that is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)
    return str(value)


def test_a_file_of_logits_is_written_by_the_sequence(tmp_path: Path) -> None:
    tokens = np.arange(12).reshape(3, 4)
    sizes: list[int] = []

    def made(row: np.ndarray) -> np.ndarray:
        sizes.append((tmp_path / "a.npy").stat().st_size)
        return np.asfortranarray(np.outer(row, np.arange(5000.0)), np.float64)

    serve.run_all(made, tokens, tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), tokens[..., None] * np.arange(5000, dtype=np.float32))
    assert sizes[2] > 4 * 4 * 5000


def test_a_full_disk_is_told_with_what_to_do() -> None:
    with pytest.raises(
        VerifyError, match=r"/dev/full: has no room for 1 x 4 tokens' logits .*; name a folder .*TMPDIR"
    ):
        serve.run_all(lambda row: np.zeros((4, 5000), np.float32), np.zeros((1, 4), np.int64), Path("/dev/full"))


def test_a_python_that_is_none_is_told_as_such(files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    words = command(*files, "--engine", "llama.cpp", "--engine-python")
    assert main([*words, "/nowhere/python"]) == 1
    assert "--engine-python /nowhere/python: cannot be run (No such file or directory); give" in capfd.readouterr().err
    assert main([*command(*files), "--engine-python", sys.executable]) == 2


def test_another_python_has_its_own_modules(
    files: tuple[Path, Path], faked: Faked, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of this process's it gets neoxconv's files alone."""
    deed = "raise RuntimeError(sorted({'torch', 'click', 'neoxconv'} & {*sys.modules}), sys.flags.optimize)"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={faked(deed)} exec {sys.executable} -O "$@"\n')
    python.chmod(0o755)
    assert main(command(*files, "--engine", "llama.cpp", "--engine-python", str(python))) == 1
    assert "llama.cpp cannot run it (RuntimeError: (['neoxconv'], 1)); leave" in capfd.readouterr().err


# --- the real ones ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_is_asked_twice_and_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    source = open_checkpoint(toy(tmp_path, norm_noise=0.0))
    target = run(make_plan(source, Recipe("hf", dtype="F32")), tmp_path / "hf")
    made, tokens = open_checkpoint(target), np.arange(96, dtype=np.int64).reshape(2, 2, 24) * 7 % 512
    with program(Engine("transformers"), target, made) as ask:
        first = ask(tokens[0])
        (target / "config.json").rename(tmp_path / "away")  # it cannot be loaded again
        second = ask(tokens[1])
    for some, logits in zip(tokens, (first, second), strict=True):  # the second answer did not touch the first
        found = compare_predictions(source, made, some, engine="transformers", logits=logits)
        assert found.figures.mean < 1e-9 and not found.layers


@pytest.mark.slow
def test_transformers_sits_the_exam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    source = toy(tmp_path)
    target = run(make_plan(open_checkpoint(source), Recipe("hf", dtype="F32")), tmp_path / "hf")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"It is what it {word}"}) for word in ("is", "was", "does")))
    monkeypatch.setattr(exam, "TOGETHER", 1)  # a band for each question
    words = command(source, target, "--engine", "transformers", "--task", "lambada", "--data", str(data), "--json")
    assert main(words) == 0
    level = json.loads(capsys.readouterr().out)["levels"][-1]
    ours, theirs = level["task"]["scores"].values()
    assert level["engine"] == "transformers" and ours["questions"] == 3
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)

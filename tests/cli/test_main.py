"""The command line as a user meets it: what it prints, what it asks for, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neoxconv import __version__
from neoxconv.cli.verify import open_target
from neoxconv.engine import publish, steps
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import read_manifest
from neoxconv.errors import PlanError
from neoxconv.formats import hf
from neoxconv.names import FORMATS
from neoxconv.targets import TAKEN_BY
from tests.fixtures import fixture
from tests.helpers import cli, digests, writable_copy

ROOT = Path(__file__).parents[2]
VALUES = {"type": ["q8_0"], "dtype": ["f32"], "tp": ["1"], "pp": ["1"], "current_names": [], "only": ["a"],
          "shard_size": ["1MB"], "split_size": ["1MB"], "pure": [],
          "mix": ["classic"], "output_type": ["f16"], "embedding_type": ["f16"], "tensor_type": ["a=f16"],
          "imatrix": ["m.gguf"], "calibration": ["c.gguf"],
          "bits": ["4"], "size": ["1MB"], "types": ["q4_k"], "effort": ["high"], "double_quant": [],
          "compute_dtype": ["f16"],
          "scale": ["none"], "group": ["64"], "asymmetric": [], "allow_other_tokens": [], "as_family": ["gpt2"],
          "allow_nonfinite": [], "metadata": ["m.json"], "set": ["a.b=c"], "card": []}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return writable_copy(tmp_path)


@pytest.mark.parametrize(
    ("option", "format"), [(o, f) for o, formats in TAKEN_BY.items() for f in FORMATS if f not in formats]
)
def test_an_option_of_another_format_is_a_usage_error(
    option: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--as" if option == "as_family" else f"--{option.replace('_', '-')}"
    words = ("convert", "here", "there", "--to", format, flag, *VALUES[option])
    assert cli(*words) == 2
    assert f"{flag} is for {', '.join(TAKEN_BY[option])}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("convert a b", "--to"),
        ("convert a b --to onnx", "onnx"),
        ("convert a b --to gguf --type Q9", "Q9"),
        ("convert a b --to hf --shard-size big", "no size"),
        ("convert a b --to hf --shard-size 0", "no size"),
        ("convert a b --to slim --dtype f32", "slim takes F16 or BF16"),
        ("convert a b --to hf --config a.yml --preset 20B", "exclude each other"),
        ("convert a b --to bnb --type q8_0", "bnb, which has NF4, FP4, INT8"),
        ("convert a b --to gguf --type nf4", "--type NF4 is not for gguf"),
        ("convert a b --to float8 --type int8", "float8, which has E4M3, E5M2"),
        ("convert a b --to bnb --type int8 --double-quant", "--double-quant is for bnb's NF4 and FP4"),
        ("convert a b --to bnb --type int8 --compute-dtype f16", "--compute-dtype is for bnb's NF4 and FP4"),
        ("verify a b --level bytes --max-kl 1", "--max-kl is for --level logits"),
        ("verify a b b", "a TARGET is given twice"),
        ("verify a --level weights", "verify SRC TARGET"),
        ("verify a --level logits", "verify SRC TARGET"),
        ("verify a b --level layers", "is not one of"),
        ("verify a b --level logits --bisect --engine llama.cpp", "needs the native engine"),
        ("calibrate a -o b --text c --tokens d", "--text and --tokens exclude each other"),
        ("invent", "invent"),
    ],
)
def test_wrong_usage_is_explained(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*words.split()) == 2
    assert expected in capsys.readouterr().err


def test_names_are_taken_in_any_case(source: Path) -> None:
    target = source.parent / "x.gguf"
    assert cli("convert", source, target, "--to", "GGUF", "--type", "q8_0", "--norms", "MEAN", "--quiet") == 0
    assert cli("convert", source, source.parent / "y", "--to", "HF", "--dtype", "bf16", "--quiet") == 0


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from neoxconv.cli.main import main; main(['convert', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "numba", "gguf", "tokenizers", "transformers", "yaml", "tqdm"}
    assert "--dry-run" in done.stdout and not heavy & set(done.stdout.split())


def test_it_runs_from_a_checkout_and_as_a_module() -> None:
    for command in (["cli.py"], ["-m", "neoxconv"]):
        done = subprocess.run(
            [sys.executable, *command, "--version"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert __version__ in done.stdout


# --- what it prints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    format: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, target = digests(source.parent), source.parent / "out"
    assert cli("convert", source, target, "--to", format, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan) == ["bytes_total", "files", "peak_memory", "disk_free", "tokenizer", "notes"]
    assert plan["bytes_total"] == sum(file["bytes"] for file in plan["files"])
    assert cli("convert", source, target, "--to", format, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(f"{file['bytes']:,}" in shown for file in plan["files"]) and "free" in shown
    assert digests(source.parent) == before

    assert cli("convert", source, target, "--to", format, "--json") == 0
    done = capsys.readouterr()
    assert (
        list(json.loads(done.out)) == ["target", "bytes_total", "seconds", "notes", "overflow", "verified"]
        and not done.err
    )
    sizes = {name: (target / name).stat().st_size for name in digests(target)} if target.is_dir() else {}
    written = [sizes[file["name"]] for file in plan["files"]] if sizes else [target.stat().st_size]
    assert written == [file["bytes"] for file in plan["files"]]


def test_convert_tells_what_it_does_and_what_comes_next(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("convert", source, source.parent / "out", "--to", "hf") == 0
    done = capsys.readouterr()
    assert "differ by" in done.err and "TP 2" in done.err and "F16" in done.err
    assert len(done.out.splitlines()) == 1 and f"neoxconv verify {source} {source.parent / 'out'}" in done.out
    assert cli("convert", source, source.parent / "quiet", "--to", "hf", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_nothing_else_does(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli("convert", source, source.parent / "seen", "--to", "hf") == 0
    assert "converting: 100%" in capsys.readouterr().err
    for silent in ("--quiet", "--json"):
        assert cli("convert", source, source.parent / silent, "--to", "hf", silent) == 0
        assert not capsys.readouterr().err


def test_a_terminal_that_does_not_know_its_size_gets_a_bar_too(source: Path) -> None:
    reader, terminal = os.openpty()
    command = [sys.executable, "-m", "neoxconv", "convert", str(source), str(source.parent / "out"), "--to", "hf"]
    subprocess.run(command, stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal's output with EIO
        while data := os.read(reader, 1 << 16):
            shown += data
    os.close(reader)
    assert b"converting" in shown


def test_norms_without_effect_are_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim, single = source.parent / "slim", source.parent / "single"
    assert cli("convert", source, slim, "--to", "slim", "--norms", "fold") == 0
    assert "--norms fold does nothing here" in capsys.readouterr().err
    assert cli("convert", source, single, "--to", "slim", "--tp", 1) == 0
    assert "does nothing" not in capsys.readouterr().err
    assert cli("convert", single, source.parent / "hf", "--to", "hf", "--norms", "rank0") == 0
    assert "--norms rank0 does nothing here" in capsys.readouterr().err


def test_formats_lists_the_sizes_of_the_20b_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("formats", "--json") == 0
    sizes = {(row["format"], row["type"]): row["nbytes"] for row in json.loads(capsys.readouterr().out)}
    assert {format for format, _ in sizes} == set(FORMATS)
    assert sizes["hf", "F16"] == 2 * 20_554_567_680
    assert sizes["slim", "F16"] == 41_112_403_968  # the published set without containers and configs
    assert round(sizes["gguf", "Q8_0"] / 2**30, 2) == 20.35
    assert cli("formats") == 0
    assert "38.29" in capsys.readouterr().out


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_verify_says_which_levels_passed(format: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / f"out.{format}"
    assert cli("convert", source, target, "--to", format, "--norms", "fold", "--quiet") == 0
    assert cli("verify", target) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "PASS: bytes ok"
    assert cli("verify", source, target) == 0
    lines = capsys.readouterr().out.splitlines()
    beside = "" if format == "safetensors" else ", tokenizer ok"
    assert lines[-1] == f"PASS: bytes ok, weights ok{beside}" and any(
        "fold (from the manifest)" in line for line in lines
    )


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_verify_finds_a_flipped_byte(format: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / f"out.{format}"
    assert cli("convert", source, target, "--to", format, "--quiet") == 0
    file = target / "model.safetensors" if target.is_dir() else target
    data = bytearray(file.read_bytes())
    data[-200] ^= 0x40
    file.write_bytes(data)
    assert cli("verify", target) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: bytes differ"
    assert cli("verify", source, target, "--json") == 3
    outcome = json.loads(capsys.readouterr().out)
    assert [level["passed"] for level in outcome["levels"]] == [False, False, True] and not outcome["passed"]
    next(target.parent.rglob("*manifest.json")).unlink()
    assert cli("verify", source, target) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: weights differ, tokenizer ok"


def test_verify_reads_the_targets_headers_and_manifest_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.parent / "out"
    assert cli("convert", source, target, "--to", "hf", "--quiet") == 0
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(hf, "index", counted("index", hf.index))
    for module in ("cli.verify", "verify.bytes"):
        monkeypatch.setattr(f"neoxconv.{module}.read_manifest", counted("manifest", read_manifest))
    assert cli("verify", source, target, "--quiet") == 0
    assert sorted(calls) == ["index", "manifest"]
    calls.clear()
    assert cli("verify", target, "--quiet") == 0
    assert calls == ["manifest"]


def test_the_sources_preset_is_for_targets_without_settings_of_their_own(source: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    target, bare = source.parent / "out.safetensors", source.parent / "bare.safetensors"
    assert cli("convert", source, target, "--to", "safetensors", "--quiet") == 0
    assert open_target(target, "20B").config.hidden == 64
    safetensors.save_file(safetensors.load_file(target), bare)
    with pytest.raises(PlanError, match=r"--preset 20B: has hidden size 6144, but .*bare\.safetensors has 64"):
        open_target(bare, "20B")


def test_verify_of_another_model_says_so_in_a_line_or_two(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = fixture("neox_2026_bf16_tp2_pp2/checkpoints")
    assert cli("verify", source, other) == 3
    shown = capsys.readouterr().out
    assert "the models have other shapes" in shown and "hidden is 56 in the target and 64 in the source" in shown
    assert len(shown.splitlines()) < 15


def test_verify_without_a_manifest_says_what_to_do(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("verify", source) == 1
    assert "neoxconv verify SOURCE TARGET" in capsys.readouterr().err


# --- interruptions and surprises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_the_same_command_finishes(
    number: signal.Signals, code: int, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, target = source.parent / "whole", source.parent / "out"
    command = ("--to", "hf", "--jobs", "1", "--quiet")
    assert cli("convert", source, whole, *command) == 0
    write, calls, journal = steps.write_all, [], publish.partial_of(target) / Journal.NAME

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 9:
            end = time.monotonic() + 60
            while len(journal.read_text().splitlines()) < 2:  # another thread notes what is done
                assert time.monotonic() < end
                time.sleep(0.01)
            os.kill(os.getpid(), number)
        write(*arguments)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it deaf to it
    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_all", interrupted)
        assert cli("convert", source, target, *command) == code
    signal.signal(signal.SIGINT, before)
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not target.exists() and publish.partial_of(target).is_dir()
    assert cli("convert", source, target, *command[:-1]) == 0
    assert re.search(r"continues: [1-9]\d* of 76 tensors are done", capsys.readouterr().err)
    assert digests(target) == digests(whole) and not publish.partial_of(target).exists()


def test_a_surprise_is_one_line_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("neoxconv.cli.formats.catalog", surprise)
    assert cli("formats") == 1
    message = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in message and len(message.splitlines()) == 1 and "-v" in message
    for words in (("-v", "formats"), ("formats", "-v")):
        assert cli(*words) == 1
        assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "neoxconv", "formats"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_windows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(os, "preadv")
    assert cli("formats") == 1
    assert "Windows is not supported" in capsys.readouterr().err

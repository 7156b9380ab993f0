"""The command line as a user meets it: what it prints, its exit codes, and one clear message for each bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neoxconv import __version__, convert
from neoxconv.cli import main
from neoxconv.names import FORMATS
from neoxconv.request import ONLY_FOR
from tests.oracles import fixtures

NAME, STEP = "neox_2022_tp2_pp4", "global_step10"
ROOT = Path(__file__).parents[1]
VALUES = {"type": "q8_0", "dtype": "f32", "tp": "1", "shard_size": "1MB", "split_size": "1MB"}

Damage = Callable[[Path], Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A writable copy of a real checkpoint without optimizer states, its tokenizer beside it."""
    shutil.copytree(
        fixtures() / NAME / "checkpoints", tmp_path / "checkpoints", ignore=shutil.ignore_patterns("*zero*")
    )
    shutil.copy(fixtures() / NAME / "tiny_tokenizer.json", tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "checkpoints"


def cli(*words: object) -> int:
    return main([str(word) for word in words])


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- bad input -------------------------------------------------------------------------------------------------------


def layer(number: int, rank: int) -> str:
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def edited(number: int, rank: int, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A layer file with other tensors in it."""

    def damage(step: Path) -> None:
        tensors = torch.load(step / layer(number, rank), weights_only=True)
        change(tensors)
        torch.save(tensors, step / layer(number, rank))

    return damage


def with_setting(key: str, value: Any) -> Damage:
    """The YAML with another value; a later key of the same name wins in YAML."""

    def damage(step: Path) -> None:
        [path] = (step / "configs").glob("*.yml")
        head, tail = path.read_text().rsplit("}", 1)
        path.write_text(f'{head.rstrip()}\n  "{key}": {json.dumps(value)},\n}}{tail}')

    return damage


def without_layer(step: Path) -> None:
    for path in step.glob("layer_05-*"):
        path.unlink()


def narrower(tensors: dict[str, Any]) -> None:
    tensors["mlp.dense_h_to_4h.weight"] = tensors["mlp.dense_h_to_4h.weight"][:-8].clone()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(step: Path) -> None:
    shutil.rmtree(step.parent)
    step.parent.mkdir()


BAD_INPUT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing path": (lambda step: shutil.rmtree(step.parent), ("checkpoints: does not exist",)),
    "empty folder": (empty, ("checkpoints: holds no model",)),
    "missing rank file": (lambda step: (step / layer(3, 1)).unlink(), (f"{layer(3, 1)}: is missing",)),
    "missing layer": (without_layer, (f"{layer(5, 0)}: is missing",)),
    "truncated": (lambda step: truncate(step / layer(4, 0)), (layer(4, 0),)),
    "not a zip": (lambda step: (step / layer(4, 1)).write_text("<html>404</html>" * 9), (layer(4, 1),)),
    "ranks disagree": (edited(4, 1, narrower), (layer(4, 1), "layers.2.mlp.dense_h_to_4h.weight", "on rank 1")),
    "hidden size": (with_setting("hidden-size", 128), ("embed_in.weight", "[512, 64]", "[512, 128]")),
    "layers": (with_setting("num-layers", 8), ("layers.7.", "missing")),
    "degree": (with_setting("model-parallel-size", 4), ("model_parallel_size 4", "2 rank")),
    "unknown tensor": (edited(4, 0, lambda t: t.update(gate=torch.ones(3))), (layer(4, 0), "4.gate")),
    "reward head": (edited(10, 0, lambda t: t.update({"rm_linear.weight": torch.ones(3)})), ("rm_linear.weight",)),
    "alibi": (with_setting("pos-emb", "alibi"), ("pos_emb: alibi",)),
    "rmsnorm": (with_setting("norm", "rmsnorm"), ("norm: rmsnorm",)),
    "gpt_j_tied": (with_setting("gpt_j_tied", True), ("gpt_j_tied: True",)),
    "relu": (with_setting("activation", "relu"), ("activation: relu",)),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_one_message(case: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = BAD_INPUT[case]
    damage(source / STEP)
    target = source.parent / "out"
    assert cli("convert", source, target, "--to", "hf") == 1
    message = capsys.readouterr().err
    assert message.startswith("neoxconv: ") and "Traceback" not in message and len(message.splitlines()) <= 11
    assert all(words in message for words in expected), message
    assert not target.exists() and not convert.partial_of(target).exists()


def test_erf_gelu_becomes_gguf_with_a_warning(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_setting("bias-gelu-fusion", False)(source / STEP)
    assert cli("convert", source, source.parent / "x.gguf", "--to", "gguf") == 0
    assert "erf GELU" in capsys.readouterr().err


# --- bad targets -----------------------------------------------------------------------------------------------------


def test_a_target_that_exists_is_left_alone_unless_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "out"
    target.mkdir()
    assert cli("convert", source, target, "--to", "hf", "--quiet") == 0  # an empty folder counts as absent
    (target / "note.txt").write_text("mine")
    assert cli("convert", source, target, "--to", "hf") == 1
    assert "out: exists already" in capsys.readouterr().err
    assert (target / "note.txt").exists()
    assert cli("convert", source, target, "--to", "hf", "--overwrite", "--quiet") == 0
    assert not (target / "note.txt").exists()


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_target_that_cannot_be_written_is_named(place: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source.parent / "file").touch()
    assert cli("convert", source, source.parent / place, "--to", "hf", "--quiet") == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and Path(place).parts[-2] in message


def test_a_disk_too_small_is_told_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    before = digests(source.parent)
    assert cli("convert", source, source.parent / "out", "--to", "hf", "--quiet") == 1
    assert "GB are needed" in capsys.readouterr().err
    assert digests(source.parent) == before


def test_a_disk_that_fills_up_stops_the_run_and_the_same_command_finishes(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, command = source.parent / "out", ("--to", "hf", "--quiet")

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert cli("convert", source, target, *command) == 1
    message = capsys.readouterr().err
    assert "out: the disk is full" in message and len(message.splitlines()) == 1
    assert not target.exists()
    assert cli("convert", source, target, *command) == 0


@pytest.mark.parametrize(
    "target", ["checkpoints", f"checkpoints/{STEP}", "checkpoints/out", f"checkpoints/{STEP}/x", "."]
)
def test_a_target_in_or_around_the_source_is_refused(
    target: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(source)
    assert cli("convert", source, source.parent / target, "--to", "hf", "--overwrite") == 1
    assert "outside of it" in capsys.readouterr().err
    assert digests(source) == before


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "format"), [(o, f) for o, formats in ONLY_FOR.items() for f in FORMATS if f not in formats]
)
def test_an_option_of_another_format_is_a_usage_error(
    option: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("convert", "here", "there", "--to", format, f"--{option.replace('_', '-')}", VALUES[option])
    assert cli(*words) == 2
    assert f"is for {', '.join(ONLY_FOR[option])}" in capsys.readouterr().err


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
        ("verify a b c", "3 paths"),
        ("verify a --level weights", "verify SRC TARGET"),
        ("verify a b --level logits", "not available yet"),
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
    code = "import sys; from neoxconv.cli import main; main(['convert', '--help']); print(*sys.modules)"
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
    assert list(plan) == ["bytes_total", "files", "peak_memory", "disk_free", "notes"]
    assert plan["bytes_total"] == sum(file["bytes"] for file in plan["files"])
    assert cli("convert", source, target, "--to", format, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(f"{file['bytes']:,}" in shown for file in plan["files"]) and "free" in shown
    assert digests(source.parent) == before

    assert cli("convert", source, target, "--to", format, "--json") == 0
    done = capsys.readouterr()
    assert list(json.loads(done.out)) == ["target", "bytes_total", "seconds", "notes"] and not done.err
    sizes = {name: len(data) for name, data in digests(target).items()} if target.is_dir() else {}
    written = [sizes[file["name"]] for file in plan["files"]] if sizes else [target.stat().st_size]
    assert written == [file["bytes"] for file in plan["files"]]


def test_convert_tells_what_it_does_and_what_comes_next(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("convert", source, source.parent / "out", "--to", "hf") == 0
    done = capsys.readouterr()
    assert "differ by" in done.err and "TP 2" in done.err and "F16" in done.err
    assert len(done.out.splitlines()) == 1 and f"neoxconv verify {source} {source.parent / 'out'}" in done.out
    assert cli("convert", source, source.parent / "quiet", "--to", "hf", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


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
    assert lines[-1] == "PASS: bytes ok, weights ok" and any("fold (from the manifest)" in line for line in lines)


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_verify_finds_a_flipped_byte(format: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / f"out.{format}"
    assert cli("convert", source, target, "--to", format, "--quiet") == 0
    file = target / "model.safetensors" if target.is_dir() else target
    data = bytearray(file.read_bytes())
    data[-200] ^= 0x40
    file.write_bytes(data)
    assert cli("verify", target) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: bytes differs"
    assert cli("verify", source, target, "--json") == 3
    outcome = json.loads(capsys.readouterr().out)
    assert [level["passed"] for level in outcome["levels"]] == [False, False] and not outcome["passed"]
    next(target.parent.rglob("*manifest.json")).unlink()
    assert cli("verify", source, target) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: weights differs"


def test_verify_without_a_manifest_says_what_to_do(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("verify", source) == 1
    assert "neoxconv verify SOURCE TARGET" in capsys.readouterr().err


# --- interruptions and surprises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_the_same_command_finishes(
    number: signal.Signals, code: int, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, target = source.parent / "whole", source.parent / "out"
    command = ("--to", "hf", "--jobs", "2", "--quiet")
    assert cli("convert", source, whole, *command) == 0
    write, calls = convert.write_all, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_all", interrupted)
        assert cli("convert", source, target, *command) == code
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not target.exists() and convert.partial_of(target).is_dir()
    assert cli("convert", source, target, *command) == 0
    assert digests(target) == digests(whole) and not convert.partial_of(target).exists()


def test_a_surprise_is_one_line_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("neoxconv.catalog.catalog", surprise)
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

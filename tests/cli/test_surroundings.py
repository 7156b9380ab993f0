"""What a command is started in: a folder that is gone, streams that are closed, addresses that cannot be."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from neoxconv.cli.main import main
from neoxconv.errors import PlanError
from neoxconv.storage import place
from tests.oracles import ROOT
from tests.toy import toy

GONE = "neoxconv: the working folder was removed; change to one that exists, and run the command there.\n"


def in_shell(script: str, words: Sequence[object], where: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line where `script` puts `%s` for it."""
    command = shlex.join([sys.executable, "-m", "neoxconv", *map(str, words)])
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", script % command],
        cwd=where,
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def without_folder(words: Sequence[object], where: Path) -> subprocess.CompletedProcess[str]:
    (where / "gone").mkdir()
    return in_shell("cd gone && rmdir ../gone && %s", words, where)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return toy(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "inspect model", "convert SRC out --to hf", "convert model OUT --to hf", "convert SRC memory://out --to hf",
        "demo", "convert SRC OUT --to gguf --tokenizer words.json", "verify model",
        "calibrate SRC --text TEXT -o matrix.gguf",
    ],
)  # fmt: skip
def test_in_a_removed_folder_a_relative_path_is_not_blamed(words: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text " * 100)
    places = {"SRC": source, "OUT": tmp_path / "out", "TEXT": tmp_path / "text"}
    done = without_folder([places.get(word, word) for word in words.split()], tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (1, GONE, "")
    assert not (tmp_path / "out").exists()


def test_in_a_removed_folder_absolute_paths_work(source: Path, tmp_path: Path) -> None:
    """Also where torch is loaded, whose library wants a folder, and where a program is started."""
    target = tmp_path / "m.gguf"
    assert without_folder(["convert", source, target, "--to", "gguf", "--type", "F16"], tmp_path).returncode == 0
    fast = ["--level", "logits", "--length", 8, "--sequences", 1]
    done = without_folder(["verify", source, target, *fast], tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("PASS: bytes ok, weights ok, tokenizer ok, logits ok\n")
    answer = without_folder(["inspect", "model", "--json"], tmp_path)
    assert json.loads(answer.stdout) == {"error": GONE.removeprefix("neoxconv: ").strip(), "code": 1}


ONE_BY_ONE = [pytest.param(streams, marks=pytest.mark.slow) for streams in ("<&-", ">&-", "2>&-", ">&- 2>&-")]


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", *ONE_BY_ONE])
def test_closed_streams_get_nothing_into_a_target(streams: str, source: Path, tmp_path: Path) -> None:
    words = ["--to", "gguf", "--type", "F16"]
    assert in_shell("%s", ["convert", source, tmp_path / "a.gguf", *words], tmp_path).returncode == 0
    done = in_shell(f"%s {streams}", ["convert", source, tmp_path / "b.gguf", *words], tmp_path)
    assert done.returncode == 0 and (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    failed = in_shell(f"%s {streams}", ["convert", tmp_path / "none", tmp_path / "c.gguf", *words], tmp_path)
    assert failed.returncode == 1 and "Traceback" not in done.stderr + failed.stderr
    assert ("does not exist" in failed.stderr) == ("2>" not in streams)


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(streams: str) -> None:
    code = "import os, neoxconv.cli.main as m, neoxconv.__main__ as run; m.main = lambda: os.open(os.devnull, 0); "
    command = shlex.join([sys.executable, "-c", code + "raise SystemExit(run.run())"])
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", f"{command} {streams}"], env=settings, timeout=100, check=False).returncode > 2


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_cannot_be_is_named(
    port: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "hf"]
    assert main([*words, "--executor", f"dask://127.0.0.1:{port}"]) == 2
    assert f"{port} is no port; they go from 1 to 65535" in capsys.readouterr().err
    assert main(["inspect", f"http://127.0.0.1:{port}/model.gguf"]) == 1
    assert capsys.readouterr().err == f"neoxconv: http: '{port}' is no port of 127.0.0.1; they go from 1 to 65535.\n"
    assert main([*words, "--cluster", f"tcp://127.0.0.1:{port}"]) == 2
    assert "No such option '--cluster'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http:///model.gguf", "names no host"),
        ("http://host:port/x", "'port' is no port of host"),
        ("http://[::1/x", "cannot be understood; correct it"),
        ("http://user:pass/word@host:99999/x", "write a password's odd characters"),
    ],
)
def test_why_a_url_cannot_be_understood_is_told_and_no_password(url: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        place(url)
    assert "word@" not in str(caught.value) and "pass/" not in str(caught.value)


def test_a_port_that_is_closed_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("neoxconv.engine.cluster.PATIENCE", 2)
    monkeypatch.setattr("neoxconv.storage.requests.PAUSES", ())
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]
    address = f"dask://127.0.0.1:{closed_port()}"
    assert main([*words, "--executor", address]) == 1
    assert capsys.readouterr().err == (
        f"neoxconv: {address}: no Dask scheduler answers there; start one with `dask scheduler`.\n"
    )
    for protocol in ("http", "ftp"):
        url = f"{protocol}://127.0.0.1:{closed_port()}/model.gguf"
        assert main(["inspect", url]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"neoxconv: {url}: the connection fails") and told.count("\n") == 1


def test_a_command_that_is_to_be_typed_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "ÖRG/model"]) == 1
    assert "(hf download 'ÖRG/model')" in capsys.readouterr().err

"""Sources far away: the same bytes as from here, few of them fetched, and a clear message where a server fails."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, open_checkpoint
from neoxconv.cli import inspect
from neoxconv.engine import run
from neoxconv.engine.plan import make_plan, resume_key
from neoxconv.errors import CheckpointError
from neoxconv.storage import Remote, open_storage, place, protocols, requests
from neoxconv.synthetic import Synthetic, write_checkpoint
from tests.far import SECRET, Answer, Fault, Request, Web, s3, upload, web
from tests.helpers import cli, digests, few

pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install 'neoxconv[remote]'")
__all__ = ["s3"]

MODEL = {"hidden": 256, "rows": 2048}
FORMATS = {
    "pipeline": "pipeline",
    "sequential": "sequential",
    "hf": "hf",
    "safetensors": "one.safetensors",
    "gguf": "one.gguf",
    "ctranslate2": "ctranslate2",
}
HEADERS = {"gguf": 2 << 20}  # bytes of a file that opening may read besides its weights
OTHERS = 160 << 10
LAYER = "global_step10/layer_02-model_00-model_states.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model in every format that can be read."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "pipeline", Synthetic(**MODEL), optimizer_bytes=1 << 20)
    write_checkpoint(folder / "sequential", Synthetic(**MODEL, sequential=True))
    for recipe, name in (
        (Recipe("hf", shard_size=2_000_000), "hf"),
        (Recipe("safetensors"), FORMATS["safetensors"]),
        (Recipe("gguf", type="Q8_0"), FORMATS["gguf"]),
        (Recipe("ctranslate2"), FORMATS["ctranslate2"]),
    ):
        run.run(make_plan(open_checkpoint(folder / "pipeline"), recipe), folder / name)
    return folder


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The models on a web server; failures are over soon."""
    monkeypatch.setattr(requests, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(requests, "TIMEOUT", 5.0)
    with web(models) as served:
        yield served


def facts(source: str | Path) -> Any:
    """What inspect says, apart from where things are."""
    found = inspect.inspect(open_checkpoint(source))
    found["tokenizer"] = found["tokenizer"] and {**found["tokenizer"], "file": ""}
    found["source"] = {k: v for k, v in found["source"].items() if k not in ("path", "configs")}
    return found


def failing(pattern: str, *faults: str) -> Fault:
    """Requests for files of that pattern go wrong, one after the other as listed, the last for ever."""
    return lambda request, number: faults[min(number, len(faults) - 1)] * bool(re.search(pattern, request.path))


# --- the same as from here -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(FORMATS.values(), *list(FORMATS.values())[:3]))
def test_a_web_server_gives_the_same_facts_and_bytes(name: str, models: Path, server: Web, tmp_path: Path) -> None:
    assert facts(f"{server.url}/{name}") == facts(models / name)
    server.log.clear()
    for source, target in ((models / name, tmp_path / "here"), (f"{server.url}/{name}", tmp_path / "far")):
        run.run(make_plan(open_checkpoint(source), Recipe("hf")), target)
    assert digests(tmp_path / "here") == digests(tmp_path / "far")
    index = open_checkpoint(models / name).index
    weights = sum(file.storage.size for file in index.files)
    assert server.nbytes() < 1.1 * weights + len(index.files) * HEADERS.get(index.format, OTHERS)
    assert server.nbytes("optim") == 0


def test_s3_gives_the_same_facts_and_bytes(models: Path, s3: Any, tmp_path: Path) -> None:
    where = upload(s3, models, "models")
    for name in FORMATS.values():
        assert facts(f"{where}/{name}") == facts(models / name)
    for source, target in ((models, tmp_path / "here"), (where, tmp_path / "far")):
        run.run(make_plan(open_checkpoint(f"{source}/pipeline"), Recipe("slim", tp=1)), target)
    assert digests(tmp_path / "here") == digests(tmp_path / "far")


def test_what_is_in_memory_is_a_source_too(models: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(models / "hf"), "/models/hf", recursive=True)
    assert facts("memory://models/hf") == facts(models / "hf")


def test_slim_never_asks_for_an_optimizer_file(server: Web, models: Path, tmp_path: Path) -> None:
    source = f"{server.url}/pipeline"
    assert cli("convert", source, tmp_path / "slim", "--to", "slim", "--quiet") == 0
    assert not [request for request in server.log if "optim" in request.name]
    assert cli("verify", source, tmp_path / "slim", "--quiet") == 0
    assert cli("verify", models / "hf", f"{server.url}/hf") == 0


def test_an_opened_file_costs_few_requests(server: Web) -> None:
    open_checkpoint(f"{server.url}/pipeline")
    requests = [request for request in server.log if request.path.endswith(LAYER)]
    assert [request.method for request in requests] == ["HEAD", *["GET"] * (len(requests) - 1)]
    assert len(requests) <= 6
    folders = [request.path for request in server.log if request.method == "GET" and not request.name]
    assert len(folders) == len(set(folders))  # none is listed twice


def test_checks_read_every_byte(server: Web, models: Path, tmp_path: Path) -> None:
    assert cli("inspect", f"{server.url}/sequential", "--check") == 0
    assert cli("verify", f"{server.url}/hf") == 0
    assert cli("verify", "--sha256sums", f"{server.url}/hf") == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(models / "hf", damaged)
    (damaged / "config.json").write_bytes((damaged / "config.json").read_bytes().replace(b"0", b"1", 1))
    with web(tmp_path) as other:
        assert cli("verify", f"{other.url}/damaged") == 3


# --- servers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "less", "more", "elsewhere", "503", "429"])
def test_what_fails_twice_is_asked_again(fault: str, server: Web, models: Path) -> None:
    server.fault = failing("safetensors", "", fault, fault, "", fault, "")
    here, far = (open_checkpoint(f"{where}/one.safetensors").tensors for where in (models, server.url))
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        assert np.array_equal(here[name].read(0, 2048), far[name].read(0, 2048))


def test_a_server_that_stalls_is_asked_again(server: Web, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "TIMEOUT", 0.5)
    server.fault = failing("config.json", "", "stall", "stall", "")
    assert facts(f"{server.url}/hf") == facts(models / "hf")


@pytest.mark.parametrize(
    ("fault", "expected", "asked"),
    [
        ("drop", "the connection fails (ClientPayloadError) (4 times asked; run the same command again", 4),
        ("less", "bytes 0 to 533 were asked for, and 266 bytes came", 4),
        ("more", "more came than the 533 bytes that were asked for", 4),
        ("elsewhere", "bytes 0 to 533 were asked for, and others came", 4),
        ("stall", "no answer within 0.5 seconds", 4),
        ("500", "the server answers 500", 4),
        ("changed", "has changed since it was opened", 1),
        ("416", "has changed since it was opened", 1),
        ("403", "may not be read (403); give credentials", 1),
        ("401", "may not be read (401); give credentials", 1),
        ("404", "was there when it was opened", 1),
        ("400", "the server answers 400", 1),
    ],
)
def test_a_server_that_goes_on_failing_is_named(
    fault: str, expected: str, asked: int, server: Web, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(requests, "TIMEOUT", 0.5 if fault == "stall" else 5.0)
    server.fault = failing("hf/config.json", "", fault)
    assert cli("inspect", f"{server.secret_url}/hf", "-v") == 1
    error = capsys.readouterr().err
    size = (server.root / "hf" / "config.json").stat().st_size
    assert expected.replace("533", str(size)).replace("266", str(size // 2)) in error
    assert f"{server.url}/hf/config.json: " in error and SECRET not in error
    assert len([r for r in server.arrived if r.path == "/hf/config.json" and r.method == "GET"]) == asked


@pytest.mark.parametrize(
    ("status", "expected"),
    [("403", "may not be read (403)"), ("404", "does not exist"), ("503", "the server answers 503 (4 times asked")],
)
def test_a_source_that_cannot_be_opened_is_named(
    status: str, expected: str, server: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = failing("one.gguf", status)
    assert cli("inspect", f"{server.secret_url}/one.gguf?sig={SECRET}", "-v") == 1
    error = capsys.readouterr().err
    assert f"{server.url}/one.gguf: {expected}" in error and SECRET not in error


def test_a_folder_that_cannot_be_listed_is_no_empty_one(server: Web, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = failing("/configs/$", "503")
    assert cli("inspect", f"{server.url}/pipeline") == 1  # and not a guess at what the configuration was
    assert "/configs: the server answers 503" in capsys.readouterr().err


def test_a_long_listing_is_read_whole(tmp_path: Path) -> None:
    names = [f"{number:05d}-{'x' * 200}" for number in range(3000)]
    for name in names:
        (tmp_path / name).touch()
    with web(tmp_path) as served:
        assert [path.name for path in place(served.url).iterdir()] == names


def test_a_listing_without_end_is_given_up_at_once(
    server: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is neither kept in memory nor asked for again."""
    monkeypatch.setattr(Answer, "page", endless)
    assert cli("inspect", f"{server.url}/hf/") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "lists the folder in more than 16777216 bytes" in line
    assert 0 < sum(request.path.endswith("/hf/") for request in server.arrived) <= 2


def endless(answer: Answer, folder: Path) -> None:
    """A page of names that goes on until the client has left."""
    answer.send_response(200)
    answer.send_header("Content-Type", "text/html")
    answer.end_headers()
    answer.close_connection = True
    while answer.command == "GET":
        answer.wfile.write(b'<a href="name">name</a>' * 1000)


def test_a_hostile_listing_is_read_in_linear_time() -> None:
    """Where each `<a ` would be searched to the end of the page, this took minutes."""
    start = time.perf_counter()
    assert not list(protocols._linked("<a " * 1_000_000 + "<a href " * 100_000, "http://x/y/"))
    assert time.perf_counter() - start < 5


def test_folders_inside_of_themselves_have_an_end(server: Web, models: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    with web(tmp_path) as there, pytest.raises(CheckpointError, match="a: folders in it have no end"):
        list(place(f"{there.url}/a").rglob("*"))
    assert len(there.arrived) < 100


def test_an_object_that_gives_more_than_was_asked_is_refused(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    there = place(upload(s3, tmp_path, "more")) / "x"
    monkeypatch.setattr(requests, "PAUSES", ())
    original = type(there.fs)._call_s3

    async def more(self: Any, method: str, *words: Any, **given: Any) -> Any:
        found = await original(self, method, *words, **given)
        return found | {"ContentLength": 1 << 50} if method == "get_object" else found

    monkeypatch.setattr(type(there.fs), "_call_s3", more)
    with pytest.raises(CheckpointError, match=f"the store would give {1 << 50}"):
        open_storage(there).text(0, 10)


def test_a_server_without_ranges_is_refused_at_once(server: Web, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = failing("", "whole")
    assert cli("inspect", f"{server.url}/one.safetensors") == 1
    assert "one.safetensors: the server gives no ranges of bytes, only whole files" in capsys.readouterr().err
    assert json.loads((place(f"{server.url}/hf/config.json")).read_text())["model_type"] == "gpt_neox"  # it is small


def test_a_file_that_changes_during_a_run_is_noticed(models: Path, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(models / "one.gguf"), "/changing.gguf")
    plan = make_plan(open_checkpoint("memory://changing.gguf"), Recipe("hf"))
    key = resume_key(plan)
    store.put(str(models / "one.gguf"), "/changing.gguf")
    with pytest.raises(CheckpointError, match=r"memory://changing.gguf: has changed while it was read"):
        run.run(plan, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert resume_key(make_plan(open_checkpoint("memory://changing.gguf"), Recipe("hf"))) != key


def test_an_object_that_changes_is_not_read(models: Path, s3: Any, tmp_path: Path) -> None:
    s3.upload_file(str(models / "one.safetensors"), "bucket", "changing.safetensors")
    checkpoint = open_checkpoint("s3://bucket/changing.safetensors")
    s3.upload_file(str(models / "one.gguf"), "bucket", "changing.safetensors")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        run.run(make_plan(checkpoint, Recipe("hf")), tmp_path / "hf")


# --- a run that is interrupted ---------------------------------------------------------------------------------------


def test_a_run_continues_with_what_is_left(server: Web, models: Path, tmp_path: Path) -> None:
    source, target = f"{server.url}/one.safetensors", tmp_path / "hf"
    plan = make_plan(open_checkpoint(source), Recipe("hf"))
    written = 0

    def cut(count: int) -> None:
        nonlocal written
        written += count
        if written > plan.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(plan, target, jobs=1, progress=cut)
    server.log.clear()
    run.run(make_plan(open_checkpoint(source), Recipe("hf")), target, jobs=1)
    assert server.nbytes() < 0.7 * plan.total + OTHERS  # half is done, and what was under way is done again
    run.run(make_plan(open_checkpoint(models / "one.safetensors"), Recipe("hf")), tmp_path / "here")
    assert digests(target) == digests(tmp_path / "here")


# --- a part of a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "target"), [("hf", "part"), ("safetensors", "part.safetensors")])
def test_a_part_of_a_model_is_fetched_alone(
    format: str, target: str, server: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = f"{server.url}/hf", tmp_path / target
    words = ("--to", format, "--only", r"layers\.1\.", "--only", "^embed_out")
    assert cli("convert", source, made, *words) == 0
    assert "13 of 28 tensors, whose names hold layers" in capsys.readouterr().err
    assert server.nbytes("safetensors") < 0.6 * sum(
        path.stat().st_size for path in server.root.glob("hf/*.safetensors")
    )
    whole = open_checkpoint(server.root / "hf").tensors
    part = open_checkpoint(made, partial=True).tensors
    assert set(part) == {name for name in whole if "layers.1." in name or name.startswith("embed_out")}
    for name, tensor in part.items():
        assert np.array_equal(tensor.read(0, tensor.rows), whole[name].read(0, tensor.rows))
    assert cli("verify", source, made) == 0
    assert "13 tensors of 28" in capsys.readouterr().out
    assert cli("verify", source, made, "--level", "logits") == 1
    assert cli("inspect", made) == 1
    assert "holds some of a model's tensors only" in capsys.readouterr().err


@pytest.mark.parametrize(("pattern", "expected"), [("nothing", "no tensor's name holds it"), ("(", "is not a regular")])
def test_a_part_that_is_none_is_refused(
    pattern: str, expected: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("convert", models / "hf", tmp_path / "part", "--to", "hf", "--only", pattern) == 1
    assert expected in capsys.readouterr().err


# --- credentials -----------------------------------------------------------------------------------------------------


def test_credentials_are_sent_and_never_shown(server: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def locked(request: Request, number: int) -> str:
        return "" if request.authorized else "401"

    server.fault = locked
    signed = f"{server.secret_url}/{{}}?sig={SECRET}"
    for name, target in (("pipeline", "hf"), ("one.gguf", "slim")):
        cli("inspect", signed.format(name), "--json")
        cli("convert", signed.format(name), tmp_path / target, "--to", "hf", "-v")
        cli("verify", signed.format(name), tmp_path / target)
    server.fault = failing("", "500")
    assert cli("convert", signed.format("hf"), tmp_path / "failed", "--to", "hf", "-v") == 1
    shown = capsys.readouterr()
    assert shown.out.count("PASS") == 2 and f"verify {server.url}/pipeline " in shown.out
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in shown.out + shown.err and SECRET.encode() not in files


def test_a_place_shows_no_credentials_and_travels(server: Web) -> None:
    source = place(f"{server.secret_url}/hf/?sig={SECRET}")
    assert isinstance(source, Remote)
    for text in (str(source), repr(source), str(source / "config.json"), str(source.parent), source.name):
        assert SECRET not in text
    again = pickle.loads(pickle.dumps(source))
    assert again == source and hash(again) == hash(source)
    assert json.loads((again / "config.json").read_text())["model_type"] == "gpt_neox"

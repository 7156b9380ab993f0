"""The Hugging Face Hub as source and as target, against a small one on loopback that its own client takes for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes
from neoxconv.engine.plan import Plan
from neoxconv.engine.workplace import work_of
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.storage import commits, place, requests
from neoxconv.storage import hub as storage
from tests.helpers import cli, digests
from tests.hub import TOKEN, Answer, Hub, Repository, Request, answer, error, hub
from tests.toy import toy

__all__ = ["hub"]
FOLDER = Recipe("hf", shard_size=100_000)
ONE = Recipe("gguf", type="F16")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is where files are made; failures are over soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "PAUSES", (0.01, 0.02))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return toy(tmp_path)


@pytest.fixture
def plan(source: Path) -> Plan:
    return make_plan(open_checkpoint(source), FOLDER)


def made(hub: Hub, name: str, folder: Path) -> Repository:
    """What a repository holds, as a folder."""
    for path, data in hub.repositories[name].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return hub.repositories[name]


def without(found: dict[str, str], *names: str) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name not in names}


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_repository_gives_the_same_bytes_and_is_listed_once(hub: Hub, source: Path, tmp_path: Path) -> None:
    where = hub.add("org/shards", source)
    for far, target in (("hf://org/shards", "far"), (str(source), "here")):
        run(make_plan(open_checkpoint(far), Recipe("slim")), tmp_path / target)
    told_apart = "manifest.json", "README.md"  # which say where the model is from
    assert without(digests(tmp_path / "far"), *told_apart) == without(digests(tmp_path / "here"), *told_apart)
    told, local = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("far", "here"))
    assert told.pop("origin") == {"url": "hf://org/shards", "revision": where.commits[-1][0]}
    assert "origin" not in local and told["sources"] == local["sources"]
    assert [request.path for request in hub.asked("/api/models")] == [
        "/api/models/org/shards", f"/api/models/org/shards/tree/{where.commits[-1][0]}"
    ]  # fmt: skip
    assert all("org/shards" in request.path for request in hub.asked("/api/models|/resolve/"))


def test_a_repository_is_read_at_the_commit_that_it_had(hub: Hub, source: Path, tmp_path: Path) -> None:
    run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "hf")
    first = hub.add("org/model", tmp_path / "hf")
    checkpoint = open_checkpoint("hf://org/model")
    first.commit(dict.fromkeys(first.files, b"another"))
    run(make_plan(checkpoint, ONE), tmp_path / "far.gguf")
    assert cli("verify", tmp_path / "hf", tmp_path / "far.gguf") == 0
    assert {re.split("/resolve/|/", request.path)[3] for request in hub.asked("/resolve/")} == {first.commits[0][0]}
    assert cli("inspect", "hf://org/model") == 1
    assert cli("inspect", f"hf://org/model@{first.commits[0][0]}") == 0


@pytest.mark.parametrize("where", ["org/all@v1/deep/hf", "org/all@refs%2Fheads/deep/hf", "org/all@v1/deep/x.gguf"])
def test_revisions_and_paths_are_read(where: str, hub: Hub, plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path / "deep" / "hf")
    run(make_plan(plan.checkpoint, ONE), tmp_path / "deep" / "x.gguf")
    found = hub.repositories["org/all"] = Repository()
    files = {str(f.relative_to(tmp_path)): f.read_bytes() for f in (tmp_path / "deep").rglob("*") if f.is_file()}
    found.branches = dict.fromkeys(("v1", "refs/heads"), found.commit(files))
    found.commit({})
    assert cli("inspect", f"hf://{where}") == 0
    assert cli("verify", f"hf://{where}") == 0


def test_a_long_listing_has_pages(hub: Hub, tmp_path: Path) -> None:
    hub.page = 7
    for number in range(30):
        (tmp_path / "x" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"{number % 3}" / f"{number:02d}").write_bytes(b"x")
    hub.add("org/x", tmp_path / "x")
    assert sorted(path.name for path in place("hf://org/x").rglob("[0-9][0-9]")) == [f"{n:02d}" for n in range(30)]


def failing(pattern: str, *answers: Answer) -> Any:
    """The first requests for paths of that pattern are answered so."""
    left = list(answers)
    return lambda request: left.pop(0) if left and re.search(pattern, request.path) else None


@pytest.mark.parametrize("pattern", ["/resolve/", "/api/models/org/model$"])
@pytest.mark.parametrize("header", [{"RateLimit": '"resolvers";r=0;t=55'}, {"Retry-After": "55"}], ids=str)
def test_a_rate_limit_is_waited_for_and_said(
    pattern: str, header: dict[str, str], hub: Hub, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hub.add("org/model", run(plan, tmp_path / "hf"))  # type: ignore[arg-type]
    waits = list[float]()
    monkeypatch.setattr(requests.time, "sleep", waits.append)
    hub.fault = failing(pattern, (429, header, b""), (429, header, b""))
    assert cli("inspect", "hf://org/model") == 0
    assert waits == [56, 56]
    assert "hf://org/model" in caplog.text and "asks to wait 56 seconds" in caplog.text
    hub.fault = failing(pattern, (429, {"Retry-After": "99999"}, b""))
    hub.repositories["org/model"].commit({"config.json": b"{}"})
    assert cli("inspect", "hf://org/model") == 1
    assert waits == [56, 56]


@pytest.mark.parametrize(
    ("settings", "token", "status", "expected"),
    [
        ({"private": True}, "", 401, "may not be read (401): it is private, gated, or not there; log in with `hf auth"),
        (
            {"gated": True},
            "",
            401,
            "may not be read (401): it is gated: accept its terms on its page at the Hub, then log",
        ),
        ({"gated": True}, TOKEN, 403, "may not be read (403): it is gated"),
        ({}, "hf_wrong", 401, "may not be read (401): it is private, gated, or not there; log in with `hf auth login`"),
    ],
)
def test_what_may_not_be_read_is_said_with_what_to_do(
    settings: dict[str, bool], token: str, status: int, expected: str, hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    hub.add("org/x", tmp_path / "x", **settings)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert cli("inspect", "hf://org/x", "-v") == 1
    said = capsys.readouterr().err
    assert expected.replace("): ", "); ") in said and "HF_TOKEN" in said and "hf_" not in said


@pytest.mark.parametrize("where", ["org/nope", "org/there@v9", "org/there/inside"])
def test_what_is_not_there_is_said(where: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["org/there"] = Repository()
    hub.repositories["org/there"].commit({})
    assert cli("inspect", f"hf://{where}") == 1
    assert f"hf://{where}: does not exist." in capsys.readouterr().err
    assert cli("inspect", "hf://org") == 1
    assert "hf://org: names no repository of the Hugging Face Hub; write hf://ORG/NAME" in capsys.readouterr().err


def test_the_token_stays_at_the_hub(hub: Hub, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The storage of the small Hub fails where a token comes; nothing that is written has it either."""
    hub.add("org/shards", source)
    hub.fault = failing("/resolve/", error(500), error(500))
    assert cli("convert", "hf://org/shards", "hf://org/made", "--to", "hf") == 0
    assert hub.asked("/[0-9a-f]{64}$", "GET") and hub.asked("/[0-9a-f]{64}$", "PUT")
    assert all(TOKEN.encode() not in data for data in hub.repositories["org/made"].files.values())
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err and "Signature" not in said.out + said.err


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 50_000], ids=["whole", "in parts"])
@pytest.mark.parametrize(
    ("recipe", "inside"), [(FOLDER, ""), (FOLDER, "/deep/er"), (ONE, "/x.gguf")], ids=["folder", "deep", "file"]
)
def test_a_repository_gets_the_same_bytes_in_one_commit(
    recipe: Recipe, inside: str, chunk: int, hub: Hub, source: Path, tmp_path: Path
) -> None:
    hub.chunk = chunk
    plan, target = make_plan(open_checkpoint(source), recipe), f"hf://org/new{inside}"
    told: list[int] = []
    assert verify_bytes(run(plan, target, progress=told.append)).passed
    found = made(hub, "org/new", tmp_path / "there")
    run(plan, tmp_path / f"here{inside}")
    assert without(digests(tmp_path / "there"), ".gitattributes") == digests(tmp_path / "here")
    assert len(found.commits) == 2 and not found.private
    assert sum(told) == sum(step.nbytes for step in plan.steps)
    assert not work_of(place(target)).exists()
    assert bool(hub.asked("/lfs-complete")) == bool(chunk)


def test_what_was_downloaded_is_verified(hub: Hub, plan: Plan, tmp_path: Path) -> None:
    import huggingface_hub

    run(plan, "hf://org/new")
    huggingface_hub.snapshot_download("org/new", local_dir=tmp_path / "there")
    assert (tmp_path / "there" / ".gitattributes").exists() and (tmp_path / "there" / ".cache").exists()
    assert verify_bytes(tmp_path / "there").passed
    (tmp_path / "there" / "more").touch()
    assert not verify_bytes(tmp_path / "there").passed


def test_an_old_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.__version__", "0.36.0")
    with pytest.raises(PlanError, match=r"hf:// needs huggingface_hub 1\.0, found 0\.36\.0; pip install -U"):
        storage.api()


def test_the_command_line_publishes_inspects_and_verifies(hub: Hub, source: Path, capsys: Any) -> None:
    assert cli("convert", source, "hf://org/new", "--to", "hf", "--private", "--dry-run") == 0 and not hub.repositories
    assert cli("convert", source, "hf://org/new", "--to", "hf", "--private") == 0
    assert hub.repositories["org/new"].private
    assert cli("verify", source, "hf://org/new") == 0 and cli("verify", "hf://org/new") == 0
    assert cli("inspect", "hf://org/new", "--check") == 0
    assert cli("convert", "hf://org/new", "hf://org/new/q.gguf", "--to", "gguf", "--type", "F16") == 0
    assert cli("verify", "hf://org/new", "hf://org/new/q.gguf") == 0
    assert [len(files) for _, files in hub.repositories["org/new"].commits][1:] == [9, 11]
    capsys.readouterr()
    assert cli("convert", source, "hf://org/other", "--to", "gguf") == 0  # by its default name
    assert sum(name.endswith(".gguf") for name in hub.repositories["org/other"].files) == 1
    assert cli("convert", source, "x.gguf", "--to", "gguf", "--private") == 1
    assert "--private is for repositories of the Hugging Face Hub" in capsys.readouterr().err


def interrupted(plan: Plan, target: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run until so many files were sent."""
    send, count = commits.send, [0]

    def sending(*given: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return send(*given)

    with monkeypatch.context() as patched:
        patched.setattr(commits, "send", sending)
        with pytest.raises(KeyboardInterrupt):
            run(plan, target)


def test_what_was_sent_is_not_sent_again(hub: Hub, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(plan, "hf://org/new", monkeypatch, 2)
    assert list(hub.repositories["org/new"].files) == [".gitattributes"] and len(hub.storage) == 2
    assert TOKEN not in "".join(path.read_text() for path in Path("new.partial/sent").iterdir())
    told: list[int] = []
    run(plan, "hf://org/new", progress=told.append)
    sent = [request.path for request in hub.asked("/[0-9a-f]{64}$", "PUT")]
    assert len(sent) == len(set(sent)) == len(plan.files) > 3
    made(hub, "org/new", tmp_path / "there")
    assert without(digests(tmp_path / "there"), ".gitattributes") == digests(run(plan, tmp_path / "here"))  # type: ignore[arg-type]
    assert sum(told) == sum(step.nbytes for step in plan.steps)


def test_what_the_storage_has_lost_is_made_again(hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(plan, "hf://org/new", monkeypatch, 2)
    hub.storage.pop(next(iter(hub.storage)))
    run(plan, "hf://org/new")
    assert len(hub.asked("/[0-9a-f]{64}$", "PUT")) == len(plan.files) + 1
    assert verify_bytes("hf://org/new").passed


def test_a_repository_that_is_gone_is_made_again(hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(plan, "hf://org/new", monkeypatch, 2)
    hub.repositories.clear()
    run(plan, "hf://org/new")
    assert verify_bytes("hf://org/new").passed


def test_what_others_have_there_is_left_alone(hub: Hub, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("theirs")
    (tmp_path / "theirs" / "notes.txt").write_text("theirs")
    theirs = hub.add("org/theirs", tmp_path / "theirs")
    with pytest.raises(PlanError, match=r"hf://org/theirs: the repository has README.md already; .*--overwrite"):
        run(plan, "hf://org/theirs")
    with pytest.raises(PlanError, match="the repository is there and public; --private"):
        run(plan, "hf://org/theirs/inside", private=True)
    with pytest.raises(PlanError, match="a file and a folder would have one name"):
        run(plan, "hf://org/theirs/notes.txt")
    assert len(theirs.commits) == 1 and not hub.storage
    run(plan, "hf://org/theirs", overwrite=True)
    assert theirs.files["notes.txt"] == b"theirs" and theirs.files["README.md"] != b"theirs"
    assert verify_bytes("hf://org/theirs").passed


@pytest.mark.parametrize("theirs", ["config.json", "notes.txt"])
def test_others_who_commit_meanwhile_are_not_overwritten(
    theirs: str, hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, came = commits.commit, list[str]()

    def late(where: Any, *given: Any, **more: Any) -> None:
        found = hub.repositories["org/new"]
        if not came:
            came.append(found.commit({**found.files, theirs: b"theirs"}))
        commit(where, *given, **more)

    monkeypatch.setattr(commits, "commit", late)
    if theirs == "config.json":
        with pytest.raises(PlanError, match=r"the repository has config\.json already"):
            run(plan, "hf://org/new")
    else:
        run(plan, "hf://org/new")
    assert hub.repositories["org/new"].files[theirs] == b"theirs"
    assert len(hub.asked("/commit/")) == 2 - (theirs == "config.json")


def test_several_files_come_one_after_the_other(hub: Hub, source: Path) -> None:
    assert cli("convert", source, "hf://org/new", "--to", "gguf", "--type", "F16,Q8_0") == 0
    names = [name for name in hub.repositories["org/new"].files if name.endswith(".gguf")]
    assert len(names) == 2
    assert all(cli("verify", f"hf://org/new/{name}") == 0 for name in names)


def test_a_commit_whose_answer_was_lost_is_found(hub: Hub, plan: Plan) -> None:
    def losing(request: Request) -> Answer | None:
        if "/commit/" not in request.path:
            return None
        hub.fault = lambda request: None
        answer(hub, request)
        return error(500)

    hub.fault = losing
    run(plan, "hf://org/new")
    assert len(hub.repositories["org/new"].commits) == 2 and verify_bytes("hf://org/new").passed


def test_a_commit_that_leaves_files_out_is_noticed(hub: Hub, plan: Plan) -> None:
    hub.repositories["org/new"] = Repository()
    hub.repositories["org/new"].commit({".gitignore": b"tokenizer.json"})
    with pytest.raises(NeoxconvError, match=r"the commit lacks files that were sent; see to .gitignore"):
        run(plan, "hf://org/new")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("hf://others/x", r"may not be written \(403\); the token in use has no right to that"),
        ("hf://org/x@v1", "names a revision; a target is committed to the main branch"),
    ],
)
def test_where_nothing_may_be_written_nothing_is_made(target: str, words: str, hub: Hub, plan: Plan) -> None:
    with pytest.raises(NeoxconvError, match=words):
        run(plan, target)
    assert not hub.storage and not hub.repositories


def test_without_a_token_nothing_is_begun(hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PlanError, match="needs a token that may write; log in with `hf auth login`, or set HF_TOKEN"):
        run(plan, "hf://org/new")
    assert not work_of(place("hf://org/new")).exists()


def test_a_request_that_huggingface_hub_sends_again_shows_no_signed_url(
    hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    hub.fault = failing("/[0-9a-f]{64}$", error(503), (429, {"Retry-After": "3"}, b""))
    run(plan, "hf://org/new")
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert "Rate limited. Waiting 4.0s" in caplog.text and "://" not in caplog.text


def test_addresses_are_read_as_huggingface_hub_reads_them() -> None:
    uris = pytest.importorskip("huggingface_hub.utils._hf_uris")
    for path in (
        "org/name", "org/name@v1", "org/name@v1/a/b.gguf", "org/name/a", "org/name@refs/pr/12/a", "datasets/org/name/x",
        "org/name@refs/convert/parquet", "spaces/org/name@a%2Fb/c", "models/org/na.me-1/x@y",
    ):  # fmt: skip
        theirs, ours = uris.parse_hf_uri(f"hf://{path}"), storage.repository(path)
        assert (theirs.type, theirs.id, theirs.revision or "") == (ours.kind, ours.name, ours.revision)
        assert theirs.path_in_repo == ours.inside and storage.repository(ours.path) == ours

"""Nothing of somebody else's is replaced, removed or written through: it is named, and the disk stays as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine.plan import Plan
from neoxconv.errors import NeoxconvError, PlanError
from tests.helpers import PowerCut, cli, cut_after
from tests.toy import toy


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(open_checkpoint(toy(tmp_path)), Recipe("hf"))


def snapshot(folder: Path) -> dict[str, str | bytes]:
    """Every file, link and folder below."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def write(path: Path, data: str = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data)


ADDED: dict[str, Callable[[Path], object]] = {
    "a file": lambda target: write(target / "notes.txt"),
    "a dotfile": lambda target: write(target / ".hidden"),
    "a folder's file": lambda target: write(target / ".git" / "HEAD"),
    "an empty folder": lambda target: (target / "mine").mkdir(),
    "a link": lambda target: (target / "link").symlink_to("nowhere"),
    "a link in a file's place": lambda target: (
        (target / "config.json").unlink(),
        (target / "config.json").symlink_to("/etc/hostname"),
    ),
    "another manifest": lambda target: write(target / "manifest.json", '{"name": "My page", "icons": []}'),
    "half of ours": lambda target: write(target / "manifest.json", (target / "manifest.json").read_text()[:200]),
    "no manifest": lambda target: (target / "manifest.json").unlink(),
}


@pytest.mark.parametrize("what", ADDED)
def test_a_target_with_anything_of_others_is_not_replaced(what: str, plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(plan, target)
    ADDED[what](target)
    before = snapshot(tmp_path)
    with pytest.raises(PlanError, match="out"):
        run(plan, target, overwrite=True)
    assert snapshot(tmp_path) == before


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a file in it": lambda work: write(work / "thesis.txt"),
    "a file in target": lambda work: write(work / "target" / "thesis.txt"),
    "another journal": lambda work: write(work / "journal", "Dear diary"),
    "another lock": lambda work: write(work / "lock", "a word that no lock has"),
    "a file": lambda work: write(work),
    "a link to a folder": lambda work: ((work.parent / "x").mkdir(), work.symlink_to(work.parent / "x")),
    "a link to nowhere": lambda work: work.symlink_to("nowhere"),
    "a linked lock": lambda work: (write(work.parent / "x"), work.mkdir(), (work / "lock").symlink_to("../x")),
    "a linked journal": lambda work: (write(work.parent / "x"), work.mkdir(), (work / "journal").symlink_to("../x")),
    "a linked target": lambda work: (
        write(work.parent / "x" / "y"),
        work.mkdir(),
        (work / "target").symlink_to("../x"),
    ),
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("what", STRANGERS)
def test_a_partial_of_others_is_named_and_left(what: str, exists: bool, plan: Plan, tmp_path: Path) -> None:
    if exists:
        write(tmp_path / "out" / "mine")
    STRANGERS[what](tmp_path / "out.partial")
    before = snapshot(tmp_path)
    with pytest.raises(NeoxconvError, match=r"out"):
        run(plan, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_dry_run_changes_nothing_even_beside_our_own_leftovers(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        run(plan, tmp_path / "out", jobs=1, progress=cut_after(3))
    before = snapshot(tmp_path)
    source = str(plan.checkpoint.opening.path)
    assert cli("convert", source, tmp_path / "out", "--to", "hf", "--dry-run", "--quiet") == 0
    assert snapshot(tmp_path) == before


def test_unfinished_work_of_another_plan_gives_way_to_overwrite_only(tmp_path: Path) -> None:
    source = toy(tmp_path)
    with pytest.raises(PowerCut):
        run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "out", jobs=1, progress=cut_after(3))
    other = make_plan(open_checkpoint(source), Recipe("hf", dtype="F32"))
    before = snapshot(tmp_path / "out.partial")
    with pytest.raises(PlanError, match="--overwrite"):
        run(other, tmp_path / "out")
    assert snapshot(tmp_path / "out.partial").keys() == before.keys()
    run(other, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("words", [("convert", "", "x"), ("convert", "x", ""), ("convert", " ", "x"), ("inspect", "")])
def test_an_empty_path_is_wrong_usage(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy(tmp_path))
    before = snapshot(Path())
    assert cli(*words, *(["--to", "hf", "--overwrite"] if words[0] == "convert" else [])) == 2
    assert snapshot(Path()) == before


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_errors_answer_in_json_too(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"inspect": [], "convert": [tmp_path / "out", "--to", "hf"], "verify": [tmp_path / "out"]}[command]
    assert cli(command, tmp_path / "absent", *more, "--json") == 1
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer["code"] == 1 and "absent" in answer["error"] and "absent" in told.err


def test_what_is_printed_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("inspect", tmp_path / "a\x1b]0;owned\x07b") == 1
    told = capsys.readouterr()
    assert "\x1b" not in told.err + told.out and "owned" in told.err

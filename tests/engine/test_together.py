"""Many targets in one read: each has the bytes of a run of its own, and what stops one does not stop the others."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, run_all
from neoxconv.engine import together
from neoxconv.engine.memory import budget_for
from neoxconv.engine.steps import Work
from neoxconv.engine.workers import Joint, Seat
from neoxconv.engine.workplace import locked, partial_of
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.storage import Storage, holds
from tests.far import web
from tests.helpers import PowerCut, cli, cut_after, digests
from tests.toy import toy

MIB = 1 << 20
RECIPES = {
    "q8.gguf": Recipe("gguf", type="Q8_0"),
    "split": Recipe("gguf", type="Q4_0", split_size=500_000),
    "hf": Recipe("hf", dtype="F16", shard_size=300_000),
    "slim": Recipe("slim", tp=4, pp=2),
    "nf4": Recipe("bnb", type="NF4", double_quant=True),
    "e4m3": Recipe("float8", type="E4M3", scale="tensor"),  # reads every tensor twice
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("together"), hidden=256, heads=4)


def plans(source: Path, folder: Path, recipes: Mapping[str, Recipe] = RECIPES) -> dict[Path, Any]:
    checkpoint = open_checkpoint(source)
    return {folder / name: make_plan(checkpoint, recipe) for name, recipe in recipes.items()}


def metadata(path: Path) -> Any:
    with safe_open(path, "np") as file:
        return file.metadata()


def alone(source: Path, folder: Path) -> dict[str, dict[str, str]]:
    return {target.name: digests(run(plan, target)) for target, plan in plans(source, folder).items()}


@pytest.mark.parametrize("jobs", [1, 3])
def test_targets_made_together_have_the_bytes_of_those_made_alone(jobs: int, source: Path, tmp_path: Path) -> None:
    made = run_all(plans(source, tmp_path / "together"), jobs=jobs)
    assert {target.name: digests(target) for target in made} == alone(source, tmp_path / "alone")
    assert not list((tmp_path / "together").glob("*.partial"))


def test_a_band_that_one_target_has_read_is_the_next_that_the_others_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is still in the cache: between two reads of the same bytes lie no more than those of the same band."""
    wanted = plans(source, tmp_path, {f"{kind}.gguf": Recipe("gguf", type=kind) for kind in ("Q8_0", "Q4_0", "F16")})
    ranges: list[tuple[str, int, int]] = []
    read = Storage.read

    def noted(self: Storage, offset: int, length: int, ahead: int = 0) -> Any:
        if length > 10_000:  # a matrix
            ranges.append((str(self.path), offset, length))
        return read(self, offset, length, ahead)

    monkeypatch.setattr(Storage, "read", noted)
    run_all(wanted, jobs=1)
    assert len(ranges) == 3 * len(set(ranges))
    first = {each: ranges.index(each) for each in set(ranges)}
    gaps = [n - first[each] for n, each in enumerate(ranges)]
    assert max(gaps) < 3 * 12  # of three targets: a band of qkv, whose heads are read apart


def test_an_interrupted_run_continues_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for calls in (0, 20, 60):
        with pytest.raises(PowerCut):
            run_all(plans(source, tmp_path / "cut"), progress=cut_after(calls))
    made = run_all(plans(source, tmp_path / "cut"))
    assert {target.name: digests(target) for target in made} == alone(source, tmp_path / "alone")


def test_what_the_same_plans_made_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    made = run_all(plans(source, tmp_path))
    times = [path.stat().st_mtime_ns for path in made]
    assert [path.stat().st_mtime_ns for path in run_all(plans(source, tmp_path))] == times
    with pytest.raises(PlanError, match=r"q8\.gguf: exists already"):
        run_all(plans(source, tmp_path, {"q8.gguf": Recipe("gguf", type="Q4_0")}))


def test_a_target_that_cannot_be_made_stops_no_other(source: Path, tmp_path: Path) -> None:
    wanted = plans(source, tmp_path)
    with locked(partial_of(tmp_path / "hf")), pytest.raises(PlanError, match=r"hf\.partial") as error:
        run_all(wanted)
    assert len(str(error.value).splitlines()) == 1
    assert {path.name for path in wanted if path.exists()} == {*RECIPES} - {"hf"}
    assert run_all(plans(source, tmp_path)) == list(wanted)


def test_a_value_that_one_type_cannot_hold_stops_that_target_alone(tmp_path: Path) -> None:
    source = run(
        make_plan(open_checkpoint(toy(tmp_path)), Recipe("safetensors", dtype="F32")), tmp_path / "x.safetensors"
    )
    weights, said = load_file(source), metadata(source)
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][3, 5] = 1e6
    save_file(weights, source, said)
    recipes = {"wide": Recipe("hf", dtype="F32"), "narrow": Recipe("hf", dtype="F16")}
    with pytest.raises(NeoxconvError, match=r"values that are not finite as F16"):
        run_all(plans(source, tmp_path, recipes))
    assert (tmp_path / "wide").is_dir()
    assert not (tmp_path / "narrow").exists()


def test_a_disk_must_hold_all_of_them_before_any_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plans(source, tmp_path)
    largest = max(plan.total for plan in wanted.values())
    monkeypatch.setattr(together, "room", lambda plan, work: (plan.total, largest))
    with pytest.raises(PlanError, match=rf"{re.escape(str(tmp_path))}: .* are needed for all targets together"):
        run_all(wanted)
    assert not list(tmp_path.iterdir())


def test_what_is_stopped_before_all_have_asked_ends(source: Path, tmp_path: Path) -> None:
    """Else the runs that asked already would wait for ever."""
    joint, done = Joint(1, 2), threading.Event()
    plan = next(iter(plans(source, tmp_path, {"q8.gguf": Recipe("gguf", type="Q8_0")}).values()))

    def ask(seat: Seat) -> None:
        work = Work(folder=tmp_path, known={}, slab=1 << 20, checks=frozenset())
        with seat.taken(work) as submit:
            assert all(future.cancelled() for future in as_completed(submit(plan.steps)))
        done.set()

    first = threading.Thread(target=ask, args=(joint.seats[0],), daemon=True)
    first.start()
    while not joint.tasks:
        time.sleep(0.01)
    joint.stop()
    assert done.wait(10)
    done.clear()
    threading.Thread(target=ask, args=(joint.seats[1],), daemon=True).start()
    assert done.wait(10)
    joint.close()


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_what_is_not_whole_is_not_taken_for_made(damage: str, source: Path, tmp_path: Path) -> None:
    made = run_all(plans(source, tmp_path, {name: RECIPES[name] for name in ("q8.gguf", "hf")}))
    for path in (made[0], made[1] / "config.json"):
        path.write_bytes(b"") if damage == "cut" else path.unlink()
        wanted = plans(source, tmp_path, {name: RECIPES[name] for name in ("q8.gguf", "hf")})
        assert not any(together.is_made(plan, target) for target, plan in wanted.items() if holds(target, path))


def test_memory_is_planned_for_all_that_are_made_at_the_same_time() -> None:
    one, ten = budget_for(8, 512 * MIB), budget_for(8, 512 * MIB, abreast=20)
    assert ten.peak <= 512 * MIB
    assert ten.jobs < one.jobs


# --- the command ------------------------------------------------------------------------------------------------------


def test_several_types_are_several_files_in_a_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli("convert", source, out, "--to", "gguf", "--type", "Q8_0,q4_0", "--dry-run") == 0
    assert "the source is read once" in capsys.readouterr().out
    assert not out.exists()
    assert cli("convert", source, out, "--to", "gguf", "--type", "Q8_0,q4_0") == 0
    files = sorted(path.name for path in out.glob("*.gguf"))
    assert [re.search(r"-(Q\d_\d)\.gguf$", name)[1] for name in files] == ["Q4_0", "Q8_0"]  # type: ignore[index]
    for name in files:
        assert cli("verify", source, out / name) == 0
    capsys.readouterr()
    assert cli("convert", source, out, "--to", "gguf", "--type", "Q8_0,Q4_0") == 0
    assert "all is made already" in capsys.readouterr().out


def test_a_file_of_recipes_is_read_as_the_command_line_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "targets.yaml"
    recipe.write_text(
        "targets:\n"
        "  - {to: gguf, type: [Q8_0, F16], tensor-type: ['ffn_down=Q6_K', 'attn=F16']}\n"
        "  - {to: bnb, type: nf4, double-quant: true, name: four}\n"
        "  - {to: hf, dtype: bf16, shard-size: 300KB}\n"
    )
    assert cli("convert", source, tmp_path / "out", "--recipe", recipe) == 0
    made = {path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".manifest.json")}
    assert len(made) == 4
    assert "four" in made
    assert cli("verify", source, tmp_path / "out" / "four") == 0


WRONG = {
    "targets: [{to: gguf, typ: Q8_0}]": "target 1: typ is no option of a target",
    "targets: [{to: gguf, type: Q8_0}, {to: gguf, type: Q9}]": "target 2: Invalid value for '--type': 'Q9' is not one",
    "targets: [{to: gguf, jobs: 3}]": "jobs is no option of a target",
    "targets: [{type: Q8_0}]": "--to is missing",
    "targets: [{to: hf, type: Q8_0}]": "--type is for gguf",
    "targets: [{to: gguf, type: 'Q8_0,Q4_0', name: a}]": "a is the name of 2 targets",
    "targets: [{to: gguf, type: Q8_0, name: a}, {to: hf, name: a}]": "a: two targets have this name",
    "targets: [{to: [gguf, hf], type: Q8_0}]": "to takes one value, found 2",
    "targets: [{to: gguf, type: Q8_0, name: ../a}]": "../a is no name of a file or a folder in DST",
    "targets: []": "has no targets",
    "targets: 3": "is no file of recipes",
    "[": "is no file of recipes",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_a_file_of_recipes_gets_wrong_is_named(
    text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert cli("convert", source, tmp_path / "out", "--recipe", tmp_path / "r.yaml") in (1, 2)
    assert WRONG[text] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_card_is_written_for_what_was_made_already_and_for_what_nothing_stopped(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("convert", source, tmp_path / "out", "--to", "gguf", "--type", "Q8_0,Q4_0")
    assert cli(*words) == 0 and not (tmp_path / "out" / "README.md").exists()
    assert cli(*words, "--card") == 0
    assert (tmp_path / "out" / "README.md").read_text().count(".gguf |") == 2
    capsys.readouterr()
    name = next((tmp_path / "out").glob("*Q8_0.gguf"))
    more = ("convert", source, tmp_path / "more", "--to", "gguf", "--type", "Q8_0,Q4_0", "--card")
    with locked(partial_of(tmp_path / "more" / name.name)):
        assert cli(*more) == 1
    assert "the other targets are made" in capsys.readouterr().err
    assert (tmp_path / "more" / "README.md").read_text().count(".gguf |") == 1


def test_options_of_a_target_beside_a_file_of_recipes_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("targets: [{to: gguf, type: Q8_0}]")
    assert cli("convert", source, tmp_path / "out", "--recipe", tmp_path / "r.yaml", "--type", "Q4_0") == 2
    assert "--recipe says what each target is; write type into" in capsys.readouterr().err


def test_each_byte_of_a_source_far_away_is_sent_about_once(source: Path, tmp_path: Path) -> None:
    model = run(make_plan(open_checkpoint(source), Recipe("hf", dtype="F16")), tmp_path / "model")
    recipes = {f"{kind}.gguf": Recipe("gguf", type=kind, tokenizer=model) for kind in ("Q8_0", "Q4_0", "F16", "Q5_0")}
    with web(model) as server:
        checkpoint = open_checkpoint(server.url)
        plans = {tmp_path / name: make_plan(checkpoint, recipe) for name, recipe in recipes.items()}
        before = server.nbytes()
        made = run_all(plans, jobs=1)  # two threads may ask for one block, which holds several of these small tensors
        sent = server.nbytes() - before
    assert not any(file.storage.path.cache.bands.kept for file in checkpoint.index.files)
    assert sent < 1.3 * (model / "model.safetensors").stat().st_size
    near = open_checkpoint(model)
    for target, recipe in zip(made, recipes.values(), strict=True):
        assert digests(run(make_plan(near, recipe), tmp_path / f"near-{target.name}")) == digests(target)

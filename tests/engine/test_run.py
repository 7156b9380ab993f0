"""The engine: same bytes whatever the jobs, slabs and interruptions; nothing half-made is ever visible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import overflows, read_manifest
from neoxconv.engine.memory import budget_for
from neoxconv.engine.plan import Plan
from neoxconv.engine.run import carry_out, prepare
from neoxconv.engine.workplace import made_in, partial_of
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError
from tests.fixtures import fixture
from tests.helpers import PowerCut, cut_after, digests
from tests.toy import toy

MIB = 1 << 20
RECIPES = (
    Recipe("hf", shard_size=200_000),
    Recipe("safetensors"),
    Recipe("slim"),
    Recipe("slim", tp=1),
    Recipe("gguf", type="Q8_0"),
    Recipe("gguf", type="F16", split_size=200_000),
    Recipe("bnb", type="NF4", double_quant=True),
    Recipe("bnb", type="INT8", shard_size=200_000),
    Recipe("float8", scale="tensor"),
    Recipe("ctranslate2"),
)


def source() -> Path:
    return fixture("neox_2022_tp2_pp4/checkpoints")


def plan(recipe: Recipe, norms: str = "mean") -> Plan:
    return make_plan(open_checkpoint(source(), norms=norms), recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, (r.format, r.type, r.tp))))
def test_an_interrupted_run_resumes_to_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    whole, cut = run(plan(recipe), tmp_path / "whole"), tmp_path / "cut"
    for count in (0, 20):
        with pytest.raises(PowerCut):
            run(plan(recipe), cut, progress=cut_after(count), jobs=2)
        assert not cut.exists()
    written: list[int] = []
    run(plan(recipe), cut, progress=written.append)
    assert digests(cut) == digests(whole)
    assert not partial_of(cut).exists()


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["mean", "fold"])
@pytest.mark.parametrize("recipe", [*RECIPES[3:5], *RECIPES[6:]], ids=lambda r: f"{r.format}-{r.type}")
def test_jobs_and_slabs_never_change_a_byte(recipe: Recipe, norms: str, tmp_path: Path) -> None:
    one = run(plan(recipe, norms), tmp_path / "one", jobs=1)
    many = run(plan(recipe, norms), tmp_path / "many", jobs=4, memory=220 * MIB)
    assert digests(one) == digests(many)


def test_a_slab_of_few_rows_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(plan(Recipe("gguf", type="Q4_0"), "fold"), tmp_path / "whole")
    monkeypatch.setattr("neoxconv.engine.memory.SLAB", 1000)
    assert digests(run(plan(Recipe("gguf", type="Q4_0"), "fold"), tmp_path / "small")) == digests(whole)


def test_what_the_journal_claims_is_hashed_again(tmp_path: Path) -> None:
    whole, cut = run(plan(Recipe("hf")), tmp_path / "whole"), tmp_path / "cut"
    with pytest.raises(PowerCut):
        run(plan(Recipe("hf")), cut, progress=cut_after(30), jobs=1)
    file = made_in(partial_of(cut)) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    journal = partial_of(cut) / Journal.NAME
    journal.write_text(journal.read_text() + '{"step": "half a li')
    assert digests(run(plan(Recipe("hf")), cut)) == digests(whole)


def test_another_plan_over_unfinished_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        run(plan(Recipe("hf")), tmp_path / "x", progress=cut_after(3))
    with pytest.raises(PlanError, match="another conversion"):
        run(plan(Recipe("hf", dtype="F32")), tmp_path / "x")
    with pytest.raises(PlanError, match="another conversion"):
        run(plan(Recipe("hf"), norms="rank0"), tmp_path / "x")


def test_a_source_changed_since_is_not_continued(tmp_path: Path) -> None:
    """Headers are equal, and say nothing of the weights: the time of the last change does."""
    models = [toy(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    file = tmp_path / "model.safetensors"
    for model in models:
        shutil.rmtree(partial_of(tmp_path / "x"), ignore_errors=True)
        file.unlink(missing_ok=True)
        run(make_plan(open_checkpoint(model), Recipe("safetensors")), file, overwrite=True)
        if model is models[0]:
            with pytest.raises(PowerCut):
                run(make_plan(open_checkpoint(file), Recipe("hf")), tmp_path / "x", progress=cut_after(9))
            kept = tmp_path / "kept"
            shutil.move(partial_of(tmp_path / "x"), kept)
    shutil.move(kept, partial_of(tmp_path / "x"))
    with pytest.raises(PlanError, match="a changed one"):
        run(make_plan(open_checkpoint(file), Recipe("hf")), tmp_path / "x")


def test_another_header_is_another_plan(tmp_path: Path) -> None:
    """A tokenizer whose header is a few bytes shorter would leave the old one's tail in the padding."""
    source = toy(tmp_path)
    words = source / "tokenizer.json"
    first = make_plan(open_checkpoint(source), Recipe("gguf")).fingerprint
    text = words.read_text()
    parsed = json.loads(text)
    parsed["model"]["merges"].reverse()
    words.write_text(json.dumps(parsed))
    assert make_plan(open_checkpoint(source), Recipe("gguf")).fingerprint != first


@pytest.mark.parametrize("recipe", [Recipe("hf"), Recipe("safetensors")], ids=lambda r: r.format)
def test_a_folder_in_the_way_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    target = tmp_path / "x"
    for name in ("x.partial", "x.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"x.partial: is in the way"):
        run(plan(recipe), target)
    shutil.rmtree(tmp_path / "x.partial")
    run(plan(recipe), target)
    run(plan(recipe), target, overwrite=True)
    assert (tmp_path / "x.replaced" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if "manifest" not in path.name) == ["x", "x.replaced"]


def test_what_an_interrupted_overwrite_left_is_cleared_away(tmp_path: Path) -> None:
    target = run(plan(Recipe("hf")), tmp_path / "x")
    shutil.copytree(target, tmp_path / ".x.replaced-by-neoxconv")
    run(plan(Recipe("hf")), target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_values_that_were_allowed_are_checked_again_when_they_are_not(tmp_path: Path) -> None:
    made = make_plan(open_checkpoint(poisoned(tmp_path, float("inf"))), Recipe("hf"))
    with pytest.raises(PowerCut):
        run(made, tmp_path / "x", allow_nonfinite=True, progress=cut_after(70), jobs=1)
    with pytest.raises(NeoxconvError, match="3 values"):
        run(made, tmp_path / "x")
    run(made, tmp_path / "x", allow_nonfinite=True)


def test_a_step_beyond_float16_is_found(tmp_path: Path) -> None:
    source = toy(tmp_path, dtype="BF16")
    for file in source.glob("*/layer_02*"):
        state = torch.load(file, weights_only=True)
        state["mlp.dense_h_to_4h.weight"][0, 0] = -1e5
        torch.save(state, file)
    with pytest.raises(NeoxconvError, match=r"dense_h_to_4h.weight has .* not finite as Q4_1"):
        run(make_plan(open_checkpoint(source), Recipe("gguf", type="Q4_1")), tmp_path / "x.gguf")
    run(make_plan(open_checkpoint(source), Recipe("gguf", type="Q8_0")), tmp_path / "y.gguf")


def test_an_existing_target_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_text("mine")
    with pytest.raises(PlanError, match="--overwrite"):
        run(plan(Recipe("safetensors")), target)
    assert target.read_text() == "mine"
    run(plan(Recipe("safetensors")), target, overwrite=True)
    assert verify_bytes(target).passed
    folder = run(plan(Recipe("hf")), tmp_path / "hf")
    (folder / "note").write_text("mine")
    with pytest.raises(PlanError, match="--overwrite"):
        run(plan(Recipe("hf")), folder)
    with pytest.raises(PlanError, match="did not make: note"):
        run(plan(Recipe("hf")), folder, overwrite=True)
    assert (folder / "note").read_text() == "mine"
    (folder / "note").unlink()
    run(plan(Recipe("hf")), folder, overwrite=True)
    assert verify_bytes(folder).passed


def test_an_empty_folder_counts_as_absent_for_a_folder_target(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    run(plan(Recipe("hf")), tmp_path / "hf")
    (tmp_path / "folder").mkdir()
    made = run(plan(Recipe("gguf")), tmp_path / "folder")
    assert made.parent == tmp_path / "folder" and made.suffix == ".gguf"


def test_a_place_without_a_name_is_none_for_a_target() -> None:
    with pytest.raises(PlanError, match="is no place for a target"):
        run(plan(Recipe("hf")), "/")


def test_the_halves_of_a_run_tell_what_was_done_and_what_overflowed(tmp_path: Path) -> None:
    """What the command line shows without reading the manifest back."""
    source = toy(tmp_path, dtype="BF16")
    for file in source.glob("*/layer_02*"):
        state = torch.load(file, weights_only=True)
        state["mlp.dense_h_to_4h.weight"][0, 0] = 1e3
        torch.save(state, file)
    made = make_plan(open_checkpoint(source), Recipe("float8", scale="none"))
    with pytest.raises(PowerCut):
        run(made, tmp_path / "x", jobs=1, progress=cut_after(9))
    conversion = prepare(made, tmp_path / "x")
    assert conversion.count_done() < len(made.steps) and not (tmp_path / "x").exists()
    done = carry_out(conversion)
    assert done.target == tmp_path / "x" and list(done.overflow.values()) == [2]  # one on each rank
    manifest = read_manifest(tmp_path / "x")
    assert manifest and done.overflow == overflows(manifest["files"])


def test_the_plan_knows_every_byte_before_it_writes(tmp_path: Path) -> None:
    for number, recipe in enumerate(RECIPES):
        made = plan(recipe)
        target = run(made, tmp_path / str(number))
        if target.is_file():
            assert made.sizes == {made.files[0].name: target.stat().st_size}
            continue
        found = {str(p.relative_to(target)): p.stat().st_size for p in target.rglob("*") if p.is_file()}
        assert found.pop("manifest.json") and found == made.sizes


@pytest.mark.parametrize("flip", [10, 5_000, 300_000])
def test_any_flipped_byte_of_a_target_is_found_and_named(flip: int, tmp_path: Path) -> None:
    target = run(plan(Recipe("safetensors")), tmp_path / "x.safetensors")
    data = bytearray(target.read_bytes())
    data[flip] ^= 1
    target.write_bytes(data)
    report = verify_bytes(target)
    assert len(report.findings) == 1
    assert ("gpt_neox" in str(report.findings[0])) == (flip > 10_000)


def test_the_manifests_ranges_cover_every_file(tmp_path: Path) -> None:
    target = run(plan(Recipe("slim")), tmp_path / "slim")
    for file in json.loads((target / "manifest.json").read_text())["files"]:
        position = 0
        for part in file["ranges"]:
            assert part["offset"] == position
            position += part["bytes"]
        assert position == file["bytes"] == (target / file["name"]).stat().st_size


def poisoned(tmp_path: Path, value: float, count: int = 3) -> Path:
    """A copy of the checkpoint with values that are not finite (or too large for fp16, in a bf16 one)."""
    step = tmp_path / "source" / "global_step10"
    shutil.copytree(source() / "global_step10", step, ignore=shutil.ignore_patterns("*optim*"))
    shutil.copy(source().parent / "tiny_tokenizer.json", step / "tokenizer.json")
    for file in step.glob("layer_03-model_01*"):
        state = torch.load(file, weights_only=True)
        kind = torch.float16 if not np.isfinite(value) else torch.bfloat16
        state["mlp.dense_h_to_4h.weight"] = state["mlp.dense_h_to_4h.weight"].to(kind)
        state["mlp.dense_h_to_4h.weight"].view(-1)[:count] = value
        torch.save(state, file)
    if np.isfinite(value):
        other = step / "layer_03-model_00-model_states.pt"
        state = torch.load(other, weights_only=True)
        state["mlp.dense_h_to_4h.weight"] = state["mlp.dense_h_to_4h.weight"].bfloat16()
        torch.save(state, other)
    return step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("recipe", [Recipe("hf", dtype="F16"), Recipe("gguf", type="F16")], ids=lambda r: r.format)
def test_values_that_are_not_finite_stop_the_run(value: float, recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(poisoned(tmp_path, value))
    with pytest.raises(NeoxconvError, match=r"gpt_neox.layers.1.mlp.dense_h_to_4h.weight has 3 values"):
        run(make_plan(checkpoint, recipe), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    run(make_plan(checkpoint, recipe), tmp_path / "x", allow_nonfinite=True)
    assert verify_bytes(tmp_path / "x").passed


def test_nan_is_found_before_it_is_quantized(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(poisoned(tmp_path, float("nan")))
    with pytest.raises(NeoxconvError, match="3 values"):
        run(make_plan(checkpoint, Recipe("gguf", type="Q8_0")), tmp_path / "x")


def test_memory_lowers_the_jobs_before_slabs_get_small() -> None:
    assert budget_for(2, 512 * MIB).jobs == 2
    few = budget_for(64, 300 * MIB)
    assert few.jobs < 64 and few.slab >= MIB and few.peak <= 300 * MIB
    with pytest.raises(PlanError, match="at least"):
        budget_for(1, 50 * MIB)


def test_a_source_cut_short_during_the_run_is_named(tmp_path: Path) -> None:
    step = tmp_path / "global_step10"
    shutil.copytree(source() / "global_step10", step, ignore=shutil.ignore_patterns("*optim*"))
    made = make_plan(open_checkpoint(step, config=[source() / "global_step10/configs/tiny20B.yml"]), Recipe("hf"))
    with open(step / "layer_04-model_01-model_states.pt", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(CheckpointError, match="layer_04-model_01"):
        run(made, tmp_path / "x")

"""Targets in an object store: whole objects, the manifest last, continued after an interruption."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes
from neoxconv.cli.main import main
from neoxconv.engine.plan import Plan
from neoxconv.engine.workplace import work_of
from neoxconv.errors import CheckpointError, NeoxconvError, PlanError
from neoxconv.storage import Remote, place, protocols, requests
from tests.clusters import Cluster, cluster
from tests.far import SECRET, s3, upload
from tests.helpers import digests, few
from tests.toy import toy

__all__ = ["cluster", "s3"]
RECIPES = (
    Recipe("hf", shard_size=100_000), Recipe("safetensors"), Recipe("slim"), Recipe("gguf", type="Q8_0"),
    Recipe("gguf", type="F16", split_size=100_000), Recipe("bnb", type="NF4", double_quant=True),
    Recipe("ctranslate2"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is where files are made."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(open_checkpoint(toy(tmp_path)), RECIPES[0])


def fetched(target: Remote, folder: Path) -> dict[str, str]:
    """The digests of a target in a store, copied to `folder`."""
    target.fs.invalidate_cache()
    target.fs.get(target.path, str(folder), recursive=True)
    return digests(folder)


def objects(target: Remote) -> list[str]:
    """The names of what is in the store."""
    target.fs.invalidate_cache()
    return sorted(name.removeprefix(f"{target.path}/") for name in target.fs.find(target.path))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of objects that are written from now on, in their order."""
    from neoxconv.storage import remote

    paths, store = list[str](), remote.write_object

    def storing(fs: Any, path: str, source: Any, **how: Any) -> None:
        store(fs, path, source, **how)
        paths.append(path)

    monkeypatch.setattr(remote, "write_object", storing)
    return paths


@pytest.mark.parametrize(
    "recipe", few(RECIPES, *RECIPES[:2], RECIPES[4]), ids=lambda r: f"{r.format}{' split' * bool(r.split_size)}"
)
def test_a_store_gets_the_same_bytes(s3: Any, recipe: Recipe, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(toy(tmp_path)), recipe)
    name = f"{recipe.format}-{recipe.split_size}" + f".{recipe.format}" * plan.single
    target = place(f"s3://bucket/made/{name}")
    assert isinstance(target, Remote)
    told: list[int] = []
    assert run(plan, f"s3://bucket/made/{name}", progress=told.append) == target
    assert fetched(target, tmp_path / "there") == digests(run(plan, tmp_path / "here"))
    assert sum(told) == sum(step.nbytes for step in plan.steps)
    assert verify_bytes(target).passed
    assert not work_of(target).exists()


def test_the_manifest_comes_last_and_a_loader_s_files_after_the_weights(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = watched(monkeypatch)
    run(plan, "memory://order/hf")
    names = [path.rpartition("/")[2] for path in order]
    assert len(plan.files) > 2 and names[-1] == "manifest.json"
    assert all(name.endswith(".safetensors") for name in names[: len(plan.files)])
    assert set(names[len(plan.files) : -1]) == set(plan.sidecars)


def test_what_was_sent_is_not_made_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neoxconv.storage import remote

    whole = digests(run(plan, tmp_path / "whole"))
    store, sent = remote.write_object, []

    def failing(fs: Any, path: str, *rest: Any, **more: Any) -> None:
        if len(sent) == 2:
            raise PermissionError(f"{path}?key={SECRET}")
        sent.append(path)
        store(fs, path, *rest, **more)

    target = place("memory://again/hf")
    assert isinstance(target, Remote)
    with monkeypatch.context() as patched:
        patched.setattr(remote, "write_object", failing)
        with pytest.raises(CheckpointError, match=r"memory://again/hf/.*: may not be written \(403\)") as caught:
            run(plan, target)
        assert SECRET not in str(caught.value)
    assert not (target / "manifest.json").exists() and len(objects(target)) == 2
    again = watched(monkeypatch)
    told: list[int] = []
    run(plan, place("memory://again/hf"), progress=told.append)
    assert len(sent + again) == len({*sent, *again}) == len(plan.files) + len(plan.sidecars) + 1
    assert fetched(target, tmp_path / "there") == whole and not work_of(target).exists()
    assert sum(told) == sum(step.nbytes for step in plan.steps)


def test_unfinished_work_for_one_store_gives_no_right_to_another(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from neoxconv.engine import upload

    other = place("memory://another/hf")
    assert isinstance(other, Remote)
    (other / "model.safetensors").write(b"a stranger's")
    with monkeypatch.context() as patched:
        patched.setattr(upload, "send_last", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(plan, "memory://mine/hf")
    assert work_of(other).is_dir()  # the same name here
    with pytest.raises(PlanError, match="memory://another/hf: exists already"):
        run(plan, place("memory://another/hf"))
    assert objects(other) == ["model.safetensors"]
    run(plan, "memory://mine/hf")


def test_an_object_that_is_gone_is_made_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes are a hint; what the store has is the proof."""
    from neoxconv.engine import upload

    target = place("memory://gone/hf")
    assert isinstance(target, Remote)
    with monkeypatch.context() as patched:
        patched.setattr(upload, "send_last", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(plan, target)
    target.fs.rm(f"{target.path}/{plan.files[1].name}")
    run(plan, place("memory://gone/hf"))
    assert fetched(target, tmp_path / "there") == digests(run(plan, tmp_path / "here"))


def test_what_is_there_is_left_alone(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    run(plan, "memory://bucket/taken/hf")
    before = objects(place("memory://bucket/taken/hf"))  # type: ignore[arg-type]
    for target in ("memory://bucket/taken/hf", "memory://bucket/taken"):
        with pytest.raises(PlanError, match="exists already, and a store cannot replace it all at once"):
            run(plan, target)
    with pytest.raises(PlanError, match="--overwrite is for targets on a disk"):
        run(plan, "memory://bucket/taken/hf", overwrite=True)
    source = str(plan.checkpoint.opening.path)
    assert main(["convert", source, "memory://bucket/taken/hf", "--to", "hf", "--overwrite"]) == 1
    assert "--overwrite is for targets on a disk" in capsys.readouterr().err
    assert main(["convert", source, "https://example.invalid/x", "--to", "hf"]) == 1
    assert "a web server takes no files; give a store" in capsys.readouterr().err
    assert objects(place("memory://bucket/taken/hf")) == before  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("memory://bucket", "names a bucket"),
        ("s3://bucket/", "names a bucket"),
        ("s3://bucket/a/../x", "a store knows no `.` and no `..`"),
        ("memory://source/hf/inside", "lies in the source"),
    ],
)
def test_places_that_are_none_for_a_target(target: str, words: str, plan: Plan, capsys: Any) -> None:
    source = "memory://source/hf"
    if not place(source).exists():
        run(plan, source)
    assert main(["convert", source, target, "--to", "hf"]) == 1
    assert words in capsys.readouterr().err


def interrupted(plan: Plan, target: str, **options: Any) -> None:
    """Run until all but the manifest is in the store."""
    from neoxconv.engine import upload

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upload, "send_last", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(plan, target, **options)


def test_another_recipe_does_not_continue_in_the_same_place(plan: Plan) -> None:
    interrupted(plan, "memory://two/hf")
    with pytest.raises(PlanError, match="exists already"):
        run(make_plan(plan.checkpoint, Recipe("hf")), place("memory://two/hf"))


def test_what_was_sent_unchecked_is_made_again_where_it_is_to_be_checked(tmp_path: Path) -> None:
    source = toy(tmp_path, dtype="BF16")
    layer = next(source.rglob("layer_03-model_00*"))
    data = bytearray(layer.read_bytes())
    middle = len(data) // 4 * 2
    data[middle : middle + 64] = b"\x00\x7f" * 32
    layer.write_bytes(data)
    plan = make_plan(open_checkpoint(source), Recipe("hf", dtype="F16"))
    interrupted(plan, "memory://unchecked/hf", allow_nonfinite=True)
    with pytest.raises(NeoxconvError, match="values that are not finite"):
        run(plan, place("memory://unchecked/hf"))


def test_a_source_that_changes_after_the_check_is_not_mixed_with_what_was_sent_before(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the halves of a run there may be an hour, in which `--check` reads the source."""
    from neoxconv.engine import run as engine

    interrupted(plan, "memory://between/hf")
    conversion, sent = engine.prepare(plan, "memory://between/hf"), watched(monkeypatch)
    file = plan.checkpoint.index.files[0].storage.path
    os.utime(str(file), ns=(0, 0))
    engine.carry_out(conversion)
    assert len(sent) == len(plan.files) + len(plan.sidecars) + 1


def test_an_object_that_another_writes_over_is_noticed_before_the_manifest(plan: Plan) -> None:
    from neoxconv.engine import run as engine

    target, check = place("memory://over/hf"), engine.check_sources

    def write_over(plan: Plan) -> None:
        (target / plan.files[0].name).write(b"another's")  # type: ignore[union-attr]
        check(plan)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "check_sources", write_over)
        with pytest.raises(NeoxconvError, match="is not what was sent; something else writes there"):
            run(plan, target)
    assert not (place("memory://over/hf") / "manifest.json").exists()


def test_no_part_of_an_object_is_left_where_its_reading_fails(s3: Any, tmp_path: Path) -> None:
    import fsspec

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(size)

    fs = fsspec.filesystem("s3")
    stopped = threading.Event()
    stopped.set()
    for source, stop in ((Broken(bytes(40 << 20)), threading.Event()), (io.BytesIO(bytes(40 << 20)), stopped)):
        with pytest.raises((OSError, requests.Unusable)):
            protocols.write_object(fs, "bucket/broken/x", source, size=40 << 20, stop=stop)
        assert not s3.list_objects_v2(Bucket="bucket", Prefix="broken").get("KeyCount")


def test_the_command_line_sends_and_verifies(s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(toy(tmp_path))
    command = ["convert", source, "s3://bucket/cli/hf", "--to", "hf", "--shard-size", "100kB"]
    assert main([*command, "--dry-run"]) == 0
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["target"] == "s3://bucket/cli/hf"
    assert main(["verify", source, "s3://bucket/cli/hf"]) == 0
    assert main(["convert", "s3://bucket/cli/hf", "s3://bucket/cli/x.gguf", "--to", "gguf", "--quiet"]) == 0
    assert main(["verify", "s3://bucket/cli/hf", "s3://bucket/cli/x.gguf", "--quiet"]) == 0


def test_workers_read_anew_a_source_that_was_uploaded_anew(s3: Any, cluster: Cluster, tmp_path: Path) -> None:
    """Its headers are the same, so the plan is; only the store tells."""
    source, executor = toy(tmp_path), f"dask://{cluster.address}"
    layer = next(source.rglob("layer_03-model_00*"))
    data = bytearray(layer.read_bytes())
    for name in ("before", "after"):
        url = upload(s3, source, "anew")
        run(make_plan(open_checkpoint(url), Recipe("slim", tp=1)), tmp_path / name, executor=executor)
        expected = digests(run(make_plan(open_checkpoint(source), Recipe("slim", tp=1)), tmp_path / f"{name}-here"))
        assert digests(tmp_path / name) == expected
        data[len(data) // 2] ^= 1
        layer.write_bytes(data)


def test_a_disk_that_holds_no_two_files_is_said_before(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(PlanError, match=r"two files are made here at a time, .* and 1000 bytes are free"):
        run(plan, "memory://small/hf")


def test_a_cluster_sends_whole_files(s3: Any, cluster: Cluster, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(toy(tmp_path)), RECIPES[0])
    target = place("s3://bucket/cluster/hf")
    assert isinstance(target, Remote)
    run(plan, target, executor=f"dask://{cluster.address}")
    assert fetched(target, tmp_path / "there") == digests(run(plan, tmp_path / "here"))


def test_a_full_disk_here_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from neoxconv.engine import sent

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sent, "begin_file", full)
    with pytest.raises(NeoxconvError, match="make room and run the same command again") as caught:
        run(plan, "memory://full/hf")
    assert str(caught.value).startswith(f"{work_of(place('memory://full/hf'))}: No space left on device: ")

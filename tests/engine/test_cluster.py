"""Runs on a Dask cluster of real worker processes: the same bytes as here, whatever becomes of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.engine.cluster import Errand, origin_of, run_errand
from neoxconv.engine.workplace import partial_of
from neoxconv.errors import NeoxconvError, PlanError
from tests.clusters import Cluster, cluster
from tests.helpers import digests
from tests.toy import toy

pytest.importorskip("distributed")
__all__ = ["cluster"]
RECIPES = (Recipe("gguf", type="Q8_0"), Recipe("hf", shard_size=3_000_000), Recipe("slim"), Recipe("bnb", type="NF4"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("source"), layers=6, hidden=256, rows=2048)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.format)
def test_a_cluster_writes_the_same_bytes(cluster: Cluster, source: Path, recipe: Recipe, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(source, norms="fold" if recipe.format == "hf" else "mean"), recipe)
    told: list[int] = []
    run(plan, tmp_path / "there", executor=f"dask://{cluster.address}", progress=told.append)
    assert digests(tmp_path / "there") == digests(run(plan, tmp_path / "here"))
    assert sum(told) == sum(step.nbytes for step in plan.steps)


def test_a_worker_that_dies_in_the_middle_is_replaced(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    cluster.start_worker()
    plan, told = make_plan(open_checkpoint(source), RECIPES[0]), []

    def kill_one(count: int) -> None:
        told.append(count)
        if len(told) == 5:
            cluster.kill_worker()

    run(plan, tmp_path / "there", executor=f"dask://{cluster.address}", progress=kill_one)
    assert digests(tmp_path / "there") == digests(run(plan, tmp_path / "here"))


def test_a_run_on_a_cluster_continues_here_and_the_other_way(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    plan, target = make_plan(open_checkpoint(source), RECIPES[1]), tmp_path / "x"
    whole = digests(run(plan, tmp_path / "whole"))

    class Enough(Exception):
        pass

    for executor in (None, f"dask://{cluster.address}"):
        said: list[int] = []

        def stop(count: int, said: list[int] = said) -> None:
            said.append(count)
            if sum(said) > plan.total / 3:
                raise Enough

        with pytest.raises(Enough):
            run(plan, target, jobs=1, executor=executor, progress=stop)
        assert partial_of(target).is_dir()
    assert digests(run(plan, target, executor=f"dask://{cluster.address}")) == whole


def test_the_command_line_takes_a_scheduler(
    cluster: Cluster, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are ours, not the workers'."""
    monkeypatch.chdir(source.parent)
    options = ["--to", "gguf", "--type", "Q8_0", "--executor", f"dask://{cluster.address}"]
    assert main(["convert", source.name, str(tmp_path / "x.gguf"), *options]) == 0
    assert main(["verify", source.name, str(tmp_path / "x.gguf")]) == 0
    assert f"on each worker of dask://{cluster.address}" in capsys.readouterr().err


def test_values_that_stop_a_run_stop_it_from_a_worker(cluster: Cluster, tmp_path: Path) -> None:
    """Weights beyond float16, as in a bfloat16 model."""
    source = toy(tmp_path, dtype="BF16")
    layer = next(source.rglob("layer_03-model_00*"))
    data = bytearray(layer.read_bytes())
    middle = len(data) // 4 * 2
    data[middle : middle + 64] = b"\x00\x7f" * 32  # 1.7e38, in the middle of the largest record
    layer.write_bytes(data)
    plan = make_plan(open_checkpoint(source), Recipe("hf", dtype="F16"))
    with pytest.raises(NeoxconvError, match="values that are not finite as F16"):
        run(plan, tmp_path / "x", executor=f"dask://{cluster.address}")
    assert not (tmp_path / "x").exists()


def test_a_worker_that_comes_to_another_plan_refuses(cluster: Cluster, tmp_path: Path) -> None:
    """The source's tokenizer was changed after the plan was made."""
    plan = make_plan(open_checkpoint(toy(tmp_path)), Recipe("hf"))
    words = tmp_path / "toy" / "tokenizer.json"
    words.write_text(words.read_text() + " ")
    with pytest.raises(PlanError, match="a worker comes to another plan; it must see the same files"):
        run(plan, tmp_path / "x", executor=f"dask://{cluster.address}")


def test_a_worker_that_does_not_see_the_target_says_so(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(source), Recipe("hf"))
    errand = Errand(
        origin=origin_of(plan), number=0, folder=tmp_path / "elsewhere", known={}, slab=1 << 20, checks=frozenset()
    )
    with pytest.raises(NeoxconvError, match=r"is not there on worker .*; the workers of a cluster must see"):
        run_errand(errand)


def test_a_tokenizer_of_a_relative_path_is_found_by_workers(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy(tmp_path)
    (tmp_path / "here").mkdir()
    (source / "tokenizer.json").rename(tmp_path / "here" / "words.json")
    monkeypatch.chdir(tmp_path / "here")
    plan = make_plan(open_checkpoint(source), Recipe("gguf", type="F16", tokenizer=Path("words.json")))
    run(plan, tmp_path / "there.gguf", executor=f"dask://{cluster.address}")
    assert digests(tmp_path / "there.gguf") == digests(run(plan, tmp_path / "here.gguf"))


def test_a_scheduler_that_dies_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    own = Cluster(tmp_path / "own")
    plan = make_plan(open_checkpoint(source), RECIPES[0])
    try:
        own.start_scheduler()
        own.start_worker()
        with pytest.raises(NeoxconvError, match="the scheduler is gone; start it and run the same command again"):
            run(plan, tmp_path / "x", executor=f"dask://{own.address}", progress=lambda n: own.processes[0].kill())
    finally:
        own.stop()
    assert not (tmp_path / "x").exists()


def test_no_scheduler_is_said_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neoxconv.engine.cluster.PATIENCE", 0.5)
    plan = make_plan(open_checkpoint(source), RECIPES[2])
    with pytest.raises(PlanError, match=r"dask://127.0.0.1:9: no Dask scheduler answers there"):
        run(plan, tmp_path / "x", executor="dask://127.0.0.1:9")
    for address in ("tcp://a:1", "dask://", "dask://host"):
        assert main(["convert", str(source), str(tmp_path / "x"), "--to", "hf", "--executor", address]) == 2


def test_codes_chosen_together_are_the_same_there(cluster: Cluster, tmp_path: Path) -> None:
    source, made = toy(tmp_path, layers=2, hidden=64), tmp_path / "cal.gguf"
    assert main(["calibrate", str(source), "-o", str(made), "--covariance", "--quiet"]) == 0
    plan = make_plan(open_checkpoint(source), Recipe("gguf", type="Q4_0", calibration=made))
    run(plan, tmp_path / "there.gguf", executor=f"dask://{cluster.address}")
    assert digests(tmp_path / "there.gguf") == digests(run(plan, tmp_path / "here.gguf"))

"""`inspect`: what a source is, from names and headers only."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.inspect import generation, inspect, render
from neoxconv.cli.main import main
from neoxconv.words import parse_size, size, table
from tests.fixtures import fixture

# What the READMEs of the fixtures say of them.
KINDS: dict[str, dict[str, Any]] = {
    "neox_2022_tp2_pp4": {"tensor_parallel": 2, "pipeline_parallel": 4, "layout": "pipeline", "names": "legacy"},
    "neox_2022_sequential_tp2": {"tensor_parallel": 2, "pipeline_parallel": 1, "layout": "sequential"},
    "neox_2026_bf16_tp2_pp2": {"pipeline_parallel": 2, "names": "gpt-neox since 2024-09"},
    "trained_tp2_pp4": {"tensor_parallel": 2, "pipeline_parallel": 4, "layout": "pipeline"},
}


def facts_of(path: Path) -> dict[str, Any]:
    return inspect(open_checkpoint(path))


@pytest.mark.parametrize("name", KINDS)
def test_it_says_what_a_checkpoint_is(name: str) -> None:
    assert facts_of(fixture(f"{name}/checkpoints"))["source"].items() >= KINDS[name].items()


def test_an_architecture_may_have_one_spelling_only() -> None:
    found = open_checkpoint(fixture("neox_2022_tp2_pp4/checkpoints"))
    weights = tuple(replace(weight, source=weight.source[:1]) for weight in found.architecture.weights)
    assert generation(replace(found, architecture=replace(found.architecture, weights=weights))) == "legacy"


@pytest.mark.parametrize("name", KINDS)
def test_every_file_and_every_byte_is_of_one_kind(name: str) -> None:
    folder = fixture(f"{name}/checkpoints")
    files = [path for path in folder.rglob("*") if path.is_file()]
    facts = facts_of(folder)["files"]
    found = {kind["kind"]: kind for kind in facts}
    assert sum(kind["count"] for kind in facts) == len(files)
    assert sum(kind["bytes"] for kind in facts) == sum(path.stat().st_size for path in files)
    optimizer = [path.stat().st_size for path in files if "optim_states" in path.name]
    expected = {"kind": "optimizer states", "count": len(optimizer), "bytes": sum(optimizer)}
    assert found.get("optimizer states", expected) == expected and ("optimizer states" in found) == bool(optimizer)


@pytest.mark.parametrize("name", KINDS)
def test_it_tells_the_step_and_the_type(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fixture(f"{name}/checkpoints")
    facts, step = facts_of(folder), int((folder / "latest").read_text().removeprefix("global_step"))
    dtype = "BF16" if "bf16" in name else "F16"
    assert (facts["source"]["step"], facts["dtype"], facts["bits_per_weight"]) == (step, dtype, 16)
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{dtype}, 16.00 bits per weight" in shown and re.search(rf"step +{step:,}\n", shown)
    assert f"{facts['config']['rows']:,} rows" in shown


def test_without_bookkeeping_the_folder_tells_the_step(tmp_path: Path) -> None:
    copy = tmp_path / "global_step143000"
    shutil.copytree(fixture("neox_2022_tp2_pp4/checkpoints/global_step10"), copy)
    for path in copy.glob("mp_rank*"):
        path.unlink()
    assert facts_of(copy)["source"]["step"] == 143000
    copy.rename(tmp_path / "copy")
    assert facts_of(tmp_path / "copy")["source"]["step"] is None
    assert "step" not in render(facts_of(tmp_path / "copy"), every_tensor=False).split("config\n")[0]


def test_of_gguf_it_tells_what_is_stored(tmp_path: Path) -> None:
    """Vectors are F32 there, whatever a conversion to another format makes of them."""
    source = open_checkpoint(fixture("trained_tp2_pp4/checkpoints"))
    target = run(make_plan(source, Recipe("gguf", type="Q4_K_M")), tmp_path / "model.gguf")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    stored = gguf.GGUFReader(target).tensors
    facts = facts_of(target)
    found = sorted((tensor["dtype"], tensor["bytes"]) for tensor in facts["tensors"])
    assert found == sorted((tensor.tensor_type.name, tensor.n_bytes) for tensor in stored)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in stored) / sum(int(tensor.n_elements) for tensor in stored)
    assert facts["bits_per_weight"] == pytest.approx(bits) and facts["dtype"] == "Q4_K"
    words = facts["vocabulary"]
    assert words == {"rows": source.config.rows, "said": source.config.rows}
    assert f"{words['rows']:,} rows, {words['said']:,} by its settings" in render(facts, every_tensor=False)


def test_a_stale_vocabulary_is_shown_beside_the_rows(tmp_path: Path) -> None:
    source = open_checkpoint(fixture("neox_2022_tp2_pp4/checkpoints"))
    target = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"vocab_size": 500}))
    facts = facts_of(target)
    assert facts["vocabulary"] == {"rows": 512, "said": 500}
    assert any("500" in note and "512" in note for note in facts["notes"])


def test_optimizer_files_are_never_opened(tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(fixture("neox_2022_tp2_pp4/checkpoints"), copy)
    for path in copy.rglob("*optim_states*"):
        path.unlink()
        path.symlink_to("/dev/null")  # not a file: opening it as one fails
    assert main(["inspect", str(copy)]) == 0


def test_groups_and_tensors_count_the_same_bytes() -> None:
    facts = facts_of(fixture("neox_2022_tp2_pp4/checkpoints"))
    assert sum(group["bytes"] for group in facts["groups"]) == sum(tensor["bytes"] for tensor in facts["tensors"])
    assert sum(group["count"] for group in facts["groups"]) == len(facts["tensors"])
    assert 0 < facts["rank_difference"] < 0.1


@pytest.mark.parametrize("format", ["hf", "safetensors", "gguf"])
def test_every_readable_format_can_be_inspected(format: str, tmp_path: Path) -> None:
    source = open_checkpoint(fixture("neox_2022_tp2_pp4/checkpoints"))
    target = run(make_plan(source, Recipe(format)), tmp_path / f"model.{format}")
    facts = facts_of(target)
    assert facts["source"]["format"] == format and facts["parameters"] == inspect(source)["parameters"]
    assert render(facts, every_tensor=True)


def test_json_and_tables_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(fixture("neox_2026_bf16_tp2_pp2/checkpoints"))
    assert main(["inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["inspect", folder, "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert f"{facts['parameters']:,}" in shown and "TP 2, PP 2 (pipeline)" in shown
    assert all(tensor["name"] in shown for tensor in facts["tensors"])
    assert all(kind["kind"] in shown for kind in facts["files"])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("1.5 G", 15 * 10**8),
        ("41112854242", 41112854242),
        ("10b", 10),
        ("0", None),
        ("-5GB", None),
        ("5 apples", None),
        ("", None),
    ],
)
def test_sizes_as_people_write_them(text: str, count: int | None) -> None:
    assert parse_size(text) == count


def test_sizes_as_people_read_them() -> None:
    assert [size(count) for count in (0, 1023, 1024, 41_112_854_242)] == [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "38.29 GiB",
    ]
    assert size(308_033_580_802) == "286.88 GiB"


def test_a_table_has_straight_columns() -> None:
    assert table("<>", [("name", 1), ("n", 1000)]) == "  name     1\n  n     1000"

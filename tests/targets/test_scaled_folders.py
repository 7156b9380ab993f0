"""Quantized folders: interrupted, in shards, with parts that do not fit, of values that a type does not have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from neoxconv import Recipe, open_checkpoint, verify_bytes
from neoxconv.cli.main import main
from neoxconv.engine.journal import Journal
from neoxconv.engine.manifest import overflows
from neoxconv.engine.workplace import partial_of
from neoxconv.errors import CheckpointError, NeoxconvError
from tests.helpers import PowerCut, cut_after, digests
from tests.scaled import (
    ALL,
    BNB,
    FILE,
    L0,
    SCALE,
    STATE,
    UP,
    Change,
    Tensors,
    assert_same,
    compared,
    edited,
    every,
    made,
    planted,
    put,
    small,
    weights,
    with_state,
)

some = pytest.mark.parametrize("name", ["NF4 double", "INT8", "E4M3 tensor"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def targets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in every type."""
    folder = tmp_path_factory.mktemp("targets")
    return {name: made(source, folder / name, recipe) for name, recipe in ALL.items()}


# --- interruptions, jobs, slabs, shards ------------------------------------------------------------------------------


@some
def test_an_interrupted_run_resumes_to_the_same_bytes(name: str, source: Path, tmp_path: Path) -> None:
    recipe = replace(ALL[name], shard_size=50_000)
    whole = digests(made(source, tmp_path / "whole", recipe))
    for count in (0, 11, 25):
        with pytest.raises(PowerCut):
            made(source, tmp_path / "cut", recipe, progress=cut_after(count), jobs=2)
    assert digests(made(source, tmp_path / "cut", recipe)) == whole


def test_a_damaged_line_of_the_journal_counts_for_nothing(
    source: Path, targets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PowerCut):
        made(source, tmp_path / "x", BNB["NF4 double"], progress=cut_after(40), jobs=1)
    journal = partial_of(tmp_path / "x") / Journal.NAME
    whole = journal.read_text()
    journal.write_text(re.sub(r'(nested_offset\\": 0\.0)[1-9]', r"\g<1>7", whole))
    assert journal.read_text() != whole
    assert digests(made(source, tmp_path / "x", BNB["NF4 double"])) == digests(targets["NF4 double"])


@some
def test_jobs_and_slabs_never_change_a_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path, hidden=56, rotary_pct=1.0)
    one = digests(made(source, tmp_path / "one", ALL[name], jobs=1))
    assert digests(made(source, tmp_path / "four", ALL[name], jobs=4)) == one
    monkeypatch.setattr("neoxconv.engine.memory.SLAB", 1000)
    assert digests(made(source, tmp_path / "small", ALL[name])) == one


@every
def test_shards_list_every_part_and_are_read(name: str, source: Path, targets: dict[str, Path], tmp_path: Path) -> None:
    folder = made(source, tmp_path / "x", replace(ALL[name], shard_size=50_000))
    places = json.loads((folder / f"{FILE}.index.json").read_text())["weight_map"]
    found: Tensors = {}
    for file in set(places.values()):
        with safe_open(folder / file, "pt") as shard:
            assert set(shard.keys()) == {key for key, place in places.items() if place == file}
            found |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    assert len(set(places.values())) > 2
    assert_same(found, load_file(targets[name] / FILE))
    assert compared(source, folder).passed


# --- parts that do not fit -------------------------------------------------------------------------------------------


def drop(*parts: str) -> Change:
    return lambda tensors: [tensors.pop(L0 + part) for part in parts]


def facts(**changes: Any) -> Change:
    return with_state(lambda text: json.dumps(json.loads(text) | changes))


MISFITS: dict[str, tuple[str, Change, str]] = {
    "no absmax": ("NF4", drop("weight.absmax"), "lacks HERE.weight.absmax"),
    "no table": ("FP4", drop("weight.quant_map"), "lacks HERE.weight.quant_map"),
    "no nested scales": ("NF4 double", drop("weight.nested_absmax"), "lacks HERE.weight.nested_absmax"),
    "short absmax": ("NF4", put("weight.absmax", lambda t: t[:-1]), "HERE.weight.absmax is F32 [63]; expected"),
    "no state": ("NF4", drop(STATE), "HERE.weight.quant_state.bitsandbytes__nf4 is missing"),
    "no JSON": ("NF4", with_state(lambda text: text[:-1]), f"HERE.{STATE} is no JSON object"),
    "a list": ("NF4", with_state(lambda text: f"[{text}]"), f"HERE.{STATE} is no JSON object"),
    "huge": ("NF4", with_state(lambda text: text + " " * 5000), f"HERE.{STATE} is no JSON object of up to 4096"),
    "deep": ("NF4", with_state(lambda text: "[" * 4000), f"HERE.{STATE} is no JSON object"),
    "other blocks": ("NF4", facts(blocksize=128), "blocks of 64 weights"),
    "other nested blocks": ("NF4 double", facts(nested_blocksize=128), f"HERE.{STATE} is"),
    "wrong shape": ("NF4", facts(shape=[64, 32]), "HERE.weight.absmax is F32 [64]; expected F32 [32]"),
    "negative shape": ("NF4", facts(shape=[-64, -64]), "a shape of two sizes"),
    "endless shape": ("NF4", facts(shape=[1 << 39, 1 << 39]), "HERE.weight is U8 [2048, 1]"),
    "no such dtype": ("NF4", facts(dtype="int3"), "a dtype among"),
    "no offset": ("NF4 double", with_state(lambda text: re.sub(', "nested_offset": [^}]*', "", text)), STATE),
    "another type's state": ("NF4", facts(quant_type="fp4"), STATE),
    "no SCB": ("INT8", drop("SCB"), "HERE."),
    "only codes": ("INT8", drop("SCB", "weight_format"), "HERE.weight holds I8"),
    "short SCB": ("INT8", put("SCB", lambda t: t[:7]), "HERE.SCB is F32 [7]; expected F32 [64]"),
    "a GPU's order": ("INT8", put("weight_format", lambda t: t + 2), "HERE.weight_format"),
    "short scale": ("E4M3 channel", put("weight_scale", lambda t: t[:-2]), "HERE.weight_scale is F32 [62, 1]"),
    "two scales": ("E4M3 tensor", put("weight_scale", lambda t: t.repeat(2)), "HERE.weight_scale is F32 [2]"),
    "integers": ("E4M3 channel", put("weight", lambda t: t.view(torch.int8)), "HERE.weight is of type I8 with scales"),
    "bytes": ("INT8", put("weight", lambda t: t.view(torch.uint8)), "HERE.weight is U8 [64, 64]; expected I8"),
    "no weight": ("NF4", drop("weight"), "HERE.weight is missing"),
    "state of nothing": ("NF4", put(STATE, lambda t: t, "x."), f"x.{STATE} is not a tensor"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str, targets: dict[str, Path], tmp_path: Path) -> None:
    name, change, expected = MISFITS[case]
    folder = edited(targets[name], tmp_path / "x", change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert expected.replace("HERE.", L0) in message and str(folder) in message
    assert all(len(line) < 600 for line in message.splitlines()) and len(message.splitlines()) <= 11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCALE)
def test_scales_of_every_float_type_are_read(
    name: str, dtype: torch.dtype, targets: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(targets[name], tmp_path / "x", put(SCALE[name], lambda t: t.to(dtype)))
    np.testing.assert_allclose(weights(folder)[L0 + "weight"], weights(targets[name])[L0 + "weight"], 0.01, 0.001)


@pytest.mark.parametrize("name", ["NF4", "NF4 double"])
def test_a_state_in_another_spelling_is_read(name: str, targets: dict[str, Path], tmp_path: Path) -> None:
    shorter = with_state(lambda text: json.dumps(json.loads(text), separators=(",", ":"), sort_keys=True))
    found = weights(edited(targets[name], tmp_path / "x", shorter))
    assert np.array_equal(found[L0 + "weight"], weights(targets[name])[L0 + "weight"])


NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
KEYS = st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "x", *NESTED])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["NF4", "NF4 double"]), st.dictionaries(KEYS, ANYTHING, max_size=3), st.sets(KEYS, max_size=2))
@settings(max_examples=50)
def test_no_state_ends_in_a_traceback(
    targets: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: dict[str, Any],
    dropped: set[str],
) -> None:
    def text(before: str) -> str:
        return json.dumps({k: v for k, v in (json.loads(before) | changes).items() if k not in dropped})

    folder = edited(targets[name], tmp_path_factory.getbasetemp() / "fuzzed", with_state(text))
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)


# --- values that a type does not have --------------------------------------------------------------------------------


@every
def test_values_that_are_not_finite_stop_the_run(name: str, tmp_path: Path) -> None:
    source = planted(small(tmp_path), "mlp.dense_h_to_4h.weight", [float("inf"), float("nan")])
    with pytest.raises(NeoxconvError, match=rf"{UP} has 2 values that are not finite as"):
        made(source, tmp_path / "x", ALL[name])
    assert not (tmp_path / "x").exists()
    assert verify_bytes(made(source, tmp_path / "x", ALL[name], allow_nonfinite=True)).passed


def command(source: Path, target: Path, recipe: Recipe) -> list[str]:
    asked = [*(["--group", recipe.group] if recipe.group else []), *["--asymmetric"] * recipe.asymmetric]
    words = ["convert", str(source), str(target), "--to", recipe.format, "--type", str(recipe.type)]
    return [
        *words,
        *["--double-quant"] * recipe.double_quant,
        *(["--scale", recipe.scale] if recipe.scale else []),
        *asked,
    ]


@every
def test_weights_beyond_the_largest_number_are_counted(name: str, tmp_path: Path, capsys: Any) -> None:
    source = planted(small(tmp_path, dtype="F32"), "mlp.dense_h_to_4h.weight", [500.0, -1e5])
    words = command(source, tmp_path / "x", ALL[name])
    if name == "INT8":  # which begins with float16
        assert main(words) == 1 and f"{UP} has 1 values that are not finite as INT8" in capsys.readouterr().err
        return
    counted = {UP: {"E4M3 none": 2, "E5M2 none": 1}[name]} if "none" in name else {}
    assert main(words) == 0
    told = capsys.readouterr().out
    lines = [f"overflow {count} weight{'s' * (count > 1)} of {UP} beyond" for count in counted.values()]
    assert all(line in told for line in lines) and ("overflow" in told) == bool(lines)
    assert overflows(json.loads((tmp_path / "x" / "manifest.json").read_text())["files"]) == counted
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overflow"] == counted
    assert compared(source, tmp_path / "x").passed


# --- plans ----------------------------------------------------------------------------------------------------------


@every
def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    name: str, source: Path, targets: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    words = [*command(source, tmp_path / "x", ALL[name]), "--dry-run"]
    assert main(words) == 0 and "bytes needed" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    told = {file["name"]: file["bytes"] for file in json.loads(capsys.readouterr().out)["files"]}
    assert told == {f.name: f.stat().st_size for f in targets[name].iterdir() if f.name != "manifest.json"}
    assert not any(tmp_path.iterdir())

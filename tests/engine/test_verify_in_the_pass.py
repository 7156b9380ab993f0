"""`convert --verify`: what was just encoded is decoded and held against its weights; nothing wrong is published."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.formats import RECIPES
from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.engine.journal import Journal
from neoxconv.engine.workplace import partial_of
from neoxconv.errors import VerifyError
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.quant.feedback import encode as feedback
from tests.helpers import PowerCut, cli, cut_after, digests, with_matrix
from tests.toy import toy
from tests.twins import ROWS

QUANTIZED = [encoding for encoding in ENCODINGS.values() if encoding.dtype.quantized]


def name_of(recipe: Recipe) -> str:
    words = recipe.format, recipe.type, recipe.dtype, recipe.scale, recipe.group
    return "-".join(filter(None, (*words, "dq" * recipe.double_quant, "asymmetric" * recipe.asymmetric)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("verify-in-the-pass"), hidden=256, heads=4)


def is_usual(recipe: Recipe) -> bool:
    """One for each way in which weights are stored; the others are slow only because they are many."""
    kind, group = recipe.type or recipe.dtype, recipe.group or "64"
    return group == "64" and not re.match(r"Q[2-6]_K_.|Q3_K|IQ[12]_|[2356]bit|INT8_|B?FLOAT|F32", kind or "")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=() if is_usual(r) else pytest.mark.slow, id=name_of(r)) for r in RECIPES],
)
def test_what_is_right_passes_and_has_the_same_bytes(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, with_matrix(recipe, checkpoint, tmp_path))
    assert digests(run(plan, tmp_path / "a", verify=True)) == digests(run(plan, tmp_path / "b"))


@contextmanager
def damaged(encoding: Encoding | Scaled, damage: Callable[[Any], Any]) -> Iterator[None]:
    """An encoding whose encoder's results are damaged."""
    whole = encoding.encode
    object.__setattr__(encoding, "encode", lambda *rows: damage(whole(*rows)))
    try:
        yield
    finally:
        object.__setattr__(encoding, "encode", whole)


def one_bit(data: Any) -> Any:
    """The bytes with one bit turned over, in the first row's last code."""
    data = np.array(data)
    rows = data.reshape(len(data), -1).view(np.uint8)
    rows[0, -1] ^= 0x40
    return data


@pytest.mark.parametrize("kind", [*("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q2_K", "Q3_K"), *(row.name for row in ROWS)])
def test_a_code_that_was_damaged_stops_the_run(
    kind: str, recipes: dict[str, Recipe], source: Path, tmp_path: Path
) -> None:
    encoding: Encoding | Scaled = ENCODINGS[kind] if kind in ENCODINGS else SCALED[kind]
    plan, target = plan_of(recipes[kind], source), tmp_path / "x"
    with damaged(encoding, one_bit), pytest.raises(VerifyError, match=rf"weight: \d+ of \d+ weights .* as {kind}"):
        run(plan, target, verify=True, jobs=1)
    assert not target.exists()
    assert partial_of(target).exists()
    assert run(plan, target, verify=True, jobs=1).exists()


@pytest.fixture(scope="module")
def recipes(source: Path) -> dict[str, Recipe]:
    """For each encoding that a target has, a recipe that makes matrices of it."""
    checkpoint = open_checkpoint(source)
    made = [(recipe, make_plan(checkpoint, recipe).encodings) for recipe in RECIPES if recipe.format != "gguf"]
    blocks = {kind: Recipe("gguf", tensor_type=((".", kind),)) for kind in ENCODINGS}
    return blocks | {kind: recipe for recipe, kinds in made for kind in kinds}


def plan_of(recipe: Recipe, source: Path) -> Any:
    return make_plan(open_checkpoint(source), recipe)


def test_scales_that_were_damaged_stop_the_run(source: Path, tmp_path: Path) -> None:
    int8 = SCALED["INT8"]

    def doubled(tensor: Any, sizes: Any) -> Any:
        return (2 * np.asarray(sizes)).tobytes(), b"\0"

    whole = int8.finish
    object.__setattr__(int8, "finish", doubled)
    try:
        with pytest.raises(VerifyError, match="INT8"):
            run(plan_of(Recipe("bnb", type="INT8"), source), tmp_path / "x", verify=True)
    finally:
        object.__setattr__(int8, "finish", whole)


def test_what_was_written_without_the_check_is_written_again(source: Path, tmp_path: Path) -> None:
    plan = plan_of(Recipe("gguf", type="Q8_0"), source)
    with pytest.raises(PowerCut):
        run(plan, tmp_path / "x", progress=cut_after(10), jobs=1)
    assert len((partial_of(tmp_path / "x") / Journal.NAME).read_text().splitlines()) > 1
    with damaged(ENCODINGS["Q8_0"], one_bit), pytest.raises(VerifyError):
        run(plan, tmp_path / "x", verify=True, jobs=1)
    run(plan, tmp_path / "x", verify=True)


CHOSEN = (
    Recipe("gguf", type="Q4_K_S"),
    Recipe("gguf", type="Q4_0"),
    Recipe("bnb", type="NF4", double_quant=True),
    Recipe("bnb", type="INT8"),
    Recipe("float8", scale="tensor"),
)


@pytest.fixture(scope="module")
def calibration(source: Path) -> Path:
    np.save(source.parent / "tokens.npy", (np.arange(6 * 64) * 7 % 256).reshape(6, 64))
    made = source.parent / "cal.gguf"
    words = ("--tokens", source.parent / "tokens.npy", "--covariance", "--quiet")
    assert cli("calibrate", source, "-o", made, *words) == 0
    return made


@pytest.mark.parametrize("recipe", CHOSEN, ids=name_of)
def test_codes_chosen_together_are_held_against_their_moments(
    recipe: Recipe, source: Path, calibration: Path, tmp_path: Path
) -> None:
    plan = plan_of(dataclasses.replace(recipe, calibration=calibration), source)
    kind = next(s.entry.encoding for s in plan.steps if s.entry.context and s.entry.context.moments)
    assert digests(run(plan, tmp_path / "a", verify=True)) == digests(run(plan, tmp_path / "b"))
    moved = feedback.choose if isinstance(kind, Scaled) else feedback.encode

    def other(*given: Any) -> Any:
        found = np.array(moved(*given))
        found.reshape(len(found), -1).view(np.uint8)[0, -1] ^= 4
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, moved.__name__, other)
        with pytest.raises(VerifyError, match="weights are not the source's as"):
            run(plan, tmp_path / "c", verify=True)


def test_the_command_says_what_was_verified(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("convert", source, tmp_path / "x", "--to", "gguf", "--type", "Q8_0", "--verify") == 0
    assert "verified 14 tensors as they were written, 14 copied as they are" in capsys.readouterr().out
    with damaged(ENCODINGS["Q8_0"], one_bit):
        assert cli("convert", source, tmp_path / "y", "--to", "gguf", "--type", "Q8_0", "--verify") == 3
    assert "report it" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()

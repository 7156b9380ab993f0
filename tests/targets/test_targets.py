"""Laws over the rows of TARGETS, and that the command line, which does not load them, offers what they have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from neoxconv import make_plan, names, open_checkpoint
from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.joins import NORMS
from neoxconv.cli.main import commands
from neoxconv.quant import ENCODINGS
from neoxconv.targets import TAKEN_BY, TARGETS, Target
from neoxconv.targets.float8 import SCALES
from neoxconv.targets.recipe import Recipe
from tests.helpers import with_matrix
from tests.toy import toy


def test_the_names_that_the_command_line_offers_are_those_of_the_tables() -> None:
    assert tuple(TARGETS) == names.FORMATS
    types = (kind for target in TARGETS.values() for kind in target.types)
    assert tuple(dict.fromkeys(types)) == names.TARGET_TYPES
    assert TARGETS["gguf"].types == names.MIXES
    assert TARGETS["bnb"].types == names.BNB_TYPES
    assert TARGETS["float8"].types == names.FLOAT8_TYPES
    assert TARGETS["ctranslate2"].types == names.CTRANSLATE2_TYPES
    assert TARGETS["compressed-tensors"].types == names.PACKED_TYPES
    assert {recipe.group for recipe in TARGETS["compressed-tensors"].recipes} == {*names.GROUPS, None}
    assert TARGETS["mlx"].types == names.MLX_TYPES
    assert {recipe.scale for recipe in TARGETS["float8"].recipes} == set(names.SCALES) == set(SCALES)
    assert TARGETS["hf"].dtypes == TARGETS["safetensors"].dtypes == names.DTYPES
    assert set(names.TYPES) <= set(ENCODINGS)
    assert set(NORMS) == set(names.NORMS)
    assert tuple(preset for architecture in ARCHITECTURES for preset in architecture.presets) == names.PRESETS


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_says_which_options_it_takes(target: Target) -> None:
    known = {field.name for field in fields(Recipe)} | {"allow_nonfinite", "card"}
    offered = {parameter.name for parameter in commands.commands["convert"].params}
    assert set(target.options) <= known & offered
    assert ("type" in target.options) == bool(target.types)
    assert ("dtype" in target.options) == bool(target.dtypes)
    assert set(target.only_of) <= set(target.options)
    assert all(set(types) < set(target.types) for types in target.only_of.values())
    assert all(target.name in TAKEN_BY[option] for option in target.options)


@pytest.mark.parametrize(
    "recipe",
    [recipe for target in TARGETS.values() for recipe in (Recipe(target.name), *target.recipes)],
    ids=lambda recipe: "-".join(str(v) for v in (recipe.format, recipe.type or recipe.dtype, recipe.scale) if v),
)
def test_the_entries_of_a_target_are_those_that_it_plans(recipe: Recipe, tmp_path: Path) -> None:
    """`formats` tells sizes from the entries alone."""
    checkpoint = open_checkpoint(toy(tmp_path, hidden=256, layers=1))
    recipe = with_matrix(recipe, checkpoint, tmp_path)
    planned = {step.entry.name: step.entry for step in make_plan(checkpoint, recipe).steps}
    held = TARGETS[recipe.format].entries(checkpoint, recipe)
    assert {entry.name for entry in held} == set(planned)
    assert all(entry.encoding.name == planned[entry.name].encoding.name for entry in held)

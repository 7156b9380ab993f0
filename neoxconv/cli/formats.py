"""The `formats` table: every target and type, its bits for each weight, and what the 20B model takes in it.

Nothing is read for it: the released model's configuration and the architecture's table make a checkpoint of shapes
without contents, and the targets' own functions choose the encodings. Sizes are those of the tensors; containers and
tokenizer add a few megabytes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neoxconv.arch import ARCHITECTURES
from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Entry
from neoxconv.core.model import Architecture, Checkpoint, Index, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, Array
from neoxconv.targets import TARGETS
from neoxconv.targets.compressed_tensors import DYNAMIC
from neoxconv.targets.divergences import DIVERGENCES
from neoxconv.targets.mixes import MIXES
from neoxconv.targets.recipe import Recipe

_DEGREE = 2  # of the published 20B shards: what slim keeps
RECIPES = tuple(recipe for target in TARGETS.values() for recipe in target.recipes)


@dataclass(frozen=True)
class _Row:
    """One target: what chooses it, the bytes of the model's tensors, how far a weight and predictions move at most.

    `bound` is that of the layers' matrices, where one holds for all of them; `divergence` as measured; `programs` are
    those that run it.
    """

    format: str
    option: str
    type: str
    bits: float
    nbytes: int
    bound: str | None
    divergence: float | None
    programs: str


def catalog(preset: str = "20B") -> list[_Row]:
    """Every target and type, with the size of the released model `preset` in it."""
    model = shapes(preset)
    return [row(model, recipe) for recipe in RECIPES]


def row(model: Checkpoint, recipe: Recipe) -> _Row:
    """What one recipe makes of a model."""
    held = TARGETS[recipe.format].entries(model, recipe)
    nbytes = sum(entry.nbytes for entry in held)
    mixed = recipe.type in MIXES
    encoding = _linear_encoding(model, held)
    name = recipe.type if mixed or recipe.type == DYNAMIC else encoding.name if encoding.dtype.quantized else None
    return _Row(
        recipe.format,
        option="--type" if recipe.type else "--dtype",
        type=option_of(recipe),
        bits=8 * nbytes / model.parameters,
        nbytes=nbytes,
        bound=None if mixed or encoding.bound is None else str(encoding.bound),
        divergence=DIVERGENCES.get(name) if name else None,
        programs=TARGETS[recipe.format].programs,
    )


def _linear_encoding(model: Checkpoint, held: Sequence[Entry]) -> Encoding | Scaled:
    """The encoding of the first of the layers' matrices; ranks' parts, which have names of their own, are all alike."""
    linear = {weight.unified for _, weight in model.architecture.names(model.config) if weight.linear}
    return next((entry for entry in held if entry.unified in linear), held[0]).encoding


def option_of(recipe: Recipe) -> str:
    """What chooses a row of its format on the command line, behind --type or --dtype."""
    double = " --double-quant" if recipe.double_quant else ""
    scale = f" --scale {recipe.scale}" if recipe.scale else ""
    group = f" --group {recipe.group}" if recipe.group else ""
    return f"{recipe.type or recipe.dtype or ''}{double}{scale}{group}{' --asymmetric' * recipe.asymmetric}"


def shapes(preset: str) -> Checkpoint:
    """A released model's checkpoint, see `hollow_checkpoint`."""
    architecture = next(architecture for architecture in ARCHITECTURES if preset in architecture.presets)
    return hollow_checkpoint(architecture, architecture.presets[preset])


def hollow_checkpoint(architecture: Architecture, config: ModelConfig) -> Checkpoint:
    """A checkpoint of a model's shapes in float16, with nothing to read in it."""
    weights = {weight.unified: weight for _, weight in architecture.names(config)}
    tensors = {name: _hollow(tuple(config.sizes[size] for size in w.shape)) for name, w in weights.items()}
    parts = {name: weights[name].join.split(tensor, _DEGREE, config) for name, tensor in tensors.items()}
    ranks = [{name: split[rank] for name, split in parts.items()} for rank in range(_DEGREE)]
    return Checkpoint(
        opening=Opening(Path()),
        index=Index("neox", Path(), (), tuple(ranks), {}),
        architecture=architecture,
        config=config,
        tensors=tensors,
        ranks=ranks,
        dropped=(),
        notes=(),
    )


def _hollow(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor that has a shape only."""

    def read(start: int, stop: int) -> Array:
        raise AssertionError(f"rows {start} to {stop} of a tensor that has none")

    return LazyTensor(shape, F16, read, F16)

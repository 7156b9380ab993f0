"""The `formats` table: every target and type, its bits for each weight, and what the 20B model takes in it.

Nothing is read for it: the released model's configuration and the architecture's table make a checkpoint of shapes
without contents, and the targets' own functions choose the encodings. Sizes are those of the tensors; containers and
tokenizer add a few megabytes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neoxconv.arch.gpt_neox.config import PRESETS
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.core.layout import Entry
from neoxconv.core.model import Checkpoint, Index, ModelConfig, Opening, parameters
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, Array
from neoxconv.names import BNB_TYPES, DTYPES, FLOAT8_TYPES, MIXES, SCALES
from neoxconv.targets import bnb, float8, slim
from neoxconv.targets.divergences import DIVERGENCES
from neoxconv.targets.gguf import gguf_entries
from neoxconv.targets.hf import unified_entries
from neoxconv.targets.linear import quantized_entries
from neoxconv.targets.mixes import Choice
from neoxconv.targets.recipe import Recipe

DEGREE = 2  # of the published 20B shards: what slim keeps
RECIPES = (
    *(Recipe(name, dtype=dtype) for name in ("hf", "safetensors") for dtype in DTYPES),
    *(Recipe("slim", dtype=dtype) for dtype in ("F16", "BF16")),
    *(Recipe("gguf", type=mix) for mix in MIXES),
    *(Recipe("bnb", type=kind) for kind in BNB_TYPES),
    *(Recipe("bnb", type=kind, double_quant=True) for kind in BNB_TYPES if kind != "INT8"),
    *(Recipe("float8", type=kind, scale=scale) for kind in FLOAT8_TYPES for scale in SCALES),
)


@dataclass(frozen=True)
class Row:
    """One target: what chooses it, the bytes of the model's tensors, how far a weight and predictions move at most.

    `bound` is that of the layers' matrices, where one holds for all of them; `divergence` as measured.
    """

    format: str
    option: str
    type: str
    bits: float
    nbytes: int
    bound: str | None
    divergence: float | None


def catalog(preset: str = "20B") -> list[Row]:
    """Every target and type, with the size of the released model `preset` in it."""
    model = shapes(PRESETS[preset].config)
    return [row(model, recipe) for recipe in RECIPES]


def row(model: Checkpoint, recipe: Recipe) -> Row:
    """What one recipe makes of a model."""
    held = entries(model, recipe)
    nbytes = sum(entry.nbytes for entry in held)
    linear = next(entry.encoding for entry in held if "query_key_value.weight" in entry.unified)
    name = recipe.type if recipe.format == "gguf" else linear.name if linear.dtype.quantized else None
    bound = None if recipe.format == "gguf" or linear.bound is None else str(linear.bound)
    bits = 8 * nbytes / parameters(model)
    option = "--type" if recipe.type else "--dtype"
    return Row(recipe.format, option, option_of(recipe), bits, nbytes, bound, DIVERGENCES.get(name) if name else None)


def option_of(recipe: Recipe) -> str:
    """What chooses a row of its format on the command line, behind --type or --dtype."""
    scale = f" --scale {recipe.scale}" if recipe.scale else ""
    return f"{recipe.type or recipe.dtype or ''}{' --double-quant' * recipe.double_quant}{scale}"


def shapes(config: ModelConfig) -> Checkpoint:
    """A checkpoint of a model's shapes in float16, with nothing to read in it."""
    weights = {weight.unified: weight for _, weight in GPT_NEOX.names(config)}
    tensors = {name: hollow(tuple(config.sizes[size] for size in w.shape)) for name, w in weights.items()}
    parts = {name: weights[name].join.split(tensor, DEGREE, config) for name, tensor in tensors.items()}
    ranks = tuple({name: split[rank] for name, split in parts.items()} for rank in range(DEGREE))
    return Checkpoint(Opening(Path()), Index("neox", Path(), (), ranks, {}), GPT_NEOX, config, tensors, (), ())


def hollow(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor that has a shape only."""

    def read(start: int, stop: int) -> Array:
        raise AssertionError(f"rows {start} to {stop} of a tensor that has none")

    return LazyTensor(shape, F16, read, F16)


def entries(model: Checkpoint, recipe: Recipe) -> Sequence[Entry]:
    """What a target would hold of a model."""
    match recipe.format:
        case "gguf":
            return gguf_entries(model, Choice(recipe.type or "F16"))
        case "slim":
            return [entry for rank in slim.as_stored(model, recipe) for entry in rank.values()]
        case "bnb":
            return quantized_entries(model, recipe, bnb.encoding_of(recipe))
        case "float8":
            return quantized_entries(model, recipe, float8.encoding_of(recipe))
    return unified_entries(model, recipe)

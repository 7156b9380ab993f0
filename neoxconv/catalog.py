"""The `formats` table: every target and type, its bits for each weight, and what the 20B model takes in it.

Nothing is read for it: the released model's configuration and the architecture's table make a checkpoint of shapes
without contents, and the targets' own functions choose the encodings. Sizes are those of the tensors; containers and
tokenizer add a few megabytes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neoxconv.arch.gpt_neox import GPT_NEOX
from neoxconv.arch.gpt_neox_config import PRESETS
from neoxconv.checkpoint import parameters
from neoxconv.dtypes import F16, Array
from neoxconv.model import Checkpoint, Entry, Index
from neoxconv.names import FORMATS
from neoxconv.quant.mixes import DIVERGENCES, MIXES, Choice
from neoxconv.recipe import Recipe
from neoxconv.targets import slim
from neoxconv.targets.gguf import gguf_entries
from neoxconv.targets.hf import unified_entries
from neoxconv.tensor import LazyTensor

DEGREE = 2  # of the published 20B shards: what slim keeps
DTYPES = {"hf": ("F16", "BF16", "F32"), "safetensors": ("F16", "BF16", "F32"), "slim": ("F16", "BF16")}


@dataclass(frozen=True)
class Row:
    """One target: `option` is what chooses it, `nbytes` what the model's tensors take, `divergence` as measured."""

    format: str
    option: str
    type: str
    bits: float
    nbytes: int
    divergence: float | None


def catalog(preset: str = "20B") -> list[Row]:
    """Every target and type, with the size of the released model `preset` in it."""
    model = shapes(preset)
    count = parameters(model)
    rows = [("gguf", "--type", mix) for mix in MIXES] if "gguf" in FORMATS else []
    rows = [(name, "--dtype", dtype) for name in FORMATS for dtype in DTYPES.get(name, ())] + rows
    sizes = [sum(entry.nbytes for entry in entries(model, name, type_)) for name, _, type_ in rows]
    return [
        Row(*row, 8 * size / count, size, DIVERGENCES.get(row[2]) if row[0] == "gguf" else None)
        for row, size in zip(rows, sizes, strict=True)
    ]


def shapes(preset: str) -> Checkpoint:
    """A checkpoint of a released model's shapes in float16, with nothing to read in it."""
    config = PRESETS[preset].config
    weights = {weight.unified: weight for _, weight in GPT_NEOX.names(config)}
    tensors = {name: hollow(tuple(config.sizes[size] for size in w.shape)) for name, w in weights.items()}
    parts = {name: weights[name].join.split(tensor, DEGREE, config) for name, tensor in tensors.items()}
    ranks = tuple({name: split[rank] for name, split in parts.items()} for rank in range(DEGREE))
    return Checkpoint(Index("neox", Path(preset), (), ranks, {}), GPT_NEOX, config, tensors, (), ())


def hollow(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor that has a shape only."""

    def read(start: int, stop: int) -> Array:
        raise AssertionError(f"rows {start} to {stop} of a tensor that has none")

    return LazyTensor(shape, F16, read, F16)


def entries(model: Checkpoint, name: str, type_: str) -> Sequence[Entry]:
    """What the target `name` would hold of `model` in the mix or number type `type_`."""
    if name == "gguf":
        return gguf_entries(model, Choice(type_))
    if name == "slim":
        return [entry for rank in slim.as_stored(model, Recipe(name, dtype=type_)) for entry in rank.values()]
    return unified_entries(model, Recipe(name, dtype=type_))

"""Source names of weights, and the unified ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from neoxconv.core.model import Architecture, Index, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox.numbers import FIRST_LAYER
from neoxconv.sources import SOURCES
from neoxconv.storage import Place


@dataclass(frozen=True)
class _Pattern:
    """A source name of a weight as a regular expression, and how to turn its layer number into ours."""

    regex: re.Pattern[str]
    weight: Weight
    shift: int


@lru_cache(maxsize=16)
def _patterns(weights: tuple[Weight, ...], naming: str) -> tuple[_Pattern, ...]:
    """How a format spells each weight of an architecture's table."""
    found = []
    prefix, shift = (r"(\d+)\.", FIRST_LAYER) if naming == "neox" else ("", 0)
    for weight in weights:
        names = {"neox": weight.source, "unified": (weight.unified,), "gguf": (weight.gguf,)}[naming]
        for name in names:
            text = re.escape(name).replace(re.escape("{i}"), r"(\d{1,9})")
            found.append(_Pattern(re.compile(prefix + text), weight, shift))
    return tuple(found)


def spellings_of(index: Index, architecture: Architecture) -> tuple[_Pattern, ...]:
    """How a source spells the weights of an architecture."""
    return _patterns(architecture.weights, SOURCES[index.format].naming)


def count_named(index: Index, architecture: Architecture) -> int:
    """How many of the first rank's tensors have names of the architecture."""
    spellings = spellings_of(index, architecture)
    return sum(unified_name(name, spellings) is not None for name in index.ranks[0])


def name_tensors(index: Index, architecture: Architecture) -> tuple[RankTensors, list[list[str]]]:
    """Each rank's tensors by unified name, and the source names that the table does not know."""
    spellings = spellings_of(index, architecture)
    named: RankTensors = []
    left: list[list[str]] = []
    for rank, tensors in enumerate(index.ranks):
        known: dict[str, LazyTensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            unified = unified_name(name, spellings)
            if unified is None:
                unknown.append(name)
            elif unified in known:
                raise CheckpointError(
                    f"{home(index, rank, name)}: {name} gives {unified} a second time; remove one of them."
                )
            else:
                known[unified] = tensor
        named.append(known)
        left.append(unknown)
    return named, left


def unified_name(name: str, spellings: Sequence[_Pattern]) -> str | None:
    """The unified name of the source's `name`, or None where the table has none."""
    for spelling in spellings:
        if match := spelling.regex.fullmatch(name):
            layer = int(match[1]) - spelling.shift if spelling.weight.stage == "layer" else 0
            return spelling.weight.unified_at(layer)
    return None


def home(index: Index, rank: int, name: str) -> Place:
    """The file that holds (or should hold) a rank's tensor, as well as names tell."""
    if SOURCES[index.format].naming != "neox":
        return index.files[0].storage.path if len(index.files) == 1 else index.folder
    return neox.home(index, rank, name)

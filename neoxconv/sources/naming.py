"""Source names of weights, and the unified ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from neoxconv.core.model import Architecture, Index, renamed
from neoxconv.core.table import Fused, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox.numbers import FIRST_LAYER
from neoxconv.sources import SOURCES
from neoxconv.storage import Place


@dataclass(frozen=True)
class _Pattern:
    """A source name as a regular expression, and what it gives: a weight, or a tensor that is fused of several."""

    regex: re.Pattern[str]
    found: Weight | Fused
    shift: int  # from the source's numbers of layers to ours

    def name(self, layer: int) -> str:
        """The unified name in a layer by the source's number; outside of the layers every number gives the same."""
        if isinstance(self.found, Fused):
            return self.found.name_at(layer - self.shift)
        return self.found.unified_at(layer - self.shift if self.found.stage == "layer" else 0)


# What libraries put before the names of a model that they hold: DistributedDataParallel and DeepSpeed, Lightning and
# other trainers. Those of torch itself may stand before a layer's names too: torch.compile, FSDP, checkpoint_wrapper.
_TORCH = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = ("module.", "model.", "_forward_module.", *_TORCH)
_WRAPPED = re.compile(f"(?:{'|'.join(map(re.escape, _WRAPPERS))}){{0,8}}")  # more than anyone has
_INSIDE = f"(?:{'|'.join(map(re.escape, _TORCH))})*"


@dataclass(frozen=True)
class _Spelling:
    """How a whole source spells names: what stands before all of them, and what stands for an architecture's base, or
    as `mlx` how mlx_lm has them.

    Of gpt-neox's and GGUF's names nothing is changed.
    """

    naming: str
    outer: str = ""
    base: str | None = None  # None: the architecture's own
    mlx: tuple[tuple[str, str], ...] = ()

    def regex(self, name: str, base: str) -> str:
        """A name of the table, with `{i}` for the layer, as this source has it."""
        if self.naming == "neox":
            return r"(\d+)\." + _with_number(re.escape(name))
        if self.naming == "gguf":
            return _with_number(re.escape(name))
        name = renamed(name, self.mlx)
        if self.base is not None and name.startswith(base):
            name = self.base + name.removeprefix(base)
        return re.escape(self.outer) + _with_number(re.escape(name)).replace(r"(\d{1,9})\.", rf"(\d{{1,9}})\.{_INSIDE}")


def _with_number(name: str) -> str:
    """An escaped name of the table as a regular expression that finds the layer's number."""
    return name.replace(re.escape("{i}"), r"(\d{1,9})")


@lru_cache(maxsize=64)
def _patterns(
    weights: tuple[Weight, ...], fused: tuple[Fused, ...], base: str, spelling: _Spelling
) -> tuple[_Pattern, ...]:
    """How a source spells each weight of an architecture's table, whose names begin with `base`."""
    is_neox = spelling.naming == "neox"
    shift = FIRST_LAYER if is_neox else 0
    found: dict[str, Weight | Fused] = {tensor.source: tensor for tensor in fused} if is_neox else {}
    for weight in weights:
        names = {
            "neox": weight.source,
            "unified": (weight.unified, *weight.also),
            "gguf": (weight.gguf,) if weight.gguf else (),
        }
        found |= {name: weight for name in names[spelling.naming] if name not in found}
    return tuple(_Pattern(re.compile(spelling.regex(name, base)), each, shift) for name, each in found.items())


def spellings_of(index: Index, architecture: Architecture) -> tuple[_Pattern, ...]:
    """How a source spells the weights of an architecture: all of them in one way, the one that fits most of its names.

    A name that is spelled otherwise than most is unknown.
    """
    naming = SOURCES[index.format].naming
    if naming != "unified":
        return _patterns(architecture.weights, architecture.fused, architecture.base, _Spelling(naming))
    names = list(index.ranks[0])
    spellings = [*_ways(names), *([_Spelling("unified", mlx=architecture.mlx)] if architecture.mlx else [])]
    ways = [_patterns(architecture.weights, (), architecture.base, spelling) for spelling in spellings]
    return max(ways, key=lambda way: sum(unified_name(name, way) is not None for name in names))


def _ways(names: Sequence[str]) -> list[_Spelling]:
    """The spellings that names of Hugging Face's may have, the likeliest first."""
    runs = Counter(match[0] for match in map(_WRAPPED.match, names) if match)
    outer = runs.most_common(1)[0][0] if runs else ""
    found = [_Spelling("unified", outer), _Spelling("unified", outer, "")]
    if outer.endswith("model."):  # model.layers.0 beside lm_head: `model.` is the base
        found.append(_Spelling("unified", outer.removesuffix("model."), "model."))
    return found


def count_named(index: Index, architecture: Architecture) -> int:
    """How many of the first rank's tensors have names of the architecture."""
    spellings = spellings_of(index, architecture)
    return sum(unified_name(name, spellings) is not None for name in index.ranks[0])


def name_tensors(index: Index, architecture: Architecture) -> tuple[RankTensors, list[list[str]]]:
    """Each rank's tensors by unified name, fused ones as they are, and the names that the table does not have."""
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
            return spelling.name(int(match[1]) if match.re.groups else 0)
    return None


def home(index: Index, rank: int, name: str) -> Place:
    """The file that holds (or should hold) a rank's tensor, as well as names tell."""
    if SOURCES[index.format].naming != "neox":
        return index.files[0].storage.path if len(index.files) == 1 else index.folder
    return neox.home(index, rank, name)

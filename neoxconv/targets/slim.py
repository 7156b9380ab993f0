"""The slim target: the NeoX layout without optimizer and random-number states.

From gpt-neox shards at their own tensor-parallel degree every tensor is the rank's own, byte for byte, and nothing is
merged. At another degree, and from any other source, the unified tensors are split anew, under the names of 2022 where
the source has no own. Pipeline stages are a matter of the bookkeeping: each layer has files of its own anyway.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from neoxconv.arch.fused import split
from neoxconv.core.encoding import Encoding, copied
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint, Index, Stored
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, in_memory
from neoxconv.dtypes import FLOATS
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox.numbers import number_name
from neoxconv.formats.pt import layout_pt
from neoxconv.quant import ENCODINGS, decoded
from neoxconv.sources import SOURCES
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.targets import training
from neoxconv.targets.carried import carried, tokenizer_facts
from neoxconv.targets.recipe import Recipe
from neoxconv.targets.stand_in import written_as
from neoxconv.targets.training import Degrees, States

RECIPES = tuple(Recipe("slim", dtype=dtype) for dtype in training.PRECISION)  # all that `formats` lists
_DATED = "named as gpt-neox did until 2024; for its code of today give --current-names"
_RankEntries = list[dict[str, Entry]]  # per rank: `N.name` -> entry, in the stored order


def to_slim(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A folder with `latest`, one global_stepN, its YAML and its tokenizer."""
    shards = SOURCES[checkpoint.index.format].naming == "neox"
    return _from_shards(checkpoint, recipe) if shards and not recipe.current_names else _from_others(checkpoint, recipe)


def slim_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor of a slim target of the source's own degree."""
    return [entry for rank in _as_stored(checkpoint, recipe) for entry in rank.values()]


def _from_shards(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The source's own step, kind of files, names and YAML, as far as they need not change."""
    index = checkpoint.index
    recipe = replace(recipe, dtype=recipe.dtype or _trained_type(index))
    before = training.degrees_of(checkpoint)
    after = training.degrees_for(recipe, before, checkpoint.config)
    ranks = (
        _as_stored(checkpoint, recipe)
        if after.tp == before.tp
        else _split_anew(_named_as_found(checkpoint), after.tp, checkpoint.config, recipe.dtype)
    )
    states = training.bookkeeping(checkpoint, before, after)
    step = f"global_step{training.iteration(states)}"
    tokenizer = tokenizer_of(checkpoint, recipe.tokenizer)
    tag = index.folder.name if index.folder.name.startswith("global_step") else step
    return Content(
        tuple(layout_pt(f"{tag}/{name}", value) for name, value in files(ranks, states, after, index.ordered).items()),
        {
            "latest": tag.encode(),
            **{f"{tag}/configs/{name}": data for name, data in training.configs(checkpoint, before, after).items()},
            **training.own_files(tokenizer),
        },
        () if index.states else ("the source has no mp_rank files; minimal ones are written",),
        tokenizer_facts(checkpoint, tokenizer),
    )


def _from_others(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """Step 0, as gpt-neox would have written it in 2022, or today, with a YAML made for it."""
    checkpoint, stands_in = written_as(checkpoint, "neox", recipe.as_family)
    before = training.degrees_of(checkpoint)
    checkpoint = replace(checkpoint, index=replace(checkpoint.index, states={}))  # they tell of another step and names
    after = training.degrees_for(recipe, before, checkpoint.config)
    dtype, notes = _number_type(checkpoint, recipe)
    beside = carried(checkpoint, recipe.tokenizer)
    words = training.tokenizer_files(beside)
    config = training.new_config(checkpoint, after, dtype, words)
    ranks = _split_anew(_named_anew(checkpoint, recipe.current_names), after.tp, checkpoint.config, dtype)
    states = training.bookkeeping(checkpoint, before, after)
    sidecars = {"latest": b"global_step0", "global_step0/configs/model.yml": config}
    none = () if words else ("no tokenizer found; give one with --tokenizer to have it included",)
    sidecars |= words
    older = checkpoint.architecture.renamed and not recipe.current_names
    dated = (_DATED,) if older else ()
    notes = (*stands_in, *notes, *dated, *none, *beside.notes, *beside.left_out(words))
    return Content(
        tuple(layout_pt(f"global_step0/{name}", value) for name, value in files(ranks, states, after, False).items()),
        sidecars,
        notes,
        tokenizer_facts(checkpoint, beside.tokenizer),
    )


def _number_type(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """The type that all weights get: the one asked for, else what most of them have, else F16 with a note."""
    if recipe.dtype:
        return recipe.dtype, ()
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.native.name] += tensor.rows * tensor.columns
    ((usual, _),) = sizes.most_common(1)
    if usual in training.PRECISION:
        return usual, ()
    return "F16", (f"the source holds {usual}; gpt-neox trains in 16 bits, so F16 is written (or give --dtype BF16)",)


def _trained_type(index: Index) -> str | None:
    """The layer files' type where the weights are fp32 masters of them, for gpt-neox wants that; else None."""
    return next(iter(index.replaced[0].values())).native.name if index.replaced else None


def _encoding_for(tensor: LazyTensor, dtype: str | None) -> Encoding:
    """The type asked for, else the stored one; buffers that hold no floats stay as they are."""
    if tensor.native.name not in FLOATS:
        return copied(tensor.native)
    return ENCODINGS.get(dtype or tensor.native.name) or copied(tensor.dtype)


def _as_stored(checkpoint: Checkpoint, recipe: Recipe) -> _RankEntries:
    """Every rank's tensors as they are, dropped buffers included."""
    return [
        {
            name: Entry(name, f"{name} of rank {rank}", tensor, _encoding_for(tensor, recipe.dtype))
            for name, tensor in tensors.items()
        }
        for rank, tensors in enumerate(checkpoint.index.ranks)
    ]


@dataclass(frozen=True)
class _Whole:
    """What lies under an `N.name` of all ranks together: the whole tensors of the weights in it, or a buffer's copy."""

    name: str
    stored: Stored | None
    tensors: tuple[LazyTensor, ...]

    @property
    def unified(self) -> str:
        """What messages call it."""
        weights = self.stored.weights if self.stored else ()
        return weights[0].unified if len(weights) == 1 else self.name

    def split(self, degree: int, config: ModelConfig) -> list[LazyTensor]:
        """What each of `degree` ranks holds; every rank has a copy of a buffer."""
        return split(self.stored, self.tensors, degree, config) if self.stored else [*self.tensors] * degree


def _named_as_found(checkpoint: Checkpoint) -> Iterator[_Whole]:
    """The unified tensors under rank 0's names, and rank 0's buffers, in its order."""
    known = _stored_as_found(checkpoint)
    for name, tensor in checkpoint.index.ranks[0].items():
        stored = known.get(name)
        weights = stored.weights if stored else ()
        yield _Whole(name, stored, tuple(checkpoint.tensors[weight.unified] for weight in weights) or (tensor,))


def _stored_as_found(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Under every `N.name` that the source may have: the weights that lie there."""
    config = checkpoint.config
    named = checkpoint.architecture.names(config)
    found = {
        number_name(weight, layer, config.layers, name): Stored(name, layer, (weight,))
        for layer, weight in named
        for name in weight.source
    }
    weights = {weight.unified: weight for _, weight in named}
    for fused in checkpoint.fused:
        for layer in range(config.layers):
            parts = tuple(weights[name] for name in fused.parts_at(layer))
            found[number_name(parts[0], layer, config.layers, fused.source)] = Stored(fused.source, layer, parts, fused)
    return found


def _named_anew(checkpoint: Checkpoint, current: bool) -> Iterator[_Whole]:
    """The unified tensors as numbers, and the buffers, under the names and in the order of the architecture's table.

    With `current` the names are those of since 2024-09, when gpt-neox had no buffers in its files any more.
    """
    config = checkpoint.config
    renamed = checkpoint.architecture.renamed if current else {}
    for stored in checkpoint.architecture.in_layer_files(config):
        name = number_name(stored.weights[0], stored.layer, config.layers, stored.name)
        for before, after in renamed.items():
            name = name.replace(before, after)
        if stored.buffer and current:
            continue
        if stored.buffer:
            yield _Whole(name, None, (in_memory(stored.buffer.values(config)),))
        else:
            yield _Whole(name, stored, tuple(decoded(checkpoint.tensors[weight.unified]) for weight in stored.weights))


def _split_anew(tensors: Iterable[_Whole], degree: int, config: ModelConfig, dtype: str | None) -> _RankEntries:
    """The tensors split over `degree` ranks."""
    result: _RankEntries = [{} for _ in range(degree)]
    for whole in tensors:
        for rank, part in enumerate(whole.split(degree, config)):
            result[rank][whole.name] = Entry(
                whole.name, f"{whole.unified} of rank {rank}", part, _encoding_for(part, dtype)
            )
    return result


def files(ranks: _RankEntries, states: States, degrees: Degrees, ordered: bool) -> dict[str, Any]:
    """What each .pt file holds."""
    return _pipeline_files(ranks, states, ordered) if degrees.pp else _sequential_files(ranks, states)


def _pipeline_files(ranks: _RankEntries, states: Mapping[str, Any], ordered: bool) -> dict[str, Any]:
    """A file for each layer and rank, and the bookkeeping files."""
    layers = neox.by_layer_file(ranks, OrderedDict if ordered else dict)
    return layers | {name: {"module": None, **state} for name, state in states.items()}


def _sequential_files(ranks: _RankEntries, states: Mapping[str, Any]) -> dict[str, Any]:
    """One file for each rank, its weights under `module`."""
    return {
        name: {"module": OrderedDict((neox.SEQUENTIAL + key, e) for key, e in entries.items()), **state}
        for entries, (name, state) in zip(ranks, states.items(), strict=True)
    }

"""What a model is, and what a source holds of it: the nouns that every reader shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from neoxconv.core.table import Buffer, Fused, ModelConfig, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.storage import Place, Storage


@dataclass(frozen=True)
class SourceFile:
    """A file that tensors are read from, with the SHA-256 of what describes them (header, zip directory and pickle)."""

    storage: Storage
    checksum: str


@dataclass(frozen=True)
class Index:
    """What a reader finds in a source: names as the source spells them, nothing interpreted, no weight read.

    `ranks` has one dictionary for each tensor-parallel rank (one for formats without ranks), in the stored order.
    For gpt-neox the names are `N.name` with the layer index N, for pipeline and sequential files alike.
    """

    format: str  # neox, hf, deepspeed, gguf, safetensors
    folder: Place
    files: tuple[SourceFile, ...]
    ranks: tuple[dict[str, LazyTensor], ...]
    settings: dict[str, Any]  # merged YAML, config.json or GGUF keys, as found
    states: dict[int, Any] = field(default_factory=dict)  # gpt-neox: number of an mp_rank file -> its bookkeeping
    sequential: bool = False  # gpt-neox: the weights lie in the mp_rank files
    ordered: bool = False  # gpt-neox: layer files hold an OrderedDict, as today's DeepSpeed writes them
    configs: tuple[Place, ...] = ()  # gpt-neox: the YAML files
    set_aside: tuple[str, ...] = ()  # files that hold no weights (optimizer states), named and not opened
    typed: Mapping[str, bytes] = field(default_factory=dict)  # GGUF: the settings' values as the file's bytes
    single: bool = False  # the source is its files alone, not all of the folder
    replaced: tuple[dict[str, LazyTensor], ...] = ()  # gpt-neox: the files' own, where fp32 masters stand in `ranks`

    @property
    def where(self) -> Place:
        """What messages call the source: the file that it is, or the folder."""
        return self.files[0].storage.path if self.single and len(self.files) == 1 else self.folder


@dataclass(frozen=True)
class Measured:
    """What the shapes of a source's tensors tell of the model, over all ranks."""

    layers: int
    hidden: int
    ff: int
    rows: int
    tied: bool  # there is no head


_Named = tuple[int | None, Weight]  # a weight with its names spelled for its layer, and the layer; None outside of them


@lru_cache(maxsize=16)
def _weights_of_model(weights: tuple[Weight, ...], layers: int, tied: bool) -> tuple[_Named, ...]:
    """Every weight of a model with so many layers, in the order of the forward pass; a tied head is left out."""
    before = [(None, w) for w in weights if w.stage == "embed"]
    inside = [(i, w.at(i)) for i in range(layers) for w in weights if w.stage == "layer"]
    after = [(None, w) for w in weights if w.stage in ("norm", "head") and not (tied and w.role == "head")]
    return (*before, *inside, *after)


def renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    """A name with the first of the beginnings that it has changed."""
    old, new = next((pair for pair in beginnings if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


@dataclass(frozen=True)
class Stored:
    """A tensor of a layer file: a weight, several weights fused, or a buffer."""

    name: str  # `N.name` without the number
    layer: int | None
    weights: tuple[Weight, ...]  # that it holds, spelled for the layer; of a buffer the one that it follows
    fused: Fused | None = None
    buffer: Buffer | None = None


@dataclass(frozen=True)
class StandIn:
    """Another family that computes the same function: `make` writes a checkpoint as one of it.

    The result has other tensors and hyperparameters. `note` says up to where a model's function is the same; where
    there is something to say, it is written so only when it is asked for.
    """

    make: Callable[[Checkpoint], Checkpoint]
    note: Callable[[ModelConfig], str | None] = lambda config: None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family: the table of its weights, its names, and its hyperparameters in every format's words.

    `config_of[naming](index, measured, opening)` gives the hyperparameters, and notes on what was guessed. `forward`
    names the module with the forward pass: it needs torch, so arch/forward.py imports it where a model runs.
    """

    name: str  # as Hugging Face's model_type
    gguf_name: str | None  # as GGUF's general.architecture; None where llama.cpp runs no such family
    title: str  # for people
    weights: tuple[Weight, ...]
    base: str  # what its unified names begin with but for the head's: a model saved without one has names without it
    dropped: tuple[str, ...]  # patterns of buffers that are recomputed, by any format's name
    buffers: tuple[Buffer, ...] = ()
    fused: tuple[Fused, ...] = ()  # what holds several weights; of one name today's layout stands first
    presets: Mapping[str, ModelConfig]  # the released models
    trained: Callable[[Mapping[str, Any]], bool]  # whether gpt-neox makes this family with a YAML's settings
    # The layout of the fused tensors whose name has several, as far as the files tell.
    layout_of: Callable[[Index, ModelConfig], str | None] = lambda index, config: None
    config_of: Mapping[str, Callable[[Index, Measured, Opening], tuple[ModelConfig, tuple[str, ...]]]]
    to_hf: Callable[[ModelConfig, str], dict[str, Any]]
    # The tokens that begin and end a text (bos, eos): where nothing tells them, not even a tokenizer; and those that
    # transformers' configuration has where nobody set them.
    token_ids: Mapping[str, int] = field(default_factory=dict)
    unset_ids: Mapping[str, int] = field(default_factory=dict)
    # None where a format has no words for the family; `stand_ins[naming]` are those of other families, by name.
    to_gguf: Callable[[ModelConfig], dict[str, Any]] | None
    gguf_head: bool = True  # whether llama.cpp wants a head of a tied model too, which is its embedding once more
    to_neox: Callable[[ModelConfig], dict[str, Any]] | None
    # Names that gpt-neox changed on 2024-09-07, with today's: parts of those in the layer files.
    renamed: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, Mapping[str, StandIn]] = field(default_factory=dict)
    # The hyperparameters as every format but gpt-neox's can say them.
    sayable: Callable[[ModelConfig], ModelConfig] = lambda config: config
    # Weights that a configuration leaves unused, each with the one that acts in its place; by their unified names.
    unused: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    # mlx_lm's names (`sanitize` of its models): what unified names begin with, and what stands there instead; the first
    # that fits. Empty where it has no such family.
    mlx: tuple[tuple[str, str], ...] = ()
    forward: str
    # What gpt-neox computes and does not store, by unified name.
    made: Callable[[Index, ModelConfig], Mapping[str, LazyTensor]] = lambda index, config: {}
    # What a source stores and a configuration contradicts: the tensor's rank and source name, both values in words.
    contradictions: Callable[[Index, ModelConfig], Iterator[tuple[int, str, str]]]

    def names(self, config: ModelConfig) -> tuple[_Named, ...]:
        """Every weight of a model, its names spelled for its layer (None outside), in the order of the forward pass."""
        weights = tuple(weight for weight in self.weights if weight.when(config))
        return _weights_of_model(weights, config.layers, config.tied)

    def mlx_name(self, unified: str) -> str:
        """What mlx_lm calls a tensor, if it has the family."""
        return renamed(unified, self.mlx)

    def in_gguf(self, config: ModelConfig) -> tuple[_Named, ...]:
        """Those of a GGUF file: of a tied model the head too where llama.cpp wants one."""
        return self.names(replace(config, tied=config.tied and not self.gguf_head))

    def gguf_logits(self, config: ModelConfig) -> Weight:
        """The weight of a GGUF file that gives the logits: the head, or the embedding that is one."""
        outer = {weight.role: weight for layer, weight in self.in_gguf(config) if layer is None}
        return outer.get("head") or outer["embedding"]

    def in_layer_files(self, config: ModelConfig) -> Iterator[Stored]:
        """Every tensor of the layer files that `slim` writes, in their order: weights, and buffers that follow one."""
        by_source = {fused.source: fused for fused in reversed(self.fused)}
        named = self.names(config)
        weights = {weight.unified: weight for _, weight in named}
        for layer, weight in named:
            fused = by_source.get(weight.source[0])
            if fused is None:
                yield Stored(weight.source[0], layer, (weight,))
                followers = [buffer for buffer in self.buffers if buffer.after == weight.source[0]]
                yield from (Stored(buffer.source, layer, (weight,), buffer=buffer) for buffer in followers)
                continue
            assert layer is not None
            parts = tuple(weights[name] for name in fused.parts_at(layer))
            if weight is parts[0]:
                yield Stored(fused.source, layer, parts, fused)

    @cached_property
    def tied_head(self) -> dict[str, str]:
        """The unified name of the head, with that of the embedding, which a tied model has in its place."""
        by_role = {weight.role: weight.unified for weight in self.weights}
        return {by_role["head"]: by_role["embedding"]}


OWN_STATE = "neoxconv"  # the key of mp_rank files under which we say what gpt-neox's files do not tell


@dataclass(frozen=True)
class Opening:
    """What was asked for when a checkpoint was opened, with which it is opened anew elsewhere."""

    path: Place
    config: tuple[Path, ...] = ()  # gpt-neox YAML files, instead of those beside the weights
    preset: str | None = None  # a released model
    norms: str = "mean"  # how the ranks' norms are joined
    weights: str = "stored"  # or master, the optimizer's fp32 copies
    qkv_layout: str | None = None  # how queries, keys and values are fused, where the files do not tell
    rmsnorm: str | None = None  # where RMSNorm adds its epsilon, where the files do not tell
    partial: bool = False  # whether it may be a part of a model

    @property
    def settled(self) -> dict[str, str]:
        """What was said of gpt-neox's files because they do not tell it, by the option's name."""
        options = {"qkv_layout": self.qkv_layout, "rmsnorm": self.rmsnorm}
        return {name: value for name, value in options.items() if value}


@dataclass(frozen=True)
class Checkpoint:
    """A model from any source under unified names: nothing is read until rows are asked for."""

    opening: Opening
    index: Index
    architecture: Architecture
    config: ModelConfig
    tensors: dict[str, LazyTensor]  # unified names, in the order of the forward pass
    ranks: RankTensors  # as the source holds them; one where it has no ranks
    dropped: tuple[str, ...]  # source tensors that are recomputed, by the source's names
    notes: tuple[str, ...]  # what was guessed or is worth knowing, for people and for the manifest
    doubts: tuple[str, ...] = ()  # what its files contradict: one may look at it, but neither run nor convert it
    fused: tuple[Fused, ...] = ()  # the tensors of its layer files that were taken apart, in the layout that was found

    def refuse_doubts(self) -> None:
        """Raise CheckpointError where what the source stores contradicts its configuration, and nobody says which."""
        raise_all(CheckpointError, self.doubts)

    @property
    def norms(self) -> str:
        """How the ranks' norms were joined."""
        return self.opening.norms

    @property
    def weights(self) -> str:
        """Which weights were read."""
        return self.opening.weights

    @property
    def unusual(self) -> dict[str, str]:
        """How it was read, for fingerprints and manifests, so far as there was a choice: nothing for most sources."""
        weights = {"weights": self.weights} if self.weights != "stored" else {}
        layouts = [fused.layout for fused in self.fused if fused.layout]
        found = {"qkv_layout": layouts[0]} if layouts and self.config.kv_heads else {}
        return weights | self.opening.settled | found

    @property
    def parameters(self) -> int:
        """Numbers in the unified model."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

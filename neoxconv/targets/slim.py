"""The slim target: the NeoX layout without optimizer and random-number states.

At the source's tensor-parallel degree every tensor is the rank's own, byte for byte, and nothing is merged. At another
degree the unified tensors are split anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neoxconv import tokenizer_find
from neoxconv.coverage import number_name
from neoxconv.dtypes import FLOATS, DType
from neoxconv.errors import PlanError, raise_all
from neoxconv.formats import deepspeed
from neoxconv.formats.pt import layout_pt
from neoxconv.formats.pt.unpickle import Placeholder
from neoxconv.model import Checkpoint, Content, Encoding, Entry, Index
from neoxconv.quant import ENCODINGS
from neoxconv.recipe import Recipe
from neoxconv.tensor import LazyTensor

RANDOM_STATES = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states")
LOCAL_SHAPES = ("param_shapes", "param_slice_mappings")  # true of the source's degree only

Ranks = list[dict[str, Entry]]  # per rank: `N.name` -> entry, in the stored order


def to_slim(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A folder with `latest`, one global_stepN in the source's kind of files, its YAML and its tokenizer."""
    index = checkpoint.index
    if index.format != "neox":
        raise PlanError(f"--to slim: the source is {index.format}; slim is made from gpt-neox checkpoints only.")
    degree = recipe.tp or len(index.ranks)
    recipe = replace(recipe, dtype=recipe.dtype or trained_type(index))
    ranks = as_stored(checkpoint, recipe) if degree == len(index.ranks) else split_anew(checkpoint, recipe, degree)
    states = bookkeeping(checkpoint, degree)
    tag = index.folder.name if index.folder.name.startswith("global_step") else f"global_step{iteration(states)}"
    files = sequential_files(ranks, states) if index.sequential else pipeline_files(ranks, states, index.ordered)
    return Content(
        tuple(layout_pt(f"{tag}/{name}", value) for name, value in files.items()),
        {"latest": tag.encode(), **configs(checkpoint, degree, tag), **tokenizers(checkpoint, recipe)},
        () if index.states else ("the source has no mp_rank files; minimal ones are written",),
    )


def trained_type(index: Index) -> str | None:
    """The layer files' type where the weights are fp32 masters of them, for gpt-neox wants that; else None."""
    return next(iter(index.stored[0].values())).native.name if index.stored else None


def encoding_for(tensor: LazyTensor, dtype: str | None) -> Encoding:
    """The type asked for, else the stored one; buffers that hold no floats stay as they are."""
    if tensor.native.name not in FLOATS:
        return unchanged(tensor.native)
    return ENCODINGS.get(dtype or tensor.native.name) or unchanged(tensor.dtype)


def unchanged(dtype: DType) -> Encoding:
    """An encoding for bytes that are only copied."""
    return Encoding(
        dtype.name,
        dtype,
        lambda rows: rows,
        lambda rows: rows.astype(np.float32),
        lambda rows, stored, weighted=False: rows != stored,
    )


def as_stored(checkpoint: Checkpoint, recipe: Recipe) -> Ranks:
    """Every rank's tensors as they are, dropped buffers included."""
    return [
        {
            name: Entry(name, f"{name} of rank {rank}", tensor, encoding_for(tensor, recipe.dtype))
            for name, tensor in tensors.items()
        }
        for rank, tensors in enumerate(checkpoint.index.ranks)
    ]


def split_anew(checkpoint: Checkpoint, recipe: Recipe, degree: int) -> Ranks:
    """The unified tensors split over `degree` ranks, under rank 0's names; buffers are rank 0's."""
    config, index = checkpoint.config, checkpoint.index
    sizes = {"attention heads": config.heads, "MLP rows": config.ff, "vocabulary rows": config.rows}
    raise_all(
        PlanError,
        (f"--tp {degree}: does not divide {count} {what}." for what, count in sizes.items() if count % degree),
    )
    weights = {number_name(weight, layer, config.layers, name): (weight.unified, weight)
               for layer, weight in checkpoint.architecture.names(config) for name in weight.source}  # fmt: skip
    result: Ranks = [{} for _ in range(degree)]
    for name, tensor in index.ranks[0].items():
        unified, weight = weights.get(name, (name, None))
        parts = weight.join.split(checkpoint.tensors[unified], degree, config) if weight else [tensor] * degree
        for rank, part in enumerate(parts):
            result[rank][name] = Entry(name, f"{unified} of rank {rank}", part, encoding_for(part, recipe.dtype))
    return result


def pipeline_files(ranks: Ranks, states: Mapping[str, Any], ordered: bool) -> dict[str, Any]:
    """A file for each layer and rank, and the bookkeeping files."""
    files = deepspeed.by_layer_file(ranks, OrderedDict if ordered else dict)
    return files | {name: {"module": None, **state} for name, state in states.items()}


def sequential_files(ranks: Ranks, states: Mapping[str, Any]) -> dict[str, Any]:
    """One file for each rank, its weights under `module`."""
    return {
        name: {"module": OrderedDict((deepspeed.SEQUENTIAL + key, e) for key, e in entries.items()), **state}
        for entries, (name, state) in zip(ranks, states.items(), strict=True)
    }


@dataclass(frozen=True)
class Degree:
    """The source's and the target's tensor-parallel degree."""

    source: int
    target: int


def bookkeeping(checkpoint: Checkpoint, degree: int) -> dict[str, dict[str, Any]]:
    """The mp_rank files without `module`, optimizer and random states; one for each stage and new rank."""
    index = checkpoint.index
    change = Degree(len(index.ranks), degree)
    stages = -(-len(index.states) // change.source) or 1
    if index.states and list(index.states) != list(range(stages * change.source)):
        raise PlanError(
            f"{index.folder}: has mp_rank files {list(index.states)}, but ranks 0 to {stages * change.source - 1} are "
            "needed. Download the missing ones, or move them all away to have minimal ones written."
        )
    found = [stripped(state, change) for state in index.states.values()] or [
        minimal(checkpoint, degree)
    ] * change.source
    sources = [
        found[stage * change.source + min(rank, change.source - 1)] for stage in range(stages) for rank in range(degree)
    ]
    if change.source != degree:
        sources = [resized(state, stages, degree) for state in sources]
    return {deepspeed.states_file(rank): state for rank, state in enumerate(sources)}


def stripped(state: Mapping[str, Any], change: Degree) -> dict[str, Any]:
    """What fine-tuning from the weights needs: plain values only."""
    dropped = {"module", *RANDOM_STATES, *(LOCAL_SHAPES if change.source != change.target else ())}
    kept = {key: value for key, value in state.items() if key not in dropped and is_plain(value)}
    return kept | {"optimizer": None}


def is_plain(value: Any) -> bool:
    """Whether a value holds neither tensors nor objects of classes that were not loaded."""
    if isinstance(value, Mapping):
        return all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return not isinstance(value, Placeholder | LazyTensor)


def resized(state: Mapping[str, Any], stages: int, degree: int) -> dict[str, Any]:
    """The bookkeeping for another tensor-parallel degree."""
    args = state.get("args")
    changed = {"args": {**args, "model_parallel_size": degree}} if isinstance(args, dict) else {}
    return {**state, "mp_world_size": stages * degree, **changed}


def minimal(checkpoint: Checkpoint, degree: int) -> dict[str, Any]:
    """Bookkeeping for a source that has none."""
    config = checkpoint.config
    args = {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "padded_vocab_size": config.rows,
        "model_parallel_size": degree,
    }
    zeros = dict.fromkeys(("iteration", "skipped_steps", "global_steps", "global_samples"), 0)
    nothing: dict[str, Any] = {"optimizer": None, "lr_scheduler": None, "csr_tensor_module_names": set()}
    return {**nothing, **zeros, "dp_world_size": 1, "mp_world_size": degree, "args": args}


def iteration(states: Mapping[str, Mapping[str, Any]]) -> int:
    """The training step that the bookkeeping names; 0 where it does not."""
    state = next(iter(states.values()), {})
    step = state.get("iteration", state.get("global_steps", 0))
    return step if isinstance(step, int) else 0


def configs(checkpoint: Checkpoint, degree: int, tag: str) -> dict[str, bytes]:
    """The YAML files: as they are, or with the new degree and a padding that gives the same vocabulary rows."""
    import yaml

    index = checkpoint.index
    names = [path.name + ".yml" * (path.suffix not in (".yml", ".yaml")) for path in index.configs]
    if len(set(names)) < len(names):
        raise PlanError(f"{', '.join(map(str, index.configs))}: two have one name but go to one folder; rename one.")
    files = {f"{tag}/configs/{name}": path.read_bytes() for name, path in zip(names, index.configs, strict=True)}
    if degree == len(index.ranks):
        return files
    changes = {"model_parallel_size": degree, "make_vocab_size_divisible_by": checkpoint.config.rows // degree,
               "output_layer_parallelism": "column"}  # fmt: skip
    result = {}
    for number, (name, data) in enumerate(files.items()):
        settings = {k: v for k, v in yaml.safe_load(data).items() if str(k).replace("-", "_") not in changes}
        result[name] = yaml.safe_dump(settings | (changes if number == 0 else {}), sort_keys=False).encode()
    return result


def tokenizers(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, bytes]:
    """The tokenizer file, under its own name beside `latest`."""
    index = checkpoint.index
    places = [config.parent for config in index.configs]
    path = tokenizer_find.find(recipe.tokenizer, index.folder, index.settings, places)
    return {path.name: path.read_bytes()} if path else {}

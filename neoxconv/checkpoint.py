"""Open any source as one model: find out what it is, give its tensors their unified names, join the ranks, check coverage.

Every source tensor is used once or dropped by name; every unified tensor is made once, in the shape that the
configuration gives it. Anything else is an error that lists what is missing, left over or of another shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.joins import NORMS, join
from neoxconv.dtypes import FLOATS
from neoxconv.errors import CheckpointError, PlanError, raise_all
from neoxconv.fold import folded
from neoxconv.formats import deepspeed, gguf, hf, safetensors
from neoxconv.model import Architecture, Checkpoint, Index, Measured, ModelConfig, Weight
from neoxconv.tensor import LazyTensor, reordered

FIRST_LAYER = 2  # of gpt-neox: 0 is the embedding, 1 a function without weights
AFTER_LAYERS = {"norm": 3, "head": 4}  # of gpt-neox: counted from the number of layers
NAMING = {"neox": "neox", "hf": "unified", "safetensors": "unified", "gguf": "gguf"}

Named = list[dict[str, LazyTensor]]


def open_checkpoint(
    path: Path | str, *, config: Sequence[Path] = (), preset: str | None = None, norms: str = "mean"
) -> Checkpoint:
    """The model at `path`: a gpt-neox checkpoint (its folder, its global_stepN, or a file in it), a Hugging Face folder,
    a .safetensors or a .gguf file.

    `config` are gpt-neox YAML files, used instead of those beside the weights; `preset` names a released model;
    `norms` says how ranks' norms are joined: mean, fold (exact) or rank0. Raises CheckpointError.
    """
    index = read_index(Path(path), config)
    architecture = find_architecture(index)
    named, left = name_tensors(index, architecture)
    measured = measure(named, architecture)
    model, notes = architecture.config_of[index.format](index, measured, preset)
    check(index, named, left, architecture, model)
    dropped = tuple(dict.fromkeys(name for names in left for name in names))
    checkpoint = Checkpoint(index, architecture, model, {}, dropped, notes, norms)
    return replace(checkpoint, tensors=unify(checkpoint, named))


def read_index(path: Path, config: Sequence[Path]) -> Index:
    """Index whatever is at `path`, told by its files' names."""
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist.")
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf.index(path)
        if path.suffix == ".safetensors" and not (path.parent / "model.safetensors.index.json").is_file():
            return safetensors.index(path)
        path = path.parent
    if folder := deepspeed.tag_folder(path):
        return deepspeed.index(folder, config)
    if (path / "config.json").is_file():
        return hf.index(path)
    for suffix, read in ((".gguf", gguf.index), (".safetensors", safetensors.index)):
        files = sorted(path.glob("*" + suffix))
        if files and (len(files) == 1 or (suffix == ".gguf" and re.search(r"-00001-of-\d{5}$", files[0].stem))):
            return read(files[0])
        if files:
            raise CheckpointError(f"{path}: holds {len(files)} {suffix} files; give the one you mean.")
    raise CheckpointError(
        f"{path}: holds no model. Expected gpt-neox's layer_NN-model_MM-model_states.pt or mp_rank_MM_model_states.pt files "
        "(or a folder with `latest`), Hugging Face's config.json, or a .gguf or .safetensors file."
    )


def find_architecture(index: Index) -> Architecture:
    """The family that a source says it is; gpt-neox shards can only be one."""
    key = {"hf": "model_type", "safetensors": "model_type", "gguf": "general.architecture"}.get(index.format)
    name = index.settings.get(key, "gpt_neox") if key else "gpt_neox"
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{index.folder}: is a {name} model; expected {' or '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


@dataclass(frozen=True)
class Pattern:
    """A source name of a weight as a regular expression, and how to turn its layer number into ours."""

    regex: re.Pattern[str]
    weight: Weight
    shift: int


def patterns(architecture: Architecture, naming: str) -> list[Pattern]:
    """How a format spells each weight of the table."""
    found = []
    for weight in architecture.weights:
        spelled = {"neox": weight.source, "unified": (weight.unified,), "gguf": (weight.gguf,)}[naming]
        for name in spelled:
            text = re.escape(name).replace(re.escape("{i}"), r"(\d+)")
            prefix, shift = (r"(\d+)\.", FIRST_LAYER) if naming == "neox" else ("", 0)
            found.append(Pattern(re.compile(prefix + text), weight, shift))
    return found


def name_tensors(index: Index, architecture: Architecture) -> tuple[Named, list[list[str]]]:
    """Each rank's tensors by unified name, and the source names that the table does not know."""
    spellings = patterns(architecture, NAMING[index.format])
    named: Named = []
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


def unified_name(name: str, spellings: Sequence[Pattern]) -> str | None:
    """The unified name of the source's `name`, or None where the table has none."""
    for spelling in spellings:
        if match := spelling.regex.fullmatch(name):
            layer = int(match[1]) - spelling.shift if spelling.weight.stage == "layer" else 0
            return spelling.weight.unified.replace("{i}", str(layer))
    return None


def home(index: Index, rank: int, name: str) -> Path:
    """The file that holds (or should hold) a rank's tensor, as well as names tell."""
    if index.format != "neox":
        return index.files[0].storage.path if len(index.files) == 1 else index.folder
    if index.sequential:
        return index.folder / deepspeed.states_file(rank)
    return index.folder / deepspeed.layer_file(int(name.split(".")[0]), rank)


def measure(named: Named, architecture: Architecture) -> Measured:
    """What the shapes tell; zeros where a tensor is missing, which `check` reports."""
    layers = [int(m[1]) for m in (re.search(r"layers\.(\d+)\.", name) for name in named[0]) if m]
    by_role = {
        weight.role: weight.unified.replace("{i}", "0") for weight in architecture.weights if weight.role != "bias"
    }

    def rows(role: str) -> int:
        return sum(rank[by_role[role]].rows for rank in named if by_role[role] in rank)

    hidden = named[0][by_role["norm"]].rows if by_role["norm"] in named[0] else 0
    return Measured(
        max(layers, default=-1) + 1, hidden, rows("mlp_in"), rows("embedding"), by_role["head"] not in named[0]
    )


def expected_neox_name(weight: Weight, layer: int | None, layers: int) -> str:
    """`N.name` of a weight in gpt-neox, in the oldest spelling."""
    number = (
        0 if weight.stage == "embed" else layers + AFTER_LAYERS[weight.stage] if layer is None else layer + FIRST_LAYER
    )
    return f"{number}.{weight.source[0]}"


def check(index: Index, named: Named, left: list[list[str]], architecture: Architecture, config: ModelConfig) -> None:
    """Raise CheckpointError unless every unified tensor can be made once, in its shape, and nothing is left over."""
    problems = [*check_degree(index), *check_missing(index, named, architecture, config)]
    names = {weight.unified.replace("{i}", str(layer)) for layer, weight in architecture.names(config)}
    for rank, (known, unknown) in enumerate(zip(named, left, strict=True)):
        problems += [
            f"{index.folder}: {name} does not belong to a model of {config.layers} layers."
            for name in known
            if name not in names
        ]
        problems += [
            f"{home(index, rank, name)}: {name} is not a tensor of {architecture.name}; "
            "a model of another kind (a reward head, other norms) is not supported."
            for name in unknown
            if not any(fnmatchcase(name, pattern) for pattern in architecture.dropped)
        ]
    raise_all(CheckpointError, dict.fromkeys(problems))
    raise_all(CheckpointError, check_shapes(index, named, architecture, config))


def check_degree(index: Index) -> list[str]:
    """The tensor-parallel degree as configured, against the ranks found."""
    degree = index.settings.get("model_parallel_size", len(index.ranks)) if index.format == "neox" else len(index.ranks)
    if degree == len(index.ranks):
        return []
    return [
        f"{index.folder}: the configuration says model_parallel_size {degree} but the files are those of {len(index.ranks)} rank(s). "
        "Download the missing ranks' files, or give the right YAML with --config."
    ]


def check_missing(index: Index, named: Named, architecture: Architecture, config: ModelConfig) -> list[str]:
    """Whole layer files and single tensors that are not there."""
    problems = []
    for layer, weight in architecture.names(config):
        unified = weight.unified.replace("{i}", str(layer))
        for rank, known in enumerate(named):
            if unified in known:
                continue
            if index.format != "neox" or index.sequential:
                problems.append(f"{home(index, rank, '')}: {unified} is missing.")
                continue
            file = home(index, rank, expected_neox_name(weight, layer, config.layers))
            problems.append(
                f"{file}: {'lacks ' + weight.source[0] + ' (' + unified + ')' if file.exists() else 'is missing'}; download it again."
            )
    return problems


def check_shapes(index: Index, named: Named, architecture: Architecture, config: ModelConfig) -> list[str]:
    """Tensors whose ranks disagree, whose joined shape is not what the configuration makes it, or that hold no floats."""
    problems = []
    if config.hidden % config.heads:
        problems.append(
            f"{index.folder}: {config.heads} heads do not divide hidden size {config.hidden}; give the right configuration."
        )
    for layer, weight in architecture.names(config):
        unified = weight.unified.replace("{i}", str(layer))
        parts = [known[unified] for known in named]
        shapes = [part.shape for part in parts]
        source = expected_neox_name(weight, layer, config.layers)
        for rank in range(1, len(parts)):
            if shapes[rank] != shapes[0]:
                problems.append(
                    f"{home(index, rank, source)}: {unified} is {list(shapes[rank])} on rank {rank} but {list(shapes[0])} on rank 0. "
                    "The shards come from different runs; download them again."
                )
        expected = tuple(config.sizes[size] for size in weight.shape)
        if len(set(shapes)) == 1 and (found := joined_shape(weight, parts, config)) != expected:
            problems.append(
                f"{home(index, 0, source)}: {unified} is {list(found)} but the configuration makes it {list(expected)}. "
                "Give the right configuration with --config."
            )
        if parts[0].dtype.block == 1 and parts[0].dtype.name not in FLOATS:
            problems.append(
                f"{home(index, 0, source)}: {unified} holds {parts[0].dtype.name}; expected {', '.join(FLOATS)}."
            )
    return problems


def joined_shape(weight: Weight, parts: Sequence[LazyTensor], config: ModelConfig) -> tuple[int, ...]:
    """The shape that the ranks' equal parts make together (without joining what cannot be joined)."""
    if len(parts[0].shape) != len(weight.shape):
        return parts[0].shape
    return join(weight.join, parts, config).shape


def unify(checkpoint: Checkpoint, named: Named) -> dict[str, LazyTensor]:
    """The tensors of the whole model, in the order of the forward pass."""
    architecture, config = checkpoint.architecture, checkpoint.config
    if checkpoint.norms not in NORMS:
        raise PlanError(f"--norms {checkpoint.norms}: expected one of {', '.join(NORMS)}.")
    if checkpoint.norms == "fold" and len(named) > 1:
        named = folded(named, architecture, config)
    tensors = {}
    for layer, weight in architecture.names(config):
        unified = weight.unified.replace("{i}", str(layer))
        how = NORMS[checkpoint.norms] if weight.role == "norm" else weight.join
        tensor = join(how, [known[unified] for known in named], config)
        if checkpoint.index.format == "gguf" and weight.gguf_order:
            tensor = reordered(tensor, np.argsort(weight.gguf_order(config)))
        tensors[unified] = tensor
    return tensors


def rank_difference(checkpoint: Checkpoint) -> float:
    """The largest difference between ranks in any norm, which are copies of each other in theory; 0 for one rank."""
    named, _ = name_tensors(checkpoint.index, checkpoint.architecture)
    largest = 0.0
    for layer, weight in checkpoint.architecture.names(checkpoint.config):
        if weight.role == "norm":
            parts = [known[weight.unified.replace("{i}", str(layer))] for known in named]
            values = np.stack([part.floats(0, part.rows) for part in parts])
            largest = max(largest, float(np.ptp(values, axis=0).max()))
    return largest


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in the unified model."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def describe(config: ModelConfig) -> dict[str, Any]:
    """The configuration as plain values, for manifests and tables."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}

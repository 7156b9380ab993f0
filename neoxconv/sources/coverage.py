"""Coverage: every source tensor is used once or dropped by name, every unified tensor is made once, in its shape."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from neoxconv.arch.joins import join
from neoxconv.core.model import Architecture, Index
from neoxconv.core.table import ModelConfig, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import FLOATS
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.formats.neox.numbers import number_name
from neoxconv.sources import SOURCES
from neoxconv.sources.naming import home

_WITHOUT_HEAD = (
    "the model was saved without its head, as transformers' base models are. Save it with its head (ForCausalLM), or "
    "say tie_word_embeddings in config.json if its head is its embedding"
)
_EMPTY = "is empty, as ZeRO stage 3 leaves it; make the model whole with DeepSpeed's zero_to_fp32.py, and give that"
PARTIAL = "neoxconv_only"  # the setting of a target that holds a part of its model: the patterns asked for


def check(
    index: Index, named: RankTensors, left: list[list[str]], architecture: Architecture, config: ModelConfig
) -> None:
    """Raise CheckpointError unless every unified tensor can be made once, in its shape, and nothing is left over."""
    whole = not is_partial(index)
    strangers = _check_strangers(index, left, architecture)
    layers = _check_layers(index, named, architecture, config) if whole else []
    if config.layers > 2 * len(named[0]):
        # Not even one tensor for every two layers: another model's configuration, of which to list what is missing
        # would take long and tell nothing.
        raise_all(CheckpointError, layers and [*layers, *strangers])
    problems = [
        *_check_degree(index),
        *layers,
        *(_check_missing(index, named, architecture, config) if whole else []),
    ]
    names = {weight.unified for _, weight in architecture.names(config)}
    kind = f"{config.layers} layers{' whose head is its embedding (tied)' if config.tied else ''}"
    for known in named:
        problems += [
            f"{index.where}: {name} does not belong to a model of {kind}; download it again with its configuration."
            for name in known
            if name not in names
        ]
    raise_all(CheckpointError, dict.fromkeys([*problems, *strangers]))
    raise_all(CheckpointError, _check_shapes(index, named, architecture, config))


def check_known(index: Index, named: RankTensors, left: list[list[str]], architecture: Architecture) -> None:
    """Raise CheckpointError where no tensor at all is one of the architecture's: of another model, or an adapter."""
    if not any(named):
        raise_all(CheckpointError, _check_strangers(index, left, architecture))


def _check_strangers(index: Index, left: list[list[str]], architecture: Architecture) -> list[str]:
    """Tensors, as the files name them, that the table does not know and that are not dropped."""
    return [
        f"{home(index, rank, name)}: {name} is not a tensor of {architecture.name}; "
        "a model of another kind (a reward head, other norms) is not supported."
        for rank, unknown in enumerate(left)
        for name in unknown
        if not any(fnmatchcase(name, pattern) for pattern in architecture.dropped)
    ]


def is_partial(index: Index) -> bool:
    """Whether a source says that it holds some of a model's tensors only."""
    return bool(index.settings.get(PARTIAL))


def _check_degree(index: Index) -> list[str]:
    """The tensor-parallel degree as configured, against the ranks found."""
    degree = index.settings.get("model_parallel_size", len(index.ranks))
    if degree == len(index.ranks) or not _has_yaml(index):
        return []
    return [
        f"{index.where}: the configuration says model_parallel_size {degree} but the files are those of "
        f"{len(index.ranks)} rank(s). Download the missing ranks' files, or give the right YAML with --config."
    ]


def _check_layers(index: Index, named: RankTensors, architecture: Architecture, config: ModelConfig) -> list[str]:
    """The number of layers as configured, against the layers found."""
    weight = next(weight for weight in architecture.weights if weight.stage == "layer")
    pattern = weight.unified.replace("{i}", "*")
    found = sum(fnmatchcase(name, pattern) for name in named[0])
    if found == config.layers:
        return []
    return [
        f"{_configured_in(index)}: the configuration says {config.layers} layers but the files hold {found}; "
        f"download what is missing, or give the right one with {_told_by(index)}."
    ]


def _configured_in(index: Index) -> str:
    """What messages call the place of a source's settings."""
    return ", ".join(map(str, index.configs)) or str(index.where)


def _has_yaml(index: Index) -> bool:
    """Whether a source's settings are those of gpt-neox's training."""
    return SOURCES[index.format].naming == "neox"


def _told_by(index: Index) -> str:
    """The options that give a source another configuration; only gpt-neox has files of it."""
    return "--config or --preset" if _has_yaml(index) else "--preset"


def _check_missing(index: Index, named: RankTensors, architecture: Architecture, config: ModelConfig) -> list[str]:
    """Whole layer files and single tensors that are not there."""
    problems = []
    naming = SOURCES[index.format].naming
    for layer, weight in architecture.names(config):
        unified = weight.unified
        for rank, known in enumerate(named):
            if unified in known:
                continue
            if naming != "neox" or index.sequential:
                name = f"{weight.gguf} ({unified})" if naming == "gguf" else unified
                mend = _WITHOUT_HEAD if naming == "unified" and weight.role == "head" else "download it again"
                problems.append(f"{home(index, rank, '')}: {name} is missing; {mend}.")
                continue
            file = home(index, rank, number_name(weight, layer, config.layers))
            problem = f"lacks {weight.source[0]} ({unified})" if file.exists() else "is missing"
            problems.append(f"{file}: {problem}; download it again.")
    return problems


def _check_shapes(index: Index, named: RankTensors, architecture: Architecture, config: ModelConfig) -> list[str]:
    """Tensors whose ranks disagree, whose joined shape is not the configuration's, or that hold no floats."""
    problems = []
    if config.hidden % config.heads:
        problems.append(
            f"{index.where}: {config.heads} heads do not divide hidden size {config.hidden}; "
            "give the right configuration."
        )
    if config.positions == "rotary" and (config.rotary_dims % 2 or not 0 < config.rotary_dims <= config.head_size):
        problems.append(  # of an odd number transformers rotates one more, and GGUF has no word for none
            f"{_configured_in(index)}: {config.rotary_dims} numbers of each head are rotated; "
            f"expected an even number above 0, {config.head_size} at most; give the right configuration."
        )
    for layer, weight in architecture.names(config):
        unified = weight.unified
        parts = [known[unified] for known in named if unified in known]
        if not parts:
            continue
        shapes = [part.shape for part in parts]
        source = number_name(weight, layer, config.layers)
        for rank in range(1, len(parts)):
            if shapes[rank] != shapes[0]:
                problems.append(
                    f"{home(index, rank, source)}: {unified} is {list(shapes[rank])} on rank {rank} "
                    f"but {list(shapes[0])} on rank 0. The shards come from different runs; download them again."
                )
        if 0 in shapes[0]:
            problems.append(f"{home(index, 0, source)}: {unified} {_EMPTY}.")
            continue
        expected = tuple(config.sizes[size] for size in weight.shape)
        if len(set(shapes)) == 1 and (found := _joined_shape(weight, parts, config)) != expected:
            problems.append(
                f"{home(index, 0, source)}: {unified} is {list(found)} "
                f"but the configuration makes it {list(expected)}. "
                f"Give the right configuration with {_told_by(index)}."
            )
        types = [part.dtype.name for part in parts]
        if not parts[0].dtype.quantized and types[0] not in FLOATS:
            problems.append(
                f"{home(index, 0, source)}: {unified} holds {types[0]}; expected one of {', '.join(FLOATS)}. "
                "Download it again, or convert it to one of them first."
            )
        if len(set(types)) > 1:
            problems.append(
                f"{home(index, 0, source)}: {unified} is {' and '.join(sorted(set(types)))} on different ranks. "
                "The shards come from different runs; download them again."
            )
    return problems


def _joined_shape(weight: Weight, parts: Sequence[LazyTensor], config: ModelConfig) -> tuple[int, ...]:
    """The shape that the ranks' equal parts make together (without joining what cannot be joined)."""
    if len(parts[0].shape) != len(weight.shape):
        return parts[0].shape
    return join(weight.join, parts, config).shape

"""Open any source as one model: find out what it is, give its tensors their unified names, check coverage, join ranks.

Every source tensor is used once or dropped by name; every unified tensor is made once, in the shape that the
configuration gives it. Anything else is an error that lists what is missing, left over or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.fold import folded
from neoxconv.arch.joins import NORMS, join
from neoxconv.core.model import Architecture, Checkpoint, Index, Measured, Opening
from neoxconv.core.table import ModelConfig, RankTensors
from neoxconv.core.tensor import LazyTensor, reordered, transposed
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats import hf
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox import zero
from neoxconv.names import WEIGHTS
from neoxconv.sources import SOURCES
from neoxconv.sources.assemble import assembled
from neoxconv.sources.coverage import check, check_known, is_partial
from neoxconv.sources.foreign import check_no_adapter, snapshot_of, told_of_file, told_of_folder
from neoxconv.sources.naming import count_named, home, name_tensors
from neoxconv.sources.taken_apart import fused_tensors, taken_apart
from neoxconv.sources.tied import stored_head
from neoxconv.storage import Place, is_here, open_storage, place, together
from neoxconv.words import shell


def open_checkpoint(
    path: Place | str,
    *,
    config: Sequence[Path] = (),
    preset: str | None = None,
    norms: str = "mean",
    weights: str = "stored",
    partial: bool = False,
    qkv_layout: str | None = None,
    rmsnorm: str | None = None,
) -> Checkpoint:
    """The model at `path`: a gpt-neox checkpoint (its folder, its global_stepN, or a file in it), a Hugging Face
    folder, a .safetensors or a .gguf file; here, or at any URL that fsspec knows.

    `config` are gpt-neox YAML files, used instead of those beside the weights; `preset` names a released model;
    `norms` says how ranks' norms are joined: mean, fold (exact) or rank0; `weights` which ones are read: stored, or
    master, the fp32 copies in gpt-neox's optimizer files. With `partial` the model may be one of which `--only` wrote
    some tensors. `qkv_layout` and `rmsnorm` settle what gpt-neox's files do not tell (docs/formats.md). Raises
    CheckpointError, or PlanError for what is not there.
    """
    return reopen(Opening(place(path), tuple(config), preset, norms, weights, qkv_layout, rmsnorm, partial))


def reopen(opening: Opening) -> Checkpoint:
    """The checkpoint that was asked for so."""
    index = _asked_for(opening)
    architecture = _find_architecture(index)
    named, left = name_tensors(index, architecture)
    named = _with_outputs_as_rows(index, named, architecture)
    check_known(index, named, left, architecture)
    config, notes = _configured(index, named, architecture, opening)
    fused = fused_tensors(index, named, architecture, config, opening)
    named = taken_apart(index, named, fused, architecture, config)
    if SOURCES[index.format].naming == "neox":
        named = [{**architecture.made(index, config), **rank} for rank in named]
    again = stored_head(index, named, architecture, config)
    if again:
        named = [{name: t for name, t in rank.items() if name not in architecture.tied_head} for rank in named]
        notes += (f"{again} is the embedding once more, as tie_word_embeddings says, and is left out",)
    check(replace(index, configs=()) if opening.preset else index, named, left, architecture, config)
    doubts = _doubts(index, architecture, config, opening)
    asked = bool(opening.config or opening.preset)  # and so it decides
    checkpoint = Checkpoint(
        opening=opening,
        index=index,
        architecture=architecture,
        config=config,
        tensors={},
        ranks=_with_acting(named, architecture, config),
        dropped=tuple(dict.fromkeys([*(name for names in left for name in names), *filter(None, [again])])),
        notes=(*notes, *doubts) if asked else notes,
        doubts=() if asked else doubts,
        fused=fused,
    )
    return replace(checkpoint, tensors=_unify(checkpoint))


def _asked_for(opening: Opening) -> Index:
    """What lies where a checkpoint is, with the weights that are asked for; raises CheckpointError for a part of it."""
    if opening.weights not in WEIGHTS:
        raise PlanError(f"--weights {opening.weights}: expected one of {', '.join(WEIGHTS)}.")
    index = read_index(opening.path, opening.config)
    index = zero.with_masters(index) if opening.weights == "master" else index
    if is_partial(index) and not opening.partial:
        raise CheckpointError(f"{index.where}: holds some of a model's tensors only (--only); give the whole model.")
    return index


def _configured(
    index: Index, named: RankTensors, architecture: Architecture, opening: Opening
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The hyperparameters, and notes on what was guessed; raises PlanError for a choice that nobody has."""
    naming = SOURCES[index.format].naming
    config, notes = architecture.config_of[naming](index, _measure(named, architecture), opening)
    if opening.rmsnorm and (config.norm == "layernorm" or naming != "neox"):
        raise PlanError(f"--rmsnorm {opening.rmsnorm}: {index.where} leaves no choice; leave it out.")
    return config, notes


def _with_acting(named: RankTensors, architecture: Architecture, config: ModelConfig) -> RankTensors:
    """Each rank's tensors, what acts in the place of each that the configuration leaves unused."""
    unused = architecture.unused(config).items()
    numbers = range(config.layers) if unused else ()
    acting = {left.replace("{i}", str(i)): used.replace("{i}", str(i)) for left, used in unused for i in numbers}
    return [rank | {left: rank[used] for left, used in acting.items()} for rank in named]


def _doubts(index: Index, architecture: Architecture, config: ModelConfig, opening: Opening) -> tuple[str, ...]:
    """What is stored and contradicts the configuration: the file, both values, and what says which is right."""
    told_by = opening.preset or ", ".join(path.name for path in index.configs) or "config.json"
    is_neox = SOURCES[index.format].naming == "neox"
    decides = "the right YAML, given with --config FILE," if is_neox else "a corrected config.json"
    return tuple(
        f"{home(index, rank, name)}: {name} {values} ({told_by}); {decides} or --preset NAME decides."
        for rank, name, values in architecture.contradictions(index, config)
    )


def read_index(path: Place, config: Sequence[Path]) -> Index:
    """Index whatever is at `path`: files are told by their first bytes, folders by what is in them."""
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist.{_hint(path)}")
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: is neither a file nor a folder; give a checkpoint.")
    check_no_adapter(path)
    return assembled(_read_file(path, config) if path.is_file() else _read_folder(path, config))


def _hint(path: Place) -> str:
    """What may be meant by a place where nothing is: ORG/NAME, as the Hugging Face hub calls its models."""
    if not is_here(path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        return ""
    fetch = shell(["hf", "download", str(path)])
    return f" If it is a model of the Hugging Face hub, download it ({fetch}), or give hf://{path}."


def _read_file(path: Place, config: Sequence[Path]) -> Index:
    """Index a single file, or the whole that it is a part of."""
    file = open_storage(path)
    start = file.text(0, min(9, file.size))
    certain = [source for source in SOURCES.values() if source.magic and start.startswith(source.magic)]
    for source in certain or SOURCES.values():
        if whole := source.of_file(path, start):
            return source.read(whole, config)
    raise CheckpointError(
        told_of_file(path)
        or f"{path}: is no model; it begins with {start[:8]!r}. Expected a .gguf or .safetensors file, "
        "or a file of a gpt-neox checkpoint or of a Hugging Face folder."
    )


def _read_folder(path: Place, config: Sequence[Path]) -> Index:
    """Index what a folder holds."""
    for source in SOURCES.values():
        if whole := source.of_folder(path):
            return source.read(whole, config)
    if snapshot := snapshot_of(path):
        return _read_folder(snapshot, config)
    if told := told_of_folder(path):
        raise CheckpointError(told)
    if tag := neox.tag_folder(path):
        return neox.index(tag)  # which says what is missing, as does the next
    if any(hf.PART.fullmatch(file.name) for file in path.iterdir()):
        return hf.index(path)
    raise CheckpointError(
        f"{path}: holds no model. Expected gpt-neox's layer_NN-model_MM-model_states.pt or mp_rank_MM_model_states.pt "
        "files (or a folder with `latest`), Hugging Face's config.json, or a .gguf or .safetensors file."
    )


def _find_architecture(index: Index) -> Architecture:
    """The family that a source says it is, else the one whose names most of its tensors have."""
    key, naming = SOURCES[index.format].family, SOURCES[index.format].naming
    families = [architecture for architecture in ARCHITECTURES if naming in architecture.config_of]
    if key is None or key not in index.settings:
        return max(families, key=lambda each: (count_named(index, each), each.trained(index.settings)))
    told = index.settings[key]
    known: dict[str, Architecture] = {}
    for architecture in families:
        for name in filter(None, (architecture.name, architecture.gguf_name)):
            known.setdefault(name, architecture)  # of families that share a name the first
    if not isinstance(told, str) or told not in known:
        raise CheckpointError(
            f"{index.where}: is a {str(told)[:60]} model; expected {' or '.join(known)}, others are not supported."
        )
    return known[told]


def _with_outputs_as_rows(index: Index, named: RankTensors, architecture: Architecture) -> RankTensors:
    """Each rank's tensors, those that Hugging Face's files hold the other way turned; quantized ones never are."""
    across = [weight.unified for weight in architecture.weights if weight.transposed]
    if not across or SOURCES[index.format].naming != "unified":
        return named
    patterns = [re.compile(re.escape(name).replace(re.escape("{i}"), r"\d+")) for name in across]

    def turned(name: str, tensor: LazyTensor) -> LazyTensor:
        turn = len(tensor.shape) == 2 and not tensor.dtype.quantized and any(p.fullmatch(name) for p in patterns)
        return transposed(tensor) if turn else tensor

    return [{name: turned(name, tensor) for name, tensor in rank.items()} for rank in named]


def _measure(named: RankTensors, architecture: Architecture) -> Measured:
    """What the shapes tell; zeros where a tensor is missing, which `check` reports."""
    by_role = {weight.role: weight.unified_at(0) for weight in architecture.weights if weight.role != "bias"}

    def rows(role: str) -> int:
        return sum(rank[by_role[role]].rows for rank in named if by_role[role] in rank)

    return Measured(
        layers=max((layer for layer in map(_layer_in, named[0]) if layer is not None), default=-1) + 1,
        hidden=named[0][by_role["norm"]].rows if by_role["norm"] in named[0] else 0,
        ff=sum(rank[by_role["mlp_out"]].columns for rank in named if by_role["mlp_out"] in rank),
        rows=rows("embedding"),
        tied=by_role["head"] not in named[0],
    )


def _layer_in(unified: str) -> int | None:
    """The number of the layer that a unified name, which holds no other, tells; None for none."""
    match = re.search(r"\.(\d+)\.", unified)
    return int(match[1]) if match else None


def _unify(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of the whole model, in the order of the forward pass."""
    architecture, config, ranks = checkpoint.architecture, checkpoint.config, checkpoint.ranks
    if checkpoint.norms not in NORMS:
        raise PlanError(f"--norms {checkpoint.norms}: expected one of {', '.join(NORMS)}.")
    if checkpoint.norms == "fold" and len(ranks) > 1:
        ranks = folded(ranks, architecture, config)
    as_gguf = SOURCES[checkpoint.index.format].naming == "gguf"
    tensors = {}
    for _, weight in architecture.names(config):
        if is_partial(checkpoint.index) and weight.unified not in ranks[0]:
            continue
        how = NORMS[checkpoint.norms] if weight.role == "norm" else weight.join
        tensor = join(how, [rank[weight.unified] for rank in ranks], config)
        if as_gguf and weight.gguf_order:
            tensor = reordered(tensor, np.argsort(weight.gguf_order(config)))
        tensors[weight.unified] = tensor
    return tensors


def rank_difference(checkpoint: Checkpoint) -> float:
    """The largest difference between ranks in any norm, which are copies of each other in theory; 0 for one rank."""
    names = checkpoint.architecture.names(checkpoint.config)
    norms = [[rank[weight.unified] for rank in checkpoint.ranks] for _, weight in names if weight.role == "norm"]

    def difference(parts: Sequence[LazyTensor]) -> float:
        return float(np.ptp(np.stack([part.floats(0, part.rows) for part in parts]), axis=0).max())

    return max(together(difference, norms, checkpoint.index.folder), default=0.0)

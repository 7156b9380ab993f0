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
from neoxconv.core.tensor import LazyTensor, reordered
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats import hf, safetensors
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox import zero
from neoxconv.names import WEIGHTS
from neoxconv.sources.assemble import assembled
from neoxconv.sources.coverage import check, is_partial
from neoxconv.sources.naming import Named, name_tensors
from neoxconv.storage.address import place
from neoxconv.storage.files import open_storage
from neoxconv.storage.remote import Place, together


def open_checkpoint(
    path: Place | str,
    *,
    config: Sequence[Path] = (),
    preset: str | None = None,
    norms: str = "mean",
    weights: str = "stored",
    partial: bool = False,
) -> Checkpoint:
    """The model at `path`: a gpt-neox checkpoint (its folder, its global_stepN, or a file in it), a Hugging Face
    folder, a .safetensors or a .gguf file; here, or at any URL that fsspec knows.

    `config` are gpt-neox YAML files, used instead of those beside the weights; `preset` names a released model;
    `norms` says how ranks' norms are joined: mean, fold (exact) or rank0; `weights` which ones are read: stored, or
    master, the fp32 copies in gpt-neox's optimizer files. With `partial` the model may be one of which `--only` wrote
    some tensors. Raises CheckpointError, or PlanError for what is not there.
    """
    return reopen(Opening(place(path), tuple(config), preset, norms, weights, partial))


def reopen(opening: Opening) -> Checkpoint:
    """The checkpoint that was asked for so."""
    if opening.weights not in WEIGHTS:
        raise PlanError(f"--weights {opening.weights}: expected one of {', '.join(WEIGHTS)}.")
    index = read_index(opening.path, opening.config)
    index = zero.with_masters(index) if opening.weights == "master" else index
    if is_partial(index) and not opening.partial:
        raise CheckpointError(f"{index.where}: holds some of a model's tensors only (--only); give the whole model.")
    architecture = find_architecture(index)
    named, left = name_tensors(index, architecture)
    measured = measure(named, architecture)
    model, notes = architecture.config_of[index.format](index, measured, opening.preset)
    check(replace(index, configs=()) if opening.preset else index, named, left, architecture, model)
    dropped = tuple(dict.fromkeys(name for names in left for name in names))
    checkpoint = Checkpoint(opening, index, architecture, model, {}, dropped, notes)
    return replace(checkpoint, tensors=unify(checkpoint, named))


def read_index(path: Place, config: Sequence[Path]) -> Index:
    """Index whatever is at `path`: files are told by their first bytes, folders by the names in them."""
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist.")
    if isinstance(path, Path) and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: is neither a file nor a folder; give a checkpoint.")
    return assembled(read_file(path, config) if path.is_file() else read_folder(path, config))


def read_file(path: Place, config: Sequence[Path]) -> Index:
    """Index a single file, or the whole that it is a part of."""
    file = open_storage(path)
    start = file.text(0, min(9, file.size))
    if start[:4] == gguf.MAGIC:
        return gguf.index(path)
    if any(part.fullmatch(path.name) for part in neox.PARTS):
        return read_folder(path.parent, config)
    if hf.PART.fullmatch(path.name) and (path.parent / "config.json").is_file():
        return hf.index(path.parent)
    if start[8:] == b"{":
        return safetensors.index(path)
    raise CheckpointError(
        f"{path}: is no model; it begins with {start[:8]!r}. Expected a .gguf or .safetensors file, "
        "or a file of a gpt-neox checkpoint or of a Hugging Face folder."
    )


def read_folder(path: Place, config: Sequence[Path]) -> Index:
    """Index what a folder holds."""
    if folder := neox.tag_folder(path):
        return neox.index(folder, config)
    if (path / "config.json").is_file():
        return hf.index(path)
    for suffix, read in ((".gguf", gguf.index), (".safetensors", safetensors.index)):
        files: list[Place] = sorted(path.glob("*" + suffix), key=str)
        if files and (len(files) == 1 or (suffix == ".gguf" and re.search(r"-00001-of-\d{5}$", files[0].stem))):
            return read(files[0])
        if files:
            raise CheckpointError(f"{path}: holds {len(files)} {suffix} files; give the one you mean.")
    raise CheckpointError(
        f"{path}: holds no model. Expected gpt-neox's layer_NN-model_MM-model_states.pt or mp_rank_MM_model_states.pt "
        "files (or a folder with `latest`), Hugging Face's config.json, or a .gguf or .safetensors file."
    )


def find_architecture(index: Index) -> Architecture:
    """The family that a source says it is; gpt-neox shards can only be one."""
    key = {"hf": "model_type", "safetensors": "model_type", "gguf": "general.architecture"}.get(index.format)
    name = index.settings.get(key, "gpt_neox") if key else "gpt_neox"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{index.where}: is a {name} model; expected {' or '.join(ARCHITECTURES)}, others are not supported."
        )
    return ARCHITECTURES[name]


def measure(named: Named, architecture: Architecture) -> Measured:
    """What the shapes tell; zeros where a tensor is missing, which `check` reports."""
    layers = [int(m[1]) for m in (re.search(r"layers\.(\d+)\.", name) for name in named[0]) if m]
    by_role = {weight.role: weight.at(0).unified for weight in architecture.weights if weight.role != "bias"}

    def rows(role: str) -> int:
        return sum(rank[by_role[role]].rows for rank in named if by_role[role] in rank)

    hidden = named[0][by_role["norm"]].rows if by_role["norm"] in named[0] else 0
    return Measured(
        max(layers, default=-1) + 1, hidden, rows("mlp_in"), rows("embedding"), by_role["head"] not in named[0]
    )


def unify(checkpoint: Checkpoint, named: Named) -> dict[str, LazyTensor]:
    """The tensors of the whole model, in the order of the forward pass."""
    architecture, config = checkpoint.architecture, checkpoint.config
    if checkpoint.norms not in NORMS:
        raise PlanError(f"--norms {checkpoint.norms}: expected one of {', '.join(NORMS)}.")
    if checkpoint.norms == "fold" and len(named) > 1:
        named = folded(named, architecture, config)
    tensors = {}
    for _, weight in architecture.names(config):
        if is_partial(checkpoint.index) and weight.unified not in named[0]:
            continue
        how = NORMS[checkpoint.norms] if weight.role == "norm" else weight.join
        tensor = join(how, [known[weight.unified] for known in named], config)
        if checkpoint.index.format == "gguf" and weight.gguf_order:
            tensor = reordered(tensor, np.argsort(weight.gguf_order(config)))
        tensors[weight.unified] = tensor
    return tensors


def rank_difference(checkpoint: Checkpoint) -> float:
    """The largest difference between ranks in any norm, which are copies of each other in theory; 0 for one rank."""
    named, _ = name_tensors(checkpoint.index, checkpoint.architecture)
    names = checkpoint.architecture.names(checkpoint.config)
    norms = [[known[weight.unified] for known in named] for _, weight in names if weight.role == "norm"]

    def difference(parts: Sequence[LazyTensor]) -> float:
        return float(np.ptp(np.stack([part.floats(0, part.rows) for part in parts]), axis=0).max())

    return max(together(difference, norms, checkpoint.index.folder), default=0.0)

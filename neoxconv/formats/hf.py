"""Hugging Face folders: config.json, tensors in one file or in shards with an index, and the files beside them.

    config.json                         the hyperparameters
    model.safetensors                   all tensors; or
    model-0000N-of-0000M.safetensors    shards, and
    model.safetensors.index.json        {"metadata": {...}, "weight_map": {tensor: file}}
    generation_config.json, README.md   and the tokenizer's files, which tokenizer.py makes

Source: transformers' utils/__init__.py (names of files) and modeling_utils.py; huggingface_hub's serialization/.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from neoxconv.core.layout import Entry, FileLayout, in_groups
from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.formats import safetensors
from neoxconv.formats.pt import read_pt
from neoxconv.formats.safetensors import read_json
from neoxconv.storage import Place, Storage, open_storage, together

# The first that exists is read, as transformers does: (one file, its index when there are shards).
_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# What stands for the whole folder when it is given.
PART = re.compile(r"config\.json|(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


class _Header(NamedTuple):
    """What a file of weights holds, and the SHA-256 of what describes it."""

    tensors: dict[str, LazyTensor]
    checksum: str


def index(folder: Place) -> Index:
    """Index the folder's safetensors, or else its .bin files; raises CheckpointError naming what is missing."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; download it into this folder.")
    settings = read_json(folder / "config.json")
    for single, shards in _FILES:
        if (folder / single).is_file():
            file = open_storage(folder / single)
            header = _read_header(file)
            files = (SourceFile(file, header.checksum),)
            return Index(format="hf", folder=folder, files=files, ranks=(header.tensors,), settings=settings)
        if (folder / shards).is_file():
            return _sharded(folder, folder / shards, settings)
    raise CheckpointError(
        f"{folder}: has a config.json but no weights; expected {' or '.join(f for f, _ in _FILES)}. Download one."
    )


def _sharded(folder: Place, path: Place, settings: dict[str, Any]) -> Index:
    """Index the shards that the index file `path` lists; raises CheckpointError where they are not what it says."""
    weight_map = _read_weight_map(path)
    names = sorted(set(weight_map.values()))
    present = {file.name for file in folder.iterdir() if file.is_file()}
    missing = (n for n in names if n not in present)
    raise_all(CheckpointError, (f"{folder}: lacks {n!r:.300}, which {path.name} names; download it." for n in missing))
    files = dict(zip(names, together(lambda name: open_storage(folder / name), names, folder), strict=True))
    headers = dict(zip(names, together(_read_header, files.values(), folder), strict=True))
    _check_placed(path, weight_map, {name: header.tensors for name, header in headers.items()})
    tensors = {name: tensor for file in names for name, tensor in headers[file].tensors.items()}
    sources = tuple(SourceFile(file, headers[name].checksum) for name, file in files.items())
    return Index(format="hf", folder=folder, files=sources, ranks=(tensors,), settings=settings)


def _read_weight_map(path: Place) -> dict[str, str]:
    """The file name of each tensor; raises CheckpointError where it has none, or a file is not in this folder."""
    weight_map = read_json(path).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(n, str) for n in weight_map.values())):
        raise CheckpointError(f"{path}: has no weight_map of file names; download it again.")
    climbing = (name for name in sorted(set(weight_map.values())) if not _stays_in_folder(name))
    raise_all(
        CheckpointError,
        (f"{path}: names the file {n!r:.80}, which is not in its folder; download it again." for n in climbing),
    )
    return weight_map


def _stays_in_folder(name: str) -> bool:
    """Whether a file name leads nowhere else."""
    return bool(name) and not {"/", "\\", "\0"} & set(name) and name not in (".", "..")


def _check_placed(path: Place, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Raise CheckpointError unless the files hold (`held`: their tensors' names) every tensor where the map says."""
    folder = path.parent
    absent = (
        f"{folder / file}: lacks {tensor:.200}, which {path.name} places there; download both again."
        for tensor, file in weight_map.items()
        if tensor not in held[file]
    )
    raise_all(CheckpointError, absent)
    stray = (
        f"{folder / file}: holds {tensor:.200}, which {path.name} does not place there; download both again."
        for file, tensors in held.items()
        for tensor in tensors
        if weight_map.get(tensor) != file
    )
    raise_all(CheckpointError, stray)


def _read_header(file: Storage) -> _Header:
    """The tensors of a safetensors or .bin file, and its checksum; raises CheckpointError where it is damaged."""
    if file.path.suffix == ".safetensors":
        header = safetensors.read_header(file)
        return _Header(header.tensors, header.checksum)
    found = read_pt(file)
    if not isinstance(found.value, dict):
        raise CheckpointError(
            f"{file.path}: holds a {type(found.value).__name__}, expected a dictionary of tensors; download it again."
        )
    odd = (name for name, t in found.value.items() if not isinstance(name, str) or not isinstance(t, LazyTensor))
    raise_all(
        CheckpointError,
        (f"{file.path}: {name!r:.80} is not a named tensor that can be read; remove it." for name in odd),
    )
    return _Header(found.value, found.checksum)


def layout(entries: Sequence[Entry], shard_size: int) -> tuple[FileLayout, ...]:
    """Files of at most `shard_size` bytes of tensors, filled in order; a larger tensor has one to itself."""
    groups = in_groups(entries, shard_size)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [_FILES[0][0]]
    return tuple(safetensors.layout(n, group, {"format": "pt"}) for n, group in zip(names, groups, strict=True))


def weight_index(files: Sequence[FileLayout]) -> bytes:
    """model.safetensors.index.json: which file holds each tensor."""
    entries = [(slot.entry, file.name) for file in files for slot in file.slots if slot.number == 0]
    weight_map = {part.name: name for entry, name in entries for part in entry.parts}
    value = {
        "metadata": {
            "total_parameters": sum(math.prod(entry.tensor.shape) for entry, _ in entries),
            "total_size": sum(entry.nbytes for entry, _ in entries),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(value, indent=2) + "\n").encode()


def generation_config(config: Mapping[str, Any]) -> bytes:
    """generation_config.json: the tokens at which text begins and ends."""
    value = {"_from_model_config": True, **{key: config[key] for key in ("bos_token_id", "eos_token_id")}}
    return (json.dumps(value, indent=2) + "\n").encode()


def model_card(title: str, family: str, facts: Sequence[tuple[str, str]]) -> bytes:
    """README.md: what the model is, its family as Hugging Face tags it, and where it comes from."""
    head = ["---", "library_name: transformers", f"tags: [{family}]", "---", "", f"# {title}", ""]
    return "\n".join([*head, *(f"- {name}: {value}" for name, value in facts), ""]).encode()

"""Hugging Face folders: config.json, tensors in one file or in shards with an index, and the files beside them.

    config.json                         the hyperparameters
    model.safetensors                   all tensors; or
    model-0000N-of-0000M.safetensors    shards, and
    model.safetensors.index.json        {"metadata": {...}, "weight_map": {tensor: file}}; without it the names of the
                                        shards must make a whole series
    generation_config.json              and the tokenizer's files, which tokenizer.py makes

Source: transformers' utils/__init__.py (names of files) and modeling_utils.py; huggingface_hub's serialization/.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
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
    ("pytorch_model_fsdp.bin", "pytorch_model_fsdp.bin.index.json"),  # accelerate's, of the whole model
)
_MOST_SHARDS = 1000  # expected for each one found, beyond which the expectation is wrong
# What stands for the whole folder when it is given.
PART = re.compile(r"config\.json|(pytorch_)?model(_fsdp)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_SHARD = re.compile(
    r"(?P<before>(?:pytorch_)?model-)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<kind>\.safetensors|\.bin)"
)


class _Header(NamedTuple):
    """What a file of weights holds, and the SHA-256 of what describes it."""

    tensors: dict[str, LazyTensor]
    checksum: str


def has_weights(folder: Place) -> bool:
    """Whether a folder has a configuration, and weights under the names that `index` reads."""
    if not (folder / "config.json").is_file():
        return False
    return any((folder / name).is_file() for names in _FILES for name in names) or bool(_shards_in(folder))


def index(folder: Place, dropped: Sequence[str] = ()) -> Index:
    """Index the folder's safetensors, or else its .bin files; raises CheckpointError naming what is missing.

    `dropped` are patterns of tensors that nobody needs: an index of shards may leave them out, or name too many.
    """
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
            weight_map = _read_weight_map(folder / shards)
            needed = {tensor: name for tensor, name in weight_map.items() if not _is_among(tensor, dropped)}
            return _sharded(folder, folder / shards, needed or weight_map, dropped, settings)
    if names := _shards_in(folder):
        return _without_index(folder, names, dropped, settings)
    raise CheckpointError(
        f"{folder}: has a config.json but no weights; expected {' or '.join(f for f, _ in _FILES)}. Download one."
    )


def _is_among(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sharded(
    folder: Place, path: Place, weight_map: Mapping[str, str], dropped: Sequence[str], settings: dict[str, Any]
) -> Index:
    """Index the shards that the index file `path` lists; raises CheckpointError where they are not what it says."""
    names = sorted(set(weight_map.values()))
    present = {file.name for file in folder.iterdir() if file.is_file()}
    missing = (n for n in names if n not in present)
    raise_all(CheckpointError, (f"{folder}: lacks {n!r:.300}, which {path.name} names; download it." for n in missing))
    files, headers = _headers(folder, names)
    _check_placed(path, weight_map, {name: header.tensors for name, header in headers.items()}, dropped)
    return _index_of(folder, files, headers, settings)


def is_shard(path: Place) -> bool:
    """Whether a file's name says that it holds a part of a model."""
    return bool(_SHARD.fullmatch(path.name))


def _shards_in(folder: Place) -> list[str]:
    """The names of files that say which shard they are, safetensors if there are any."""
    names = sorted(path.name for path in folder.glob("*model-*-of-*") if is_shard(path))
    return [name for name in names if name.endswith(".safetensors")] or names


def _without_index(folder: Place, names: Sequence[str], dropped: Sequence[str], settings: dict[str, Any]) -> Index:
    """Index shards that no file lists; raises CheckpointError unless their names make one whole series."""
    series = sorted(
        {(match["before"], match["count"], match["kind"]) for match in map(_SHARD.fullmatch, names) if match}
    )
    if len(series) > 1:
        each = " and ".join(f"{before}*-of-{count}{kind}" for before, count, kind in series)
        raise CheckpointError(f"{folder}: holds {each} and no index of either; keep those of one, or give its index.")
    before, count, kind = series[0]
    if int(count) > _MOST_SHARDS * len(names):
        raise CheckpointError(f"{folder}: holds {len(names)} of {int(count)} shards; download the others.")
    wanted = [f"{before}{number:05d}-of-{count}{kind}" for number in range(1, int(count) + 1)]
    missing = (
        f"{folder / name}: is missing, and so is the index of the shards; download it."
        for name in wanted
        if name not in names
    )
    raise_all(CheckpointError, missing)
    strays = (f"{folder / name}: is no shard of {int(count)}; remove it." for name in names if name not in wanted)
    raise_all(CheckpointError, strays)
    files, headers = _headers(folder, names)
    first: dict[str, str] = {}
    twice = (
        f"{folder / name}: holds {tensor:.200}, which {first[tensor]} holds too; download both again."
        for name, header in headers.items()
        for tensor in header.tensors
        if first.setdefault(tensor, name) != name and not _is_among(tensor, dropped)
    )
    raise_all(CheckpointError, twice)
    return _index_of(folder, files, headers, settings)


def _headers(folder: Place, names: Sequence[str]) -> tuple[dict[str, Storage], dict[str, _Header]]:
    """The files of these names, and what each holds."""
    files = dict(zip(names, together(lambda name: open_storage(folder / name), names, folder), strict=True))
    return files, dict(zip(names, together(_read_header, files.values(), folder), strict=True))


def _index_of(
    folder: Place, files: Mapping[str, Storage], headers: Mapping[str, _Header], settings: dict[str, Any]
) -> Index:
    """What all the files hold."""
    tensors = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
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


def _check_placed(
    path: Place, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]], dropped: Sequence[str]
) -> None:
    """Raise CheckpointError unless the files hold (`held`: their tensors' names) every tensor where the map says, and
    beside those only what fits a pattern of `dropped`."""
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
        if weight_map.get(tensor) != file and not _is_among(tensor, dropped)
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


def layout(entries: Sequence[Entry], shard_size: int, metadata: Mapping[str, str]) -> tuple[FileLayout, ...]:
    """Files of at most `shard_size` bytes of tensors, filled in order; a larger tensor has one to itself."""
    groups = in_groups(entries, shard_size)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [_FILES[0][0]]
    return tuple(safetensors.layout(n, group, metadata) for n, group in zip(names, groups, strict=True))


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
    """generation_config.json: the tokens at which text begins and ends, as far as the configuration has them."""
    said = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    value = {"_from_model_config": True, **said}
    return (json.dumps(value, indent=2) + "\n").encode()

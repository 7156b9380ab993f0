"""Any source as one model under unified names. One row each in SOURCES: how it is told, spelled and read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neoxconv.arch import ARCHITECTURES
from neoxconv.core.model import Index
from neoxconv.errors import CheckpointError
from neoxconv.formats import deepspeed, hf, safetensors
from neoxconv.formats.ctranslate2.read import MODEL, is_model
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.neox import folder as neox
from neoxconv.sources import ctranslate2
from neoxconv.storage import Place, open_storage

Read = Callable[[Place, Sequence[Path]], Index]  # of the place that was found, and the YAML files that were given
_DROPPED = tuple(pattern for architecture in ARCHITECTURES for pattern in architecture.dropped)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A format that can be read.

    `of_file(path, start)`, with the file's first 9 bytes, gives what `read` shall be given where that file is such a
    source or a part of one; `of_folder(path)` the same of a folder; else None. Both may raise CheckpointError.
    """

    name: str  # as Index.format says
    title: str  # for people
    naming: str  # whose names tensors and settings have: "neox", "unified" (Hugging Face's) or "gguf"
    family: str | None  # the setting that names the architecture; None: the tensors' names tell it
    magic: bytes | None = None  # what its files begin with, where that alone tells them: surer than a name
    of_file: Callable[[Place, bytes], Place | None]
    of_folder: Callable[[Place], Place | None]
    read: Read


def neox_folder(path: Place) -> Place | None:
    """The `global_stepN` that a folder means, where weights in it have gpt-neox's names.

    A `latest` alone tells nothing: Hugging Face's Trainer has one too, and what it names may have been left behind.
    """
    try:
        tag = neox.tag_folder(path)
        return tag if tag is not None and neox.is_ours(tag) else None
    except CheckpointError:
        if hf.has_weights(path):
            return None
        raise


def deepspeed_folder(path: Place) -> Place | None:
    """The `global_stepN` that a folder means, where it holds a state dict under other names than gpt-neox's."""
    tag = neox.tag_folder(path)
    return tag if tag is not None and deepspeed.has_weights(tag) else None


def part_of_neox(path: Place, start: bytes) -> Place | None:
    """The `global_stepN` that a file of gpt-neox belongs to."""
    if not is_part(path):
        return None
    return neox_folder(path.parent) or (None if deepspeed_folder(path.parent) else path.parent)


def part_of_deepspeed(path: Place, start: bytes) -> Place | None:
    """The `global_stepN` that a file of another model's training belongs to."""
    return deepspeed_folder(path.parent) if is_part(path) else None


def is_part(path: Place) -> bool:
    """Whether a file is named as DeepSpeed names those of a checkpoint."""
    return any(part.fullmatch(path.name) for part in neox.PARTS)


def part_of_hf(path: Place, start: bytes) -> Place | None:
    """The folder of a file that Hugging Face folders have."""
    return path.parent if hf.PART.fullmatch(path.name) and (path.parent / "config.json").is_file() else None


def hf_folder(path: Place) -> Place | None:
    """The folder, where it has a configuration of Hugging Face's and weights."""
    return path if hf.has_weights(path) else None


def ctranslate2_folder(path: Place) -> Place | None:
    """The folder, where its model.bin begins as CTranslate2's do."""
    if not (path / MODEL).is_file():
        return None
    file = open_storage(path / MODEL)
    return path if is_model(file.text(0, min(9, file.size))) else None


def gguf_file(folder: Place) -> Place | None:
    """The only GGUF file of a folder, or the first part of the model that is there in parts."""
    files: list[Place] = sorted(folder.glob("*.gguf"), key=str)
    in_parts = bool(files) and re.search(r"-00001-of-\d{5}$", files[0].stem)
    return files[0] if in_parts else only(folder, files)


def safetensors_file(folder: Place) -> Place | None:
    """The only .safetensors file of a folder; shards are none."""
    return only(folder, sorted((path for path in folder.glob("*.safetensors") if not hf.is_shard(path)), key=str))


def only(folder: Place, files: Sequence[Place]) -> Place | None:
    """The one file, None for none. Raises CheckpointError for several."""
    if len(files) > 1:
        raise CheckpointError(f"{folder}: holds {len(files)} {files[0].suffix} files; give the one you mean.")
    return files[0] if files else None


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (  # in the order in which they are looked for
        Source(
            name="neox",
            title="gpt-neox checkpoint",
            naming="neox",
            family=None,
            of_file=part_of_neox,
            of_folder=neox_folder,
            read=neox.index,
        ),
        Source(
            name="hf",
            title="Hugging Face folder",
            naming="unified",
            family="model_type",
            of_file=part_of_hf,
            of_folder=hf_folder,
            read=lambda path, config: hf.index(path, _DROPPED),
        ),
        Source(
            name="deepspeed",
            title="DeepSpeed checkpoint",
            naming="unified",
            family="model_type",
            of_file=part_of_deepspeed,
            of_folder=deepspeed_folder,
            read=lambda path, config: deepspeed.index(path),
        ),
        Source(
            name="ctranslate2",
            title="CTranslate2 folder",
            naming="unified",
            family="model_type",
            of_file=lambda path, start: path.parent if path.name == MODEL and is_model(start) else None,
            of_folder=ctranslate2_folder,
            read=lambda path, config: ctranslate2.index(path),
        ),
        Source(
            name="gguf",
            title="GGUF file",
            naming="gguf",
            family="general.architecture",
            magic=gguf.MAGIC,
            of_file=lambda path, start: path if start.startswith(gguf.MAGIC) else None,
            of_folder=gguf_file,
            read=lambda path, config: gguf.index(path),
        ),
        Source(
            name="safetensors",
            title="safetensors file",
            naming="unified",
            family="model_type",
            of_file=lambda path, start: path if start[8:] == b"{" else None,
            of_folder=safetensors_file,
            read=lambda path, config: safetensors.index(path),
        ),
    )
}

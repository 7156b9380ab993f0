"""A target beside the source that it was made from, and what both are in figures: size, bits per weight, digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.engine.manifest import Range, hash_range, manifest_path
from neoxconv.errors import CheckpointError
from neoxconv.storage import Place, is_file, size_of, stream_of
from neoxconv.targets.about import title
from neoxconv.targets.metadata import NAME, words_of
from neoxconv.targets.recipe import Recipe
from neoxconv.verify.report import Report


@dataclass(frozen=True)
class Subject:
    """A target that is compared with the source, which was opened with this target's policies."""

    source: Checkpoint
    candidate: Checkpoint
    target: Place
    manifest: Mapping[str, Any] | None = None
    before: tuple[Report, ...] = ()  # of the earlier levels
    basis: Mapping[str, str] | None = None  # how the source was read


def described(model: Checkpoint) -> dict[str, Any]:
    """A model in figures.

    `bytes` are its files', `stored` those of their tensors, scales included, of which each parameter has its share of
    `bits_per_weight`.
    """
    index = model.index
    stored = sum(tensor.nbytes for rank in index.ranks for tensor in rank.values())
    return {
        "format": index.format,
        "parameters": model.parameters,
        "bytes": sum(file.storage.size for file in index.files),
        "stored": stored,
        "bits_per_weight": 8 * stored / max(1, model.parameters),
    }


def fingerprint(source: Checkpoint) -> str:
    """SHA-256 over the source's files: each one's name, size, and the digest of what describes its contents."""
    files = [[file.storage.name, file.storage.size, file.checksum] for file in source.index.files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def manifest_digest(target: Place) -> str | None:
    """SHA-256 of the target's manifest, which has one of every byte range; None where there is none."""
    path = manifest_path(target)
    if not is_file(path):
        return None
    with stream_of(path) as stream:
        return hash_range(stream, Range("", 0, size_of(path)))


def name_of(source: Checkpoint) -> str:
    """What the model is called in its targets' metadata; by its shapes where its card cannot be read."""
    try:
        return str(words_of(source, Recipe("gguf")).keys[NAME])
    except CheckpointError:
        return title(source)

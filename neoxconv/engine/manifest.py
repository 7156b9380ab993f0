"""The manifest: what a target holds, where it came from, and a SHA-256 for every byte range.

A file's ranges cover it without gaps: the tensors by name, and between them the container (headers, padding) without
one. A file's own digest is the SHA-256 of its ranges' digests, as text, in the order of their offsets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neoxconv.errors import CheckpointError
from neoxconv.storage import Place
from neoxconv.version import __version__

if TYPE_CHECKING:
    from neoxconv.core.layout import Digest, FileLayout
    from neoxconv.engine.plan import Plan

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
Described = dict[str, Any]  # a file as the manifest has it: its name, bytes, SHA-256 and ranges
Kind = TypeVar("Kind", bound=Place)


@dataclass(frozen=True)
class Range:
    """`length` bytes of a file from `offset` on; `name` is the tensor's, or empty for the container."""

    name: str
    offset: int
    length: int


def beside(target: Kind) -> Kind:
    """Where the manifest of a single file lies."""
    return target.with_name(f"{target.name}.{MANIFEST}")


def manifest(plan: Plan, described: Sequence[Described]) -> bytes:
    """The manifest of a target whose files of tensors are `described`, as JSON with a fixed order of keys."""
    value = {
        "neoxconv": __version__,
        "format": plan.recipe.format,
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.facts,
        "norms": plan.checkpoint.norms,
        **plan.checkpoint.unusual,
        "type": plan.kind,
        "parameters": plan.checkpoint.parameters,
        "config": plan.checkpoint.config.facts,
        "notes": list(plan.notes),
        "tokenizer": {**plan.tokenizer, "file": name} if (name := _file_name(plan)) else None,
        **({"origin": plan.origin} if plan.origin else {}),
        "sources": plan.sources,
        "dropped": list(plan.checkpoint.dropped),
        "files": [*described, *(describe_sidecar(name, data) for name, data in plan.sidecars.items())],
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _file_name(plan: Plan) -> str:
    """The name of the tokenizer's file, without its folder; empty where there is no tokenizer."""
    return str(plan.tokenizer.get("file", "")).rpartition("/")[2]


def describe_file(file: FileLayout, folder: Path, digests: Mapping[str, Digest]) -> Described:
    """A file of tensors: their digests are known, the container's are read."""
    ranges = []
    with open(folder / file.name, "rb") as stream:
        for part in _tiles(file):
            known = digests.get(f"{file.name}@{part.offset}") if part.name else None
            sha256 = known.sha256 if known else hash_range(stream, part)
            entry = {"name": part.name, "offset": part.offset, "bytes": part.length, "sha256": sha256}
            ranges.append(entry | ({"overflow": known.overflow} if known and known.overflow else {}))
    return {"name": file.name, "bytes": file.size, "sha256": combined(r["sha256"] for r in ranges), "ranges": ranges}


def overflows(described: Sequence[Described]) -> dict[str, int]:
    """How many weights of each tensor were cut to the largest number of its type."""
    ranges = (entry for file in described for entry in file["ranges"])
    return {entry["name"]: entry["overflow"] for entry in ranges if "overflow" in entry}


def describe_sidecar(name: str, data: bytes) -> Described:
    """A small file: one range."""
    sha256 = hashlib.sha256(data).hexdigest()
    return {
        "name": name,
        "bytes": len(data),
        "sha256": combined([sha256]),
        "ranges": [{"name": "", "offset": 0, "bytes": len(data), "sha256": sha256}],
    }


def _tiles(file: FileLayout) -> Iterator[Range]:
    """The file's ranges in order, without gaps."""
    position = 0
    for slot in sorted(file.slots, key=lambda slot: (slot.offset, slot.part.nbytes)):
        if slot.offset > position:
            yield Range("", position, slot.offset - position)
        yield Range(slot.part.name, slot.offset, slot.part.nbytes)
        position = slot.offset + slot.part.nbytes
    if position < file.size:
        yield Range("", position, file.size - position)


def hash_range(stream: Any, part: Range) -> str:
    """The SHA-256 of a range of an open file; of what is there, where the file ends before the range does."""
    digest, left = hashlib.sha256(), part.length
    stream.seek(part.offset)
    while left and (data := stream.read(min(_CHUNK, left))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def combined(digests: Any) -> str:
    """A file's digest from its ranges' digests in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def manifest_path(target: Place) -> Place:
    """Where a target's manifest lies: inside a folder, beside a file."""
    return target / MANIFEST if target.is_dir() else beside(target)


def read_manifest(target: Place) -> dict[str, Any] | None:
    """The manifest of a target, or None where there is none; raises CheckpointError where it cannot be understood."""
    path = manifest_path(target)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for file in value["files"]:
            _check_entry(file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is damaged, or not a manifest of neoxconv. Remove it to compare weights alone."
        ) from error
    return dict(value)


def our_files(path: Path) -> list[str] | None:
    """The names of a target's files by its manifest; None for a file that is no manifest of ours."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        own = isinstance(value["neoxconv"], str) and isinstance(value["format"], str)
        own = own and re.fullmatch(r"[0-9a-f]{64}", value["fingerprint"]) is not None
        for file in value["files"]:
            _check_entry(file)
        return [file["name"] for file in value["files"]] if own else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _check_entry(file: Any) -> None:
    """Raise ValueError unless a file's entry is complete and its ranges cover it without gaps."""
    parts = [part_of(entry) for entry in file["ranges"]]
    ends = [0, *(part.offset + part.length for part in parts)]
    texts = [file["name"], file["sha256"], *(entry["sha256"] for entry in file["ranges"])]
    if [*(part.offset for part in parts), file["bytes"]] != ends or not all(isinstance(text, str) for text in texts):
        raise ValueError("ranges with gaps")
    if "\0" in os.fsdecode(os.fsencode(file["name"])):  # raises ValueError for half a character
        raise ValueError("no file's name")


def part_of(entry: Any) -> Range:
    """A range as the manifest describes it."""
    return Range(str(entry["name"]), int(entry["offset"]), int(entry["bytes"]))

"""The first level: every byte of a target is the one that the manifest says was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.manifest import MANIFEST, Range, beside, combined, hash_range
from neoxconv.remote import Place, place
from neoxconv.storage import is_file, size_of, stream_of
from neoxconv.verify.report import Finding, Report

Progress = Callable[[int], None]


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
            check_entry(file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is damaged, or not a manifest of neoxconv. Remove it to compare weights alone."
        ) from error
    return dict(value)


def check_entry(file: Any) -> None:
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


def verify_bytes(target: Place | str, *, progress: Progress = lambda count: None) -> Report:
    """Whether the files of `target` are byte for byte those that its manifest describes.

    Raises CheckpointError where the target or its manifest is missing. `progress` gets counts of bytes read.
    """
    target = place(target)
    if not target.exists():
        raise CheckpointError(f"{target}: does not exist.")
    manifest = read_manifest(target)
    if manifest is None:
        raise CheckpointError(
            f"{manifest_path(target)}: does not exist, so there is nothing to check the bytes against. "
            "Compare with the source instead: neoxconv verify SOURCE TARGET."
        )
    files = manifest["files"]
    findings = [finding for file in files for finding in check_file(target, file, progress)]
    if target.is_dir():
        known = {file["name"] for file in files} | {MANIFEST}
        present = sorted(inside(path, target) for path in target.rglob("*") if path.is_file())
        findings += [Finding(name, "is not in the manifest") for name in present if name not in known]
    return Report("bytes", f"{len(files)} files, {sum(file['bytes'] for file in files):,} bytes", tuple(findings))


def sha256sums(target: Place) -> Iterator[tuple[str, str]]:
    """The names of a target's files, in order, and the SHA-256 of each: of all in a folder, or of the one file.

    Names are relative to the folder that holds them. Raises CheckpointError where the target is missing.
    """
    if not target.exists():
        raise CheckpointError(f"{target}: does not exist.")
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    for path in files:
        with stream_of(path) as stream:
            yield (
                inside(path, target if target.is_dir() else target.parent),
                hash_range(stream, Range("", 0, size_of(path))),
            )


def inside(path: Place, folder: Place) -> str:
    """The name of a file relative to a folder that it lies in."""
    return str(PurePosixPath(str(path)).relative_to(str(folder)))


def check_file(target: Place, file: dict[str, Any], progress: Progress) -> Iterator[Finding]:
    """What is wrong with one file."""
    path = target / file["name"] if target.is_dir() else target
    name = file["name"] if target.is_dir() else target.name
    if target.is_dir() and not PurePosixPath(str(path.resolve())).is_relative_to(str(target.resolve())):
        yield Finding(name, "lies outside the target")
        return
    if not is_file(path):
        yield Finding(name, "is missing")
        return
    if size_of(path) != file["bytes"]:
        yield Finding(name, f"has {size_of(path)} bytes; {file['bytes']} were written")
    if combined(entry["sha256"] for entry in file["ranges"]) != file["sha256"]:
        yield Finding(name, "the manifest's digest of the file does not fit those of its ranges")
    with stream_of(path) as stream:
        for entry in file["ranges"]:
            part = part_of(entry)
            if hash_range(stream, part) != entry["sha256"]:
                what = part.name or "header or padding"
                yield Finding(
                    name, f"{what} (bytes {part.offset} to {part.offset + part.length}) differs from what was written"
                )
            progress(part.length)

"""The first level: every byte of a target is the one that the manifest says was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from neoxconv.engine.manifest import (
    MANIFEST,
    Range,
    combined,
    hash_range,
    manifest_path,
    part_of,
    read_manifest,
)
from neoxconv.errors import CheckpointError
from neoxconv.storage import Place, at_once, is_file, is_shared, opener_of, place, size_of, stream_of
from neoxconv.verify.report import Finding, Report

_Progress = Callable[[int], None]


def verify_bytes(
    target: Place | str,
    *,
    manifest: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    progress: _Progress = lambda count: None,
) -> Report:
    """Whether the files of `target` are byte for byte those that its manifest describes.

    Raises CheckpointError where the target or its manifest is missing. `manifest` spares reading it here; `jobs` ranges
    are hashed at a time, by default as many as read the target best; `progress` gets counts of bytes read.
    """
    target = place(target)
    if not target.exists():
        raise CheckpointError(f"{target}: does not exist.")
    manifest = manifest or read_manifest(target)
    if manifest is None:
        raise CheckpointError(
            f"{manifest_path(target)}: does not exist, so there is nothing to check the bytes against. "
            "Compare with the source instead: neoxconv verify SOURCE TARGET."
        )
    files = manifest["files"]
    with ThreadPoolExecutor(jobs or at_once(target)) as pool:
        findings = [finding for file in files for finding in _check_file(target, file, pool, progress)]
    if target.is_dir() and not is_shared(target):
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


def _check_file(target: Place, file: dict[str, Any], pool: Executor, progress: _Progress) -> Iterator[Finding]:
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
    opener, parts = opener_of(path), [part_of(entry) for entry in file["ranges"]]

    def hashed(part: Range) -> str:
        with opener() as stream:
            digest = hash_range(stream, part)
        progress(part.length)
        return digest

    for entry, part, digest in zip(file["ranges"], parts, pool.map(hashed, parts), strict=True):
        if digest != entry["sha256"]:
            where = f"bytes {part.offset} to {part.offset + part.length}"
            yield Finding(name, f"{part.name or 'header or padding'} ({where}) differs from what was written")

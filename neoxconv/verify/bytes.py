"""The first level: every byte of a target is the one that the manifest says was written."""

from __future__ import annotations

import hashlib
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from neoxconv.dtypes import Bytes
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

_OF_THE_HUB = re.compile(r"\.gitattributes$|\.cache/huggingface/")  # what the Hub and its downloads put beside files
_Progress = Callable[[int], None]


class Seen:
    """What is read of a target meanwhile, hashed: the digests of its manifest's ranges that were read from end to end.

    A range is hashed as far as it is read in order; what was read before is skipped.
    """

    def __init__(self, target: Place, manifest: Mapping[str, Any]) -> None:
        paths = [str(_path_of(target, file)) for file in manifest["files"]]
        ranges = (_Ranges([part_of(entry) for entry in file["ranges"]]) for file in manifest["files"])
        self.ranges = {path: each for path, each in zip(paths, ranges, strict=True) if paths.count(path) == 1}

    def __call__(self, path: Place, offset: int, data: Bytes) -> None:
        """Take note of a file's bytes."""
        ranges = self.ranges.get(str(path))
        if ranges is None:
            return
        number = bisect_right(ranges.starts, offset) - 1
        while 0 <= number < len(ranges.starts) and ranges.starts[number] < offset + data.size:
            ranges.hashing[number].add(offset, data)
            number += 1

    def digest(self, path: Place, number: int) -> str | None:
        """The SHA-256 of a file's range of that number, if all of it was read."""
        if str(path) not in self.ranges:
            return None
        found = self.ranges[str(path)].hashing[number]
        return found.sha256.hexdigest() if found.next == found.end else None


class _Ranges:
    """The ranges of a file, in the order of their offsets."""

    def __init__(self, parts: Sequence[Range]) -> None:
        self.starts = [part.offset for part in parts]
        self.hashing = [_Hashing(part.offset, part.offset + part.length) for part in parts]


class _Hashing:
    """A range that has been hashed from its begin to `next`."""

    def __init__(self, begin: int, end: int) -> None:
        self.next, self.end, self.sha256, self.lock = begin, end, hashlib.sha256(), threading.Lock()

    def add(self, offset: int, data: Bytes) -> None:
        """Go on with a file's bytes from `offset` on, if they hold the next one."""
        with self.lock:
            if offset <= self.next < offset + data.size:
                new = data[self.next - offset : self.end - offset]
                self.sha256.update(new.data)
                self.next += new.size


def verify_bytes(
    target: Place | str,
    *,
    manifest: Mapping[str, Any] | None = None,
    seen: Seen | None = None,
    jobs: int | None = None,
    progress: _Progress = lambda count: None,
) -> Report:
    """Whether the files of `target` are byte for byte those that its manifest describes.

    Raises CheckpointError where the target or its manifest is missing. `manifest` spares reading it here, and `seen`
    the ranges that were read for something else; `jobs` ranges are hashed at a time, by default as many as read the
    target best; `progress` gets counts of bytes.
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
        findings = [finding for file in files for finding in _check_file(target, file, seen, pool, progress)]
    if target.is_dir() and not is_shared(target):
        known = {file["name"] for file in files} | {MANIFEST}
        present = sorted(inside(path, target) for path in target.rglob("*") if path.is_file())
        findings += [
            Finding(name, "is not in the manifest")
            for name in present
            if name not in known and not _OF_THE_HUB.match(name)
        ]
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


def _path_of(target: Place, file: Mapping[str, Any]) -> Place:
    """Where a file of the manifest lies."""
    return target / file["name"] if target.is_dir() else target


def _check_file(
    target: Place, file: dict[str, Any], seen: Seen | None, pool: Executor, progress: _Progress
) -> Iterator[Finding]:
    """What is wrong with one file."""
    path = _path_of(target, file)
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

    def hashed(number: int) -> str:
        digest = seen.digest(path, number) if seen else None
        if digest is None:
            with opener() as stream:
                digest = hash_range(stream, parts[number])
        progress(parts[number].length)
        return digest

    for entry, part, digest in zip(file["ranges"], parts, pool.map(hashed, range(len(parts))), strict=True):
        if digest != entry["sha256"]:
            where = f"bytes {part.offset} to {part.offset + part.length}"
            yield Finding(name, f"{part.name or 'header or padding'} ({where}) differs from what was written")

"""One step of a plan, wherever it runs: a tensor read, joined, encoded and written band by band, and hashed."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from neoxconv.core.layout import Digest, Slot
from neoxconv.dtypes import Bytes
from neoxconv.engine.checks import DECODED, FINITE, Checks
from neoxconv.engine.encode import pieces
from neoxconv.engine.plan import Step
from neoxconv.errors import NeoxconvError, VerifyError
from neoxconv.quant.wrong import Wrong
from neoxconv.storage import write_all

Progress = Callable[[int], None]
Digests = dict[str, Digest]  # of slots, by their keys


class _Stopped(Exception):
    """Another step failed, or the user wants to stop; this one ends between two slabs."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every step of a run shares: where the files are made, what an earlier run noted, and how much at a time."""

    folder: Path
    known: Digests
    slab: int
    checks: Checks
    progress: Progress = lambda count: None
    source: str = ""  # what messages name
    stop: threading.Event = field(default_factory=threading.Event)


Writing = Generator[None, None, Digests]  # a step under way: a band of rows each time, at last the digests of its slots


def run_step(work: Work, step: Step) -> Digests:
    """One tensor written, or found written already: the digests of its slots."""
    writing = begin_step(work, step)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return cast(Digests, end.value)


def begin_step(work: Work, step: Step) -> Writing:
    """One tensor to be written band by band, or found written already."""
    descriptor = os.open(work.folder / step.file.name, os.O_RDWR | os.O_NOFOLLOW)
    try:
        digests = written(step, descriptor, work) or (yield from write_step(step, descriptor, work))
    finally:
        os.close(descriptor)
    return dict(zip(step.keys, digests, strict=True))


def written(step: Step, descriptor: int, work: Work) -> list[Digest]:
    """What the journal notes of a step, if the bytes on disk are still those; else nothing."""
    known = [work.known[key] for key in step.keys if key in work.known]
    if len(known) < len(step.slots):
        return []
    for slot, digest in zip(step.slots, known, strict=True):
        found = _hashed(step, slot, descriptor, work)
        if (found.sha256, found.crc32) != (digest.sha256, digest.crc32):
            return []
    work.progress(step.nbytes)
    return known


def _hashed(step: Step, slot: Slot, descriptor: int, work: Work) -> Digest:
    """The SHA-256 and the CRC-32 of a slot's bytes as they are on disk."""
    tally, end, size = _Tally(step.file.crcs), slot.offset + slot.part.nbytes, work.slab
    for offset in range(slot.offset, end, size):
        if work.stop.is_set():
            raise _Stopped
        tally.add(np.frombuffer(os.pread(descriptor, min(size, end - offset), offset), np.uint8))
    return tally.digest()


def write_step(step: Step, descriptor: int, work: Work) -> Generator[None, None, list[Digest]]:
    """Write one tensor at its planned places; the digests of their bytes."""
    entry, name = step.entry, step.file.name
    tallies = [_Tally(step.file.crcs) for _ in step.slots]
    bad, overflow, text, wrong = 0, 0, b"", Wrong(entry.tensor)
    for piece in pieces(entry, work.slab, decode=DECODED in work.checks):
        if work.stop.is_set():
            raise _Stopped
        if piece.wrong is not None:
            wrong.add(piece.wrong, piece.start)
        bad, overflow = bad + piece.nonfinite, overflow + piece.overflow
        if entry.parts[piece.number].late:  # it has no place of its own
            text = piece.data.tobytes()
            continue
        tally = tallies[piece.number]
        write_all(descriptor, piece.data, step.slots[piece.number].offset + tally.count)
        tally.add(piece.data)
        work.progress(piece.data.size)
        yield
    if bad and FINITE in work.checks:
        raise NeoxconvError(
            f"{work.source or name}: {entry.unified} has {bad} values that are not finite as {entry.encoding.name}. "
            "Choose a wider type (--dtype or --type), or mend the source; hf, safetensors, slim and gguf can hold them "
            "as they are (--allow-nonfinite)."
        )
    if wrong.count:
        raise VerifyError(
            f"{work.source or name}: {entry.unified}: {wrong.told(entry.encoding.name)}, decoded as soon as they were "
            "encoded. Run the same command again: if the same weights are wrong, that is a fault of neoxconv, please "
            "report it; if others are, have the machine's memory tested."
        )
    for slot, tally in zip(step.slots, tallies, strict=True):
        if tally.count != slot.part.nbytes:
            raise NeoxconvError(f"{name}: {slot.part.name} came to {tally.count} bytes, not {slot.part.nbytes}.")
    _start_writeback(descriptor, step.slots[0])
    first, *others = tallies
    return [first.digest(overflow, text.decode()), *(tally.digest() for tally in others)]


def _start_writeback(descriptor: int, slot: Slot) -> None:
    """Set the disk to work on a finished step: Linux does so with what it is told is not needed any more.

    Else it would begin at the fsync, when all we can do is wait.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, slot.offset, slot.part.nbytes, os.POSIX_FADV_DONTNEED)


class _Tally:
    """Running SHA-256, CRC-32 (only where a zip wants it) and count of a tensor's bytes."""

    def __init__(self, with_crc: bool) -> None:
        self.sha256, self.with_crc, self.crc, self.count = hashlib.sha256(), with_crc, 0, 0

    def add(self, data: Bytes) -> None:
        self.sha256.update(data.data)
        self.crc = zlib.crc32(data.data, self.crc) if self.with_crc else 0
        self.count += data.size

    def digest(self, overflow: int = 0, text: str = "") -> Digest:
        return Digest(self.sha256.hexdigest(), self.crc, overflow, text)

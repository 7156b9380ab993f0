"""Carry a plan out: read, join, encode and write each tensor band by band, with nothing half-made ever visible.

All work happens in TARGET.partial/, whose journal lists the plan's fingerprint and the written slots. Run again, the
journal is only a hint: the bytes are hashed, what matches is kept, the rest is redone. A rename publishes.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from neoxconv.dtypes import Bytes
from neoxconv.encode import pieces
from neoxconv.errors import CheckpointError, NeoxconvError, raise_all
from neoxconv.journal import Journal
from neoxconv.model import Digest, Slot
from neoxconv.plan import Memory, Plan, Step, memory_for, threads_for
from neoxconv.publish import check_space, check_target, explain, finish, publish
from neoxconv.remote import Remote, together
from neoxconv.workplace import locked, made_in, partial_of

Progress = Callable[[int], None]
DEFAULT_MEMORY = 512 << 20


class Stopped(Exception):
    """Another step failed, or the user wants to stop; this one ends between two slabs."""


@dataclass(frozen=True)
class Run:
    """What every step of a run shares."""

    folder: Path
    journal: Journal
    memory: Memory
    stop: threading.Event
    progress: Progress
    allow_nonfinite: bool


def run(
    plan: Plan,
    target: Path | str,
    *,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda count: None,
) -> Path:
    """Make `target` as planned and return its path; after an interruption, continue.

    `progress` is called with counts of bytes written (or found written already). Raises PlanError before anything is
    written, NeoxconvError when the disk or a value stops the run; then `target` does not exist and TARGET.partial
    holds what is done.
    """
    target = Path(target).resolve()
    shares = memory_for(threads_for(plan.checkpoint, jobs), memory, plan.kept)
    check_target(plan, target, overwrite)
    work = partial_of(target)
    try:
        check_space(plan, target)
        with locked(work), Journal(work, resume_key(plan), checked=not allow_nonfinite) as journal:
            made = made_in(work)
            context = Run(made, journal, shares, threading.Event(), progress, allow_nonfinite)
            prepare_files(plan, made)
            with ThreadPoolExecutor(shares.jobs) as pool:
                digests = run_steps(plan, context, pool)
            check_sources(plan)
            finish(plan, made, digests)
            publish(plan, work, target)
    except OSError as error:
        raise NeoxconvError(explain(error, plan, target)) from error
    return target


def resume_key(plan: Plan) -> str:
    """What unfinished work must agree in: the plan, and sources unchanged since; headers say nothing of the weights."""
    states = [file.storage.state for file in plan.checkpoint.index.files]
    return hashlib.sha256(f"{plan.fingerprint} {states}".encode()).hexdigest()


def check_sources(plan: Plan) -> None:
    """Raise CheckpointError where a file far away is not the one that was opened; not every store tells on reading."""
    files = [file.storage for file in plan.checkpoint.index.files if isinstance(file.storage.path, Remote)]
    changed = together(lambda file: file.has_changed(), files, plan.checkpoint.index.folder)
    raise_all(CheckpointError, (
        f"{file.path}: has changed while it was read; convert again from a source that stays."
        for file, differs in zip(files, changed, strict=True) if differs
    ))  # fmt: skip


def prepare_files(plan: Plan, made: Path) -> None:
    """Every file at its full size (sparse), with the pieces that are known; sidecars whole."""
    made.mkdir(exist_ok=True)
    for file in plan.files:
        path = made / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "w+b") as stream:
            stream.truncate(file.size)
            for offset, piece in file.pieces:
                stream.seek(offset)
                stream.write(piece)
    for name, data in plan.sidecars.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)


def run_steps(plan: Plan, context: Run, pool: Executor) -> dict[str, Digest]:
    """The digests of all slots by key; the largest steps start first, so that none is left alone at the end."""
    order = sorted(plan.steps, key=lambda step: -step.nbytes)
    futures: list[Future[dict[str, Digest]]] = [pool.submit(run_step, step, context) for step in order]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [error for future in done if (error := future.exception())]
        if failed:
            raise next((e for e in failed if not isinstance(e, Stopped)), failed[0])
    finally:
        context.stop.set()
        for future in futures:
            future.cancel()
    return {key: digest for future in futures for key, digest in future.result().items()}


def run_step(step: Step, context: Run) -> dict[str, Digest]:
    """One tensor written, or found written already, and noted in the journal: the digests of its slots by key."""
    descriptor = os.open(context.folder / step.file.name, os.O_RDWR)
    try:
        digests = written(step, descriptor, context) or write_step(step, descriptor, context)
    finally:
        os.close(descriptor)
    noted = dict(zip(step.keys, digests, strict=True))
    for key, digest in noted.items():
        context.journal.add(key, digest)
    return noted


def written(step: Step, descriptor: int, context: Run) -> list[Digest]:
    """What the journal notes of a step, if the bytes on disk are still those; else nothing."""
    known = [context.journal.known[key] for key in step.keys if key in context.journal.known]
    if len(known) < len(step.slots):
        return []
    for slot, digest in zip(step.slots, known, strict=True):
        if hashed(slot, descriptor, context) != digest.sha256:
            return []
    context.progress(step.nbytes)
    return known


def hashed(slot: Slot, descriptor: int, context: Run) -> str:
    """The SHA-256 of a slot's bytes as they are on disk."""
    digest, end, size = hashlib.sha256(), slot.offset + slot.part.nbytes, context.memory.slab
    for offset in range(slot.offset, end, size):
        if context.stop.is_set():
            raise Stopped
        digest.update(os.pread(descriptor, min(size, end - offset), offset))
    return digest.hexdigest()


def write_step(step: Step, descriptor: int, context: Run) -> list[Digest]:
    """Write one tensor at its planned places; the digests of their bytes."""
    entry, name = step.entry, step.file.name
    tallies = [Tally(step.file.crcs) for _ in step.slots]
    bad, overflow, text = 0, 0, b""
    for piece in pieces(entry, context.memory.slab):
        if context.stop.is_set():
            raise Stopped
        bad, overflow = bad + piece.nonfinite, overflow + piece.overflow
        if entry.parts[piece.number].late:  # it has no place of its own
            text = piece.data.tobytes()
            continue
        tally = tallies[piece.number]
        write_all(descriptor, piece.data, step.slots[piece.number].offset + tally.count)
        tally.add(piece.data)
        context.progress(piece.data.size)
    if bad and not context.allow_nonfinite:
        raise NeoxconvError(
            f"{name}: {entry.unified} has {bad} values that are not finite as {entry.encoding.name}. "
            "Choose a wider type (--dtype or --type), or write them as they are with --allow-nonfinite."
        )
    for slot, tally in zip(step.slots, tallies, strict=True):
        if tally.count != slot.part.nbytes:
            raise NeoxconvError(f"{name}: {slot.part.name} came to {tally.count} bytes, not {slot.part.nbytes}.")
    start_writeback(descriptor, step.slots[0])
    first, *others = tallies
    return [first.digest(overflow, text.decode()), *(tally.digest() for tally in others)]


def write_all(descriptor: int, data: Bytes, offset: int) -> None:
    """Write all of `data` at `offset`; one pwrite may write less."""
    view = data.data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def start_writeback(descriptor: int, slot: Slot) -> None:
    """Set the disk to work on a finished step: Linux does so with what it is told is not needed any more.

    Else it would begin at the fsync, when all we can do is wait.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, slot.offset, slot.part.nbytes, os.POSIX_FADV_DONTNEED)


class Tally:
    """Running SHA-256, CRC-32 (only where a zip wants it) and count of a tensor's bytes."""

    def __init__(self, with_crc: bool) -> None:
        self.sha256, self.with_crc, self.crc, self.count = hashlib.sha256(), with_crc, 0, 0

    def add(self, data: Bytes) -> None:
        self.sha256.update(data.data)
        self.crc = zlib.crc32(data.data, self.crc) if self.with_crc else 0
        self.count += data.size

    def digest(self, overflow: int = 0, text: str = "") -> Digest:
        return Digest(self.sha256.hexdigest(), self.crc, overflow, text)

"""Carry a plan out: read, join, encode and write each tensor band by band, with nothing half-made ever visible.

All work happens in TARGET.partial/, whose journal lists the plan's fingerprint and the finished steps. Run again, the
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

import numpy as np

from neoxconv.dtypes import F16, F32, Array, Bytes, Floats, nonfinite
from neoxconv.errors import NeoxconvError
from neoxconv.journal import Journal
from neoxconv.manifest import Digest
from neoxconv.model import Entry, Slot
from neoxconv.plan import Memory, Plan, Step, memory_for
from neoxconv.publish import check_space, check_target, explain, finish, partial_of, publish
from neoxconv.quant import floats
from neoxconv.tensor import slabs

Progress = Callable[[int], None]
DEFAULT_MEMORY = 512 << 20
LARGEST_HALF = 65504


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
    shares = memory_for(jobs, memory)
    check_target(plan, target, overwrite)
    work = partial_of(target)
    try:
        check_space(plan, target, work)
        work.mkdir(parents=True, exist_ok=True)
        with Journal(work, resume_key(plan), checked=not allow_nonfinite) as journal:
            context = Run(work, journal, shares, threading.Event(), progress, allow_nonfinite)
            prepare_files(plan, work)
            with ThreadPoolExecutor(shares.jobs) as pool:
                digests = run_steps(plan, context, pool)
            finish(plan, work, digests)
        publish(plan, work, target)
    except OSError as error:
        raise NeoxconvError(explain(error, target)) from error
    return target


def resume_key(plan: Plan) -> str:
    """What unfinished work must agree in: the plan, and sources unchanged since; headers say nothing of the weights."""
    times = [os.stat(file.storage.path).st_mtime_ns for file in plan.checkpoint.index.files]
    return hashlib.sha256(f"{plan.fingerprint} {times}".encode()).hexdigest()


def prepare_files(plan: Plan, work: Path) -> None:
    """Every file at its full size (sparse), with the pieces that are known; sidecars whole."""
    for file in plan.files:
        path = work / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "w+b") as stream:
            stream.truncate(file.size)
            for offset, piece in file.pieces:
                stream.seek(offset)
                stream.write(piece)
    for name, data in plan.sidecars.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)


def run_steps(plan: Plan, context: Run, pool: Executor) -> dict[str, Digest]:
    """The digests of all steps by key; the largest start first, so that no worker is left alone with one at the end."""
    order = sorted(plan.steps, key=lambda step: -step.slot.entry.nbytes)
    futures: dict[Future[Digest], Step] = {pool.submit(run_step, step, context): step for step in order}
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [error for future in done if (error := future.exception())]
        if failed:
            raise next((e for e in failed if not isinstance(e, Stopped)), failed[0])
    finally:
        context.stop.set()
        for future in futures:
            future.cancel()
    return {step.key: future.result() for future, step in futures.items()}


def run_step(step: Step, context: Run) -> Digest:
    """One tensor written, or found written already, and noted in the journal."""
    path = context.folder / step.file.name
    known = context.journal.known.get(step.key)
    descriptor = os.open(path, os.O_RDWR)
    try:
        if known and known == written_digest(step, descriptor, context):
            context.progress(step.slot.entry.nbytes)
            digest = known
        else:
            digest = write_step(step, descriptor, context)
    finally:
        os.close(descriptor)
    context.journal.add(step.key, digest)
    return digest


def written_digest(step: Step, descriptor: int, context: Run) -> Digest:
    """The digest of a step's bytes as they are on disk."""
    tally, end, size = Tally(bool(step.file.late)), step.slot.offset + step.slot.entry.nbytes, context.memory.slab
    for offset in range(step.slot.offset, end, size):
        if context.stop.is_set():
            raise Stopped
        tally.add(np.frombuffer(os.pread(descriptor, min(size, end - offset), offset), np.uint8))
    return tally.digest


def write_step(step: Step, descriptor: int, context: Run) -> Digest:
    """Write one tensor at its planned place, slab by slab; return the digest of its bytes."""
    entry, tally, bad = step.slot.entry, Tally(bool(step.file.late)), 0
    for start, stop in slabs(entry.tensor, context.memory.slab):
        if context.stop.is_set():
            raise Stopped
        rows = entry.tensor.read(start, stop)
        values = None if entry.copied else floats(rows, entry.tensor.dtype)
        data = rows if values is None else entry.encode(values)
        bad += 0 if context.allow_nonfinite else count_bad(entry, rows, values, data)
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        write_all(descriptor, flat, step.slot.offset + tally.count)
        tally.add(flat)
        context.progress(flat.size)
    if bad:
        raise NeoxconvError(
            f"{step.file.name}: {entry.unified} has {bad} values that are not finite as {entry.encoding.name}. "
            "Choose a wider type (--dtype bf16 or f32), or write them as they are with --allow-nonfinite."
        )
    if tally.count != entry.nbytes:
        raise NeoxconvError(f"{step.file.name}: {entry.unified} came to {tally.count} bytes, not {entry.nbytes}.")
    start_writeback(descriptor, step.slot)
    return tally.digest


def count_bad(entry: Entry, rows: Array, values: Floats | None, data: Array) -> int:
    """How many values are infinite or not a number: as they are stored, or for blocks before and after.

    `values` are the rows in float32 where they were needed to encode them. What float16 holds cannot overflow the
    float16 of a block's step; of wider types a large weight can.
    """
    if entry.encoding.dtype.block == 1:
        return nonfinite(data, entry.encoding.dtype)
    bad = nonfinite(rows, entry.tensor.dtype)
    if bad or entry.tensor.dtype is F16:
        return bad
    if values is not None and np.abs(values).max(initial=0) <= LARGEST_HALF:
        return 0
    return nonfinite(entry.encoding.decode(data), F32)


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
        os.posix_fadvise(descriptor, slot.offset, slot.entry.nbytes, os.POSIX_FADV_DONTNEED)


class Tally:
    """Running SHA-256, CRC-32 (only where a zip wants it) and count of a tensor's bytes."""

    def __init__(self, with_crc: bool) -> None:
        self.sha256, self.with_crc, self.crc, self.count = hashlib.sha256(), with_crc, 0, 0

    def add(self, data: Bytes) -> None:
        self.sha256.update(data.data)
        self.crc = zlib.crc32(data.data, self.crc) if self.with_crc else 0
        self.count += data.size

    @property
    def digest(self) -> Digest:
        return Digest(self.sha256.hexdigest(), self.crc)

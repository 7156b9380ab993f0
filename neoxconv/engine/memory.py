"""What a run may take of memory: slabs and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError
from neoxconv.storage.remote import THREADS, Remote
from neoxconv.words import size

MIB = 1 << 20
BASE = 200 * MIB  # what Python, numpy, the kernels and a tokenizer take before the first weight (measured: 170)
COPIES = 6  # of a slab that one worker may hold at once: stored rows, float32, parts being joined, encoded bytes
SLAB = 2 * MIB  # larger ones leave the caches, and malloc gives their pages back each time: half the speed
SMALLEST_SLAB = MIB


@dataclass(frozen=True)
class Memory:
    """How a run keeps within its memory: workers, and bytes of float32 that each handles at a time."""

    jobs: int
    slab: int
    kept: int  # bytes that a worker holds until a tensor is done

    @property
    def peak(self) -> int:
        """Bytes expected at most."""
        return BASE + self.jobs * (COPIES * self.slab + self.kept)


def threads_for(checkpoint: Checkpoint, jobs: int | None) -> int:
    """How many threads read a checkpoint: as many as wanted, else the processors, 8 at most.

    Of a remote source more, which mostly wait for the network: while one encodes a band, others' are on their way.
    """
    return jobs or (THREADS if isinstance(checkpoint.index.folder, Remote) else min(os.cpu_count() or 1, 8))


def memory_for(jobs: int | None, memory: int, kept: int = 0) -> Memory:
    """As many jobs as wanted (default: processors, 8 at most) and slabs of 2 MiB at most, within `memory` bytes.

    Jobs fall before a slab gets under 1 MiB. Raises PlanError where not even one fits.
    """
    wanted = jobs or min(os.cpu_count() or 1, 8)
    least = COPIES * SMALLEST_SLAB + kept
    if memory - BASE < least:
        needed = -(-(BASE + least) // MIB)
        raise PlanError(f"--memory {size(memory)} is too little; at least {needed} MiB are needed.")
    workers = min(wanted, (memory - BASE) // least)
    return Memory(workers, min(SLAB, ((memory - BASE) // workers - kept) // COPIES), kept)

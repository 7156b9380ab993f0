"""What a run may take of memory: slabs and threads."""

from __future__ import annotations

from dataclasses import dataclass

from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError
from neoxconv.storage import at_once
from neoxconv.words import size

_MIB = 1 << 20
_BASE = 200 * _MIB  # what Python, numpy, the kernels and a tokenizer take before the first weight (measured: 170)
_COPIES = 6  # of a slab that one worker may hold at once: stored rows, float32, parts being joined, encoded bytes
_WAITING = 3  # of a slab that is held by each further target of several while it is not its turn
KEPT = 4  # slabs for each worker of what was read last far away, for the other targets
SLAB = 2 * _MIB  # larger ones leave the caches, and malloc gives their pages back each time: half the speed
_SMALLEST_SLAB = _MIB
DEFAULT_MEMORY = 512 * _MIB


@dataclass(frozen=True)
class Budget:
    """How a run keeps within its memory: workers, and bytes of float32 that each handles at a time."""

    jobs: int
    slab: int
    kept: int  # bytes that a worker holds until a tensor is done
    copies: int = _COPIES  # of a slab that a worker may hold at once

    @property
    def peak(self) -> int:
        """Bytes expected at most."""
        return _BASE + self.jobs * (self.copies * self.slab + self.kept)


def threads_for(checkpoint: Checkpoint, jobs: int | None) -> int:
    """How many threads read a checkpoint: as many as wanted, else as many as read it best where it is."""
    return jobs or at_once(checkpoint.index.folder)


def check_memory(memory: int, kept: int = 0, abreast: int = 1) -> None:
    """Raise PlanError where not even one worker keeps within `memory` bytes."""
    least = _copies(abreast) * _SMALLEST_SLAB + kept
    if memory - _BASE < least:
        needed = -(-(_BASE + least) // _MIB)
        raise PlanError(f"--memory {size(memory)} is too little; at least {needed} MiB are needed.")


def budget_for(jobs: int, memory: int, kept: int = 0, abreast: int = 1) -> Budget:
    """As many jobs as wanted and slabs of 2 MiB at most, within `memory` bytes; each worker has `kept` besides slabs.

    A worker takes steps of `abreast` targets in turn. Jobs fall before a slab gets under 1 MiB. Raises PlanError where
    not even one fits.
    """
    check_memory(memory, kept, abreast)
    copies, free = _copies(abreast), memory - _BASE
    workers = min(jobs, free // (copies * _SMALLEST_SLAB + kept))
    return Budget(workers, min(SLAB, (free // workers - kept) // copies), kept, copies)


def _copies(abreast: int) -> int:
    """How many slabs a worker may hold at once."""
    return _COPIES + (KEPT + _WAITING * (abreast - 1) if abreast > 1 else 0)

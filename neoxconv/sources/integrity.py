"""Every byte of a source read once, and compared with the checksums that its own format holds.

A torch zip has a CRC-32 for each record, which torch writes and never checks. The other formats have none: their
headers were held against the files' sizes when they were opened, and reading them finds what the disk cannot give.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from neoxconv.core.model import Checkpoint, Index
from neoxconv.core.tensor import LazyTensor, slabs
from neoxconv.errors import CheckpointError
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox import zero
from neoxconv.formats.pt.records import ZipRecord, contradicted, records_of, tensors_on
from neoxconv.sources import SOURCES
from neoxconv.sources.naming import spellings_of, unified_name
from neoxconv.storage import Place, Storage, open_storage
from neoxconv.words import plural

_Progress = Callable[[int], None]
SLAB = 4 << 20  # bytes in memory at once, for each thread
_BAND = 64 << 20  # bytes of a file without checksums that are one thread's work
_SHOWN = 3  # tensors of a damaged record
_AGAIN = "download the file again"


@dataclass(frozen=True)
class _Stretch:
    """What one thread reads: a record of a zip, or a band of a file without checksums."""

    file: Storage
    offset: int
    size: int
    record: ZipRecord | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.record.name if self.record else f"bytes {self.offset} to {self.offset + self.size}"

    @property
    def order(self) -> tuple[str, int]:
        """What stretches are listed by."""
        return str(self.file.path), self.offset


@dataclass(frozen=True)
class _Damage:
    """What is wrong with a stretch of a file: the tensors on it, and the CRC-32s where they are what differs."""

    file: Place
    record: str
    what: str
    tensors: tuple[str, ...] = ()
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        more = [f"{len(self.tensors) - _SHOWN} more"] if len(self.tensors) > _SHOWN else []
        names = ", ".join([*self.tensors[:_SHOWN], *more])
        record = f"{self.record} with {names}" if names else self.record
        return f"{self.file}: {record}: {self.what}"

    @property
    def facts(self) -> dict[str, Any]:
        """The damage as plain values."""
        return {
            "file": str(self.file),
            "record": self.record,
            "tensors": list(self.tensors),
            "expected": self.expected,
            "found": self.found,
            "message": str(self),
        }


@dataclass(frozen=True)
class Found:
    """What reading a stretch gave: the bytes that could be read, whether its zip lacks a checksum of it, any damage."""

    stretch: _Stretch
    nbytes: int
    bare: bool = False
    damage: _Damage | None = None


@dataclass(frozen=True)
class Integrity:
    """What was read of a source, how much of it no checksum protects, and what is damaged."""

    files: int
    records: int
    nbytes: int
    bare_files: int  # of a format without checksums
    bare_records: int  # of zips whose writer computed none
    damage: tuple[_Damage, ...]
    masters: int = 0  # tensors compared with the fp32 masters that stand in for them

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "files": self.files,
            "records": self.records,
            "bytes": self.nbytes,
            "files_without_checksums": self.bare_files,
            "records_without_checksum": self.bare_records,
            "verdict": self.verdict,
            "findings": [damage.facts for damage in self.damage],
        }

    @property
    def verdict(self) -> str:
        """What came of it, in a few words."""
        counts = plural(self.bare_files, "file"), plural(self.bare_records, "record")
        bare = " and ".join(text for text in counts if not text.startswith("0 "))
        masters = f"; {plural(self.masters, 'tensor')} equal to the masters rounded" if self.masters else ""
        if self.damage:
            return f"{plural(len(self.damage), 'finding')}: the source is damaged"
        if self.files == self.bare_files:
            return "no checksums in this format; every byte can be read, and the headers fit the files' sizes"
        return (f"every checksum fits; {bare} without one" if bare else "every checksum fits") + masters


def work(checkpoint: Checkpoint) -> int:
    """The bytes that `check` reads."""
    files = sum(file.storage.size for file in checkpoint.index.files)
    return files + sum(pair.master.nbytes for pair in pairs(checkpoint.index))


def check(checkpoint: Checkpoint, *, jobs: int = 2, progress: _Progress = lambda count: None) -> Integrity:
    """Read every file that a checkpoint's index names, and compare each record with its CRC-32; and every master, if it
    has any, with what is stored.

    `progress` gets counts of bytes, in all those that `work` tells.
    """
    files = [file.storage for file in checkpoint.index.files]
    listed = {file.path: stretches_of(file, checkpoint.index.single) for file in files}
    stretches = sorted((stretch for some in listed.values() for stretch in some), key=lambda stretch: -stretch.size)
    progress(sum(file.size for file in files) - sum(stretch.size for stretch in stretches))
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda stretch: read_stretch(stretch, progress), stretches))
        held = list(pool.map(lambda pair: compared(checkpoint, pair, progress), pairs(checkpoint.index)))
    damage = [item.damage for item in sorted(found, key=lambda item: item.stretch.order) if item.damage]
    return Integrity(
        files=len(files),
        records=sum(stretch.record is not None for stretch in stretches),
        nbytes=sum(item.nbytes for item in found),
        bare_files=sum(all(stretch.record is None for stretch in some) for some in listed.values()),
        bare_records=sum(item.bare for item in found),
        damage=(*_with_tensors(checkpoint, damage), *filter(None, held)),
        masters=len(held),
    )


@dataclass(frozen=True)
class _Pair:
    """A parameter of a rank, `N.name`: its fp32 master, and what is stored of it."""

    rank: int
    name: str
    master: LazyTensor
    stored: LazyTensor


def pairs(index: Index) -> list[_Pair]:
    """Every parameter that a master stands in for."""
    ranks = zip(index.ranks, index.replaced, strict=True) if index.replaced else ()
    return [
        _Pair(rank, name, masters[name], tensor)
        for rank, (masters, stored) in enumerate(ranks)
        for name, tensor in stored.items()
        if masters[name] is not tensor
    ]


def compared(checkpoint: Checkpoint, pair: _Pair, progress: _Progress) -> _Damage | None:
    """What is wrong with a parameter whose master, rounded, is not what is stored; slab by slab."""
    path = neox.home(checkpoint.index, pair.rank, pair.name)
    name = _spelled_name(checkpoint, pair.name, pair.rank)
    try:
        found = zero.difference(pair.master, pair.stored, slabs(pair.master, SLAB))
    except CheckpointError as error:
        return _Damage(path, pair.name, f"cannot be compared with its master: {error}", (name,))
    finally:
        progress(pair.master.nbytes)
    if not found.count:
        return None
    count = pair.stored.rows * pair.stored.columns
    row = found.first // pair.stored.columns
    what = (
        f"{found.count} of {count} numbers are not their masters as {pair.stored.dtype.name}, the first in row {row}, "
        f"off by {found.largest:.3g} at most; files of different steps, or damaged: download them again."
    )
    return _Damage(path, pair.name, what, (name,))


def stretches_of(file: Storage, single: bool) -> list[_Stretch]:
    """What a file is read in: the records of a torch zip, else bands. No format of `single` files is one."""
    if not single and file.path.suffix != ".safetensors" and file.text(0, min(2, file.size)) == b"PK":
        return [_Stretch(file, record.offset, record.size, record) for record in records_of(file)]
    return [_Stretch(file, start, min(_BAND, file.size - start)) for start in range(0, file.size, _BAND)]


def read_stretch(stretch: _Stretch, progress: _Progress) -> Found:
    """Read a stretch, slab by slab, and compare its CRC-32 if it has one."""
    crc, done, end = 0, 0, stretch.offset + stretch.size
    try:
        for start in range(stretch.offset, end, SLAB):
            size = min(SLAB, end - start)
            data = stretch.file.read(start, size, end - start - size)
            crc = zlib.crc32(data.data, crc) if stretch.record else 0
            done += len(data)
            progress(len(data))
        return Found(stretch, done, bare(stretch, crc), _judged(stretch, crc))
    except CheckpointError as error:
        progress(stretch.size - done)
        what = str(error).removeprefix(f"{stretch.file.path}: ")
        return Found(
            stretch,
            done,
            damage=_Damage(stretch.file.path, stretch.name, f"from byte {stretch.offset + done} on {what}"),
        )


def bare(stretch: _Stretch, crc32: int) -> bool:
    """Whether the zip holds no CRC-32 of a record."""
    return stretch.record is not None and stretch.record.crc32 == 0 and crc32 != 0


def _judged(stretch: _Stretch, crc32: int) -> _Damage | None:
    """What is wrong with a stretch that could be read; its bytes have the CRC-32."""
    record, path = stretch.record, stretch.file.path
    if record is None:
        return None
    if record.crc32 not in (0, crc32):
        found, expected = f"{crc32:08x}", f"{record.crc32:08x}"
        what = f"its {record.size} bytes have CRC-32 {found}, the zip's directory says {expected}; {_AGAIN}."
        return _Damage(path, record.name, what, (), expected, found)
    if contradicted(stretch.file, record):
        return _Damage(path, record.name, f"its header in the file says otherwise than the zip's directory; {_AGAIN}.")
    return None


def _with_tensors(checkpoint: Checkpoint, damage: Iterable[_Damage]) -> Iterator[_Damage]:
    """The damage with the names of the tensors that lie there."""
    known: dict[Place, dict[str, list[str]]] = {}
    for item in damage:
        if item.file not in known:
            known[item.file] = _tensors_of(checkpoint, item.file)
        yield replace(item, tensors=tuple(known[item.file].get(item.record, ())))


def _tensors_of(checkpoint: Checkpoint, path: Place) -> dict[str, list[str]]:
    """The tensors on each record of a zip as the model and the source name them; none where that cannot be read."""
    try:
        file = open_storage(path)
        on = tensors_on(file) if stretches_of(file, checkpoint.index.single)[0].record else {}
    except CheckpointError:
        return {}
    return {record: [_spelled(checkpoint, path, name) for name in names] for record, names in on.items()}


def _spelled(checkpoint: Checkpoint, path: Place, inside: str) -> str:
    """The unified name of what a file holds under the name `inside`, and the source's where it is another."""
    if SOURCES[checkpoint.index.format].naming != "neox":
        return inside
    name, rank = neox.source_name(path.name, inside)
    if rank is None:
        return name
    return _spelled_name(checkpoint, name, rank)


def _spelled_name(checkpoint: Checkpoint, name: str, rank: int) -> str:
    """The unified name of a rank's `N.name`, with that."""
    unified = unified_name(name, spellings_of(checkpoint.index, checkpoint.architecture))
    source = f"{name} of rank {rank}"
    return f"{unified} ({source})" if unified else source

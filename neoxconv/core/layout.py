"""What a target will hold: entries with their encodings, their offsets in files, and every other byte of these.

    FileLayout   | piece: known bytes | slot: a part of an entry | slot | late: made of the slots' digests | zeros | ...

An Entry is a tensor under the target's name. Its encoding stores it as one Part or several, each of which has a Slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from neoxconv.core.encoding import Context, Encoding, Grid, Part, Scaled
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Array, Floats

FEEDBACK_ROWS = 256  # of a matrix at a time where codes are chosen together: the more, the more use of what is fetched
FACTORS = 8  # bytes for each number of second moments: as they are, and their factor
_FEEDBACK = 48  # bytes for each of the weights whose codes are being chosen (measured: docs/calibration.md)
_WHOLE = 36  # the same where rows are chosen together too


@dataclass(frozen=True)
class Entry:
    """A tensor on its way into a target: the target's name for it, where it comes from and how it is stored."""

    name: str
    unified: str
    tensor: LazyTensor
    encoding: Encoding | Scaled
    context: Context | None = None  # only where the encoding can make use of it

    @property
    def search(self) -> Callable[[Floats, Context], Array] | None:
        """The encoder that makes use of a context, if there is one."""
        return self.encoding.search if isinstance(self.encoding, Encoding) else None

    @property
    def grid(self) -> Grid | None:
        """The codes that may be chosen together, if there are such."""
        return self.encoding.grid if isinstance(self.encoding, Encoding) else None

    @property
    def copied(self) -> bool:
        """Whether the target stores the tensor as the source does, so that its bytes pass as they are."""
        return isinstance(self.encoding, Encoding) and self.tensor.dtype.name == self.encoding.dtype.name

    @property
    def facts(self) -> list[str]:
        """What decides its bytes besides the weights."""
        return [self.name, self.encoding.name, *([self.context.digest] if self.context else [])]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that the target holds of it: one, or codes and what belongs to them, each under its full name."""
        if isinstance(self.encoding, Encoding):
            return (Part(self.name, self.encoding.dtype, self.tensor.shape),)
        module = self.name.removesuffix("weight")
        return tuple(replace(part, name=module + part.name) for part in self.encoding.parts(self.tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, late ones at their longest."""
        return sum(part.nbytes for part in self.parts)

    @property
    def kept(self) -> int:
        """Bytes that are held until the last row is encoded: sizes, factors of moments, and what is made of them."""
        sizes = self.encoding.no_sizes(self.tensor).nbytes if isinstance(self.encoding, Scaled) else 0
        if self.context is None or self.context.moments is None:
            return 0 if isinstance(self.encoding, Scaled) and self.encoding.rowwise else 2 * sizes
        rows, columns = self.tensor.rows, self.tensor.columns
        if self.context.outputs:
            return FACTORS * (columns**2 + rows**2) + _WHOLE * columns * rows
        feedback = FACTORS * columns**2 + _FEEDBACK * columns * min(FEEDBACK_ROWS, rows)
        return feedback + 3 * sizes  # their scales are kept as they are read back, too

    @property
    def shares(self) -> str:
        """What it has in common with other entries, whose steps then follow each other; else its name."""
        return self.context.moments.digest if self.context and self.context.moments else self.name


def in_groups(entries: Iterable[Entry], size: int) -> list[list[Entry]]:
    """The entries in order, in groups of at most `size` bytes; a larger one has a group to itself.

    At least one group, which is empty where there are no entries.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = entry.nbytes
        if groups[-1] and filled + nbytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += nbytes
    return groups


@dataclass(frozen=True)
class Slot:
    """Where the bytes of one of an entry's parts begin in its file."""

    entry: Entry
    offset: int
    number: int = 0

    @property
    def part(self) -> Part:
        return self.entry.parts[self.number]


@dataclass(frozen=True)
class Digest:
    """What is kept of written bytes: their SHA-256, and their CRC-32 where the layout wants it, else 0.

    Of an entry's first slot also how many of its weights were beyond its encoding's limit, and its late part.
    """

    sha256: str
    crc32: int = 0
    overflow: int = 0
    text: str = ""


@dataclass(frozen=True)
class Late:
    """A small range that needs what is known of the file's written slots, given in their order."""

    offset: int
    size: int
    make: Callable[[Sequence[Digest]], bytes]


@dataclass(frozen=True)
class FileLayout:
    """A file with every byte accounted for: constant pieces, slots, late ranges; the rest is zero."""

    name: str
    size: int
    pieces: tuple[tuple[int, bytes], ...]
    slots: tuple[Slot, ...]
    late: tuple[Late, ...] = ()
    crcs: bool = False  # whether late ranges want the slots' CRC-32s


@dataclass(frozen=True)
class Content:
    """What a target will hold: files of weights, small files as they are, and what is worth telling.

    `tokenizer` says which one was chosen: its `file`, its `tokens` and the model's `rows`; empty where there is none.
    """

    files: tuple[FileLayout, ...]
    sidecars: dict[str, bytes]
    notes: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""  # what the type of its matrices is called
    name: str = ""  # what a file or a folder of it is called where nobody says: NAME-SIZE-TYPE
    card: bytes = b""  # what its README.md says

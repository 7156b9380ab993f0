"""What an encoding is: how rows of float32 become stored bytes, with what promise, and which tensors hold them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import F32, Array, Bools, Bytes, DType, Floats

EXACT = 1e-5  # what float32 arithmetic in another order may cost, as a part of a number


@dataclass(frozen=True)
class Part:
    """A tensor as a file stores it: its name, number type and shape.

    A `late` part is text of which only the longest size is known before its tensor is written.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    late: bool = False

    @property
    def nbytes(self) -> int:
        return self.dtype.size(math.prod(self.shape))


@dataclass(frozen=True)
class Aim:
    """Rows [rows, columns] float32 to be rounded to an encoding in place of a matrix's own.

    They make up for what the same encodings got wrong before them; for others they are of no use.
    """

    rows: LazyTensor
    encoding: str


@dataclass(frozen=True)
class Moments:
    """The second moments E[x x^T] of what a matrix is multiplied with, which are read when they are needed.

    `read` gives [columns, columns] float32, symmetric; `digest` is the SHA-256 of their bytes. Those of gradients at
    what it puts out are [rows, rows]; x is then the gradient, and its columns are the matrix's rows. `aim`: where
    layers were calibrated one through the other.
    """

    columns: int
    digest: str
    read: Callable[[], Floats]
    aim: Aim | None = None


@dataclass(frozen=True)
class Gradients:
    """How much predictions depend on what a matrix puts out, g the gradient of -log p at it, x its input.

    `rows` [rows] float32: E[g_r^2]; `columns` [columns] float32: E[|g|^2 x_c^2] / E[|g|^2]. Errors E that know nothing
    of each other cost 1/2 sum rows_r columns_c E_rc^2 nats.
    """

    rows: Floats
    columns: Floats


@dataclass(frozen=True)
class Context:
    """What an encoder may use besides the rows; nothing of it is needed to decode.

    `importance` [columns] float32: how much an error in each column matters, of any scale; `thorough`: take more time
    for less error; `moments`: codes are chosen together, so that their errors make up for each other; `outputs`: those
    of rows too, by the second moments of gradients at them.
    """

    importance: Floats | None = None
    thorough: bool = False
    moments: Moments | None = None
    outputs: Moments | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        columns = b"" if self.importance is None else self.importance.tobytes()
        moments = b"".join(each.digest.encode() for each in (self.moments, self.outputs) if each)
        return hashlib.sha256(columns + bytes([self.thorough]) + moments).hexdigest()


@dataclass(frozen=True)
class Grid:
    """The codes of a type of blocks, as feedback chooses them.

    A code stands for table[code] * scale - least. `find(rows, importance)` gives for rows [n, group], whose columns
    have that importance, the numbers [n, group / block, 4] of which scale and least are made: an integer of each, then
    the step of each, float32. `pack(codes, numbers)` makes stored rows of codes [n, columns] and all their numbers;
    `unpack(stored)` gives codes, scales and least weights [n, blocks] of stored rows.
    """

    block: int  # weights that share a scale
    group: int  # columns whose scales are found together
    table: Floats  # [codes] ascending
    find: Callable[[Floats, Floats], Floats]
    pack: Callable[[Array, Floats], Array]
    unpack: Callable[[Array], tuple[Bytes, Floats, Floats]]


@dataclass(frozen=True)
class Comparison:
    """Weights [n, columns] beside what is stored of them.

    `wrong`: which of them no correct encoder could have stored as they are; `read` gives what is read of them, float32,
    for whoever wants to know how far away it is.
    """

    wrong: Bools
    read: Callable[[], Floats]


class _Compare(Protocol):
    """Compare weights [n, columns] with what is stored of them.

    `weighted`: the encoder may have known an importance of the columns, and sacrificed others to them.
    """

    def __call__(self, rows: Floats, stored: Array, weighted: bool = False) -> Comparison: ...


class Groups(Protocol):
    """Which weights of a tensor share a scale.

    The group of each weight of a tensor of 4 rows and 6 columns:

        blocks of 8        rows               the tensor
        0 0 0 0 0 0        0 0 0 0 0 0        0 0 0 0 0 0
        0 0 1 1 1 1        1 1 1 1 1 1        0 0 0 0 0 0
        1 1 1 1 2 2        2 2 2 2 2 2        0 0 0 0 0 0
        2 2 2 2 2 2        3 3 3 3 3 3        0 0 0 0 0 0

    A tensor is encoded band after band of its rows. A band must hold whole groups: here all 4 rows for the blocks, any
    number of rows for the others. Only the tensor as one group is larger than a band.
    """

    @property
    def whole(self) -> bool:
        """The tensor is one group."""

    def rows_per_whole_group(self, columns: int) -> int:
        """The least number of rows of so many columns that are whole groups, but for a tensor's end."""

    def apart(self, rows: Floats) -> Floats:
        """The weights [groups, width] float32 of each group in rows [n, columns]; zeros fill up a last, shorter one."""

    def groups_of(self, start: int, stop: int, columns: int) -> slice:
        """Which groups rows `start` to `stop`, of so many columns, touch."""

    def per_weight(self, values: Floats, shape: tuple[int, ...]) -> Floats:
        """The value of its group for every weight: [groups] -> `shape`, of rows that begin with a group."""

    def width(self, shape: tuple[int, ...]) -> int:
        """How many weights, in their order, are a group of rows of such a shape."""


@dataclass(frozen=True)
class Bound:
    """How far a weight is rounded at most: a `share` of what `of` names."""

    share: float
    of: str
    least: str = ""  # what small weights may be rounded by, where that is more

    def __str__(self) -> str:
        most = f"{self.share:.3g} of the {self.of}"
        return f"{most}, or {self.least}" if self.least else most


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows of float32 become stored bytes, and back.

    `encode` takes [n, columns] float32 and gives [n, ...] of `dtype.numpy` (for block types [n, row bytes] of uint8);
    `decode` is the way back; `compare` is too, with a verdict on each weight. `search` is an encoder that makes use of
    a context; None where there is nothing to choose. `grid` is what codes can be chosen from together. Weights of a
    magnitude beyond `limit` are cut to the largest that the type holds. `slips`: the share of weights that are wrong by
    `compare` in files of other programs, whose encoders do not always end at the nearest code.
    """

    name: str
    dtype: DType
    encode: Callable[[Floats], Array]
    decode: Callable[[Array], Floats]
    compare: _Compare
    search: Callable[[Floats, Context], Array] | None = None
    grid: Grid | None = None
    limit: float = math.inf
    bound: Bound | None = None
    slips: float = 0.0

    @property
    def bits(self) -> float:
        """Bits for each weight."""
        return 8 * self.dtype.nbytes / self.dtype.block

    def wrong(self, rows: Floats, stored: Array, weighted: bool = False) -> Bools:
        """Which weights [n, columns] no correct encoder could have stored as they are."""
        return self.compare(rows, stored, weighted).wrong


def copied(dtype: DType) -> Encoding:
    """An encoding for bytes that are only copied."""
    return Encoding(
        name=dtype.name,
        dtype=dtype,
        encode=lambda rows: rows,
        decode=lambda rows: rows.astype(np.float32),
        compare=lambda rows, stored, weighted=False: Comparison(rows != stored, lambda: stored.astype(np.float32)),
    )


@dataclass(frozen=True)
class Scales:
    """What a value of 1 stands for in each group [groups] float32: when it is `encoded`, and when it is read back
    (`decoded`), by how much the latter may be off in a file of another program (`slack`). `native` is the type in which
    weights may have been divided by them.

    Where groups have a least weight besides, the first two are [groups, 2], and a value stands for value * scale -
    least, as in a `Grid`. `near`: what the encoder's arithmetic may cost, as a part of a share.
    """

    encoded: Floats
    decoded: Floats
    slack: Floats
    native: DType = F32
    near: float = EXACT

    def of(self, groups: slice) -> Scales:
        """Those of some of the groups."""
        return replace(self, encoded=self.encoded[groups], decoded=self.decoded[groups], slack=self.slack[groups])


def scale_and_least(numbers: Floats) -> tuple[Floats, Floats]:
    """Scales and least weights, each [groups], of numbers [groups, 2], or of scales [groups], whose least are zeros."""
    return (numbers, np.zeros_like(numbers)) if numbers.ndim == 1 else (numbers[:, 0], numbers[:, 1])


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """An encoding whose scales lie in tensors of their own, beside that of the codes.

    A group's size is what its weights tell: their largest magnitude, or several `numbers`, such as the least and the
    largest weight. `measure` finds it: weights [groups, width] -> [groups], or [groups, numbers] where there are more;
    where all of a tensor is one group, its size is the largest of its bands'. Columns of matrices must be a multiple of
    `multiple`.

    `parts` are the stored tensors, codes first, named as they follow the module's name. `encode` makes codes of rows
    [n, columns] that are whole groups, of their sizes, and of the type that the model is in; `finish` makes the bytes
    of the other parts when all sizes are known, or of some rows where each part has the tensor's rows (`rowwise`);
    `decode` makes a reader of float32 rows from the parts by name, and the shape. Where all of a tensor is one group it
    is read once for its size and once more for its codes. `rounded` is the type that its weights, of the source's type,
    are rounded to before.

    `scales` are made of sizes, of all of a tensor's where they are `nested`, and of the model's type. `check` says of
    weights, what is read of them, and the scales of their groups, each of so many weights, which cannot be right.

    For codes that are chosen together: `table` [codes] float32, ascending, has all that codes stand for, as shares of
    what 1 stands for in their group. `pack` makes of places in the table, uint8 [n, columns], what `encode` makes of
    rows. `suited` gives the sizes of groups for rows and how much errors in each column [columns] matter; None: those
    that `measure` finds.
    """

    name: str
    dtype: DType  # of what `decode` reads
    groups: Groups
    measure: Callable[[Floats], Floats]
    parts: Callable[[LazyTensor], tuple[Part, ...]]
    encode: Callable[[Floats, Floats, DType], Array]
    finish: Callable[[LazyTensor, Floats], tuple[bytes, ...]]
    decode: Callable[[Mapping[str, LazyTensor], tuple[int, ...]], Read]
    scales: Callable[[Floats, DType], Scales]
    check: Callable[[Floats, Floats, Scales, int], Bools]
    table: Floats
    pack: Callable[[Bytes], Array]
    bound: Bound
    suited: Callable[[Floats, Floats], Floats] | None = None
    rounded: Callable[[DType], DType] | None = None
    nested: bool = False
    rowwise: bool = False
    numbers: int = 1
    multiple: int = 1

    def sizes(self, rows: Floats, matters: Floats | None = None) -> Floats:
        """The sizes of the groups in rows [n, columns], where it is told by how much errors in each column matter."""
        if self.suited is None or matters is None:
            return self.measure(self.groups.apart(rows))
        return self.suited(rows, matters)

    def no_sizes(self, tensor: LazyTensor) -> Floats:
        """A place for the size of every group of a tensor, filled with zeros."""
        count = int(self.groups.groups_of(0, tensor.rows, tensor.columns).stop)
        return np.zeros(count if self.numbers == 1 else (count, self.numbers), np.float32)

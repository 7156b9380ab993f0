"""The nouns that every part of neoxconv shares: what a model is, what a source holds, what a target will hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Array, DType, Floats
from neoxconv.remote import Place
from neoxconv.storage import Storage
from neoxconv.tensor import LazyTensor, Read


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters that change the function, in one spelling."""

    layers: int
    hidden: int
    heads: int
    ff: int
    rows: int  # of the embedding: the vocabulary with its padding
    context: int
    rotary_pct: float  # part of each head that is rotated
    rotary_base: float
    norm_eps: float
    parallel_residual: bool  # attention and MLP read the same stream (gpt_j_residual)
    activation: str  # "gelu" (erf) or "gelu_tanh"
    tied: bool  # the head is the embedding

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def sizes(self) -> dict[str, int]:
        """What the words in a weight's `shape` stand for."""
        return {"rows": self.rows, "hidden": self.hidden, "qkv": 3 * self.hidden, "ff": self.ff}

    @property
    def rotary_dims(self) -> int:
        """Numbers of each head that are rotated, as every implementation rounds them: down."""
        return int(self.head_size * self.rotary_pct)


Ranks = Sequence[LazyTensor]


@dataclass(frozen=True)
class Join:
    """How the tensor-parallel ranks' parts become one tensor, and how one tensor becomes parts."""

    name: str
    join: Callable[[Ranks, ModelConfig], LazyTensor]
    split: Callable[[LazyTensor, int, ModelConfig], list[LazyTensor]]


Order = Callable[[ModelConfig], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Weight:
    """One row of an architecture's table; `{i}` in a name stands for the layer."""

    stage: str  # embed, layer, norm, head: which layer file holds it
    source: tuple[str, ...]  # its name in a layer file, one per generation of gpt-neox
    join: Join
    role: str  # qkv, attn_out, mlp_in, mlp_out, embedding, head, norm, bias: what a mix asks for
    shape: tuple[str, ...]  # of the unified tensor, in words of `ModelConfig.sizes`
    unified: str  # its Hugging Face name, used in every message
    gguf: str
    gguf_order: Order | None = None  # the order of rows in GGUF, as indices of unified rows
    norm: str | None = None  # the norm (unified, without .weight) whose output it multiplies

    def at(self, layer: int) -> Weight:
        """The weight of one layer: its unified names and its GGUF name with the number in them."""
        number = str(layer)
        norm = self.norm.replace("{i}", number) if self.norm else None
        return replace(
            self, unified=self.unified.replace("{i}", number), gguf=self.gguf.replace("{i}", number), norm=norm
        )


@dataclass(frozen=True)
class Buffer:
    """A tensor of every layer that gpt-neox stored until 2024, though it follows from the hyperparameters."""

    source: str  # its name in a layer file
    after: str  # the oldest name of the weight that it follows there
    values: Callable[[ModelConfig], Floats]


@dataclass(frozen=True)
class SourceFile:
    """A file that tensors are read from, with the SHA-256 of what describes them (header, zip directory and pickle)."""

    storage: Storage
    checksum: str


@dataclass(frozen=True)
class Index:
    """What a reader finds in a source: names as the source spells them, nothing interpreted, no weight read.

    `ranks` has one dictionary for each tensor-parallel rank (one for formats without ranks), in the stored order.
    For gpt-neox the names are `N.name` with the layer index N, for pipeline and sequential files alike.
    """

    format: str  # neox, hf, safetensors, gguf
    folder: Place
    files: tuple[SourceFile, ...]
    ranks: tuple[dict[str, LazyTensor], ...]
    settings: dict[str, Any]  # merged YAML, config.json or GGUF keys, as found
    states: dict[int, Any] = field(default_factory=dict)  # gpt-neox: number of an mp_rank file -> its bookkeeping
    sequential: bool = False  # gpt-neox: the weights lie in the mp_rank files
    ordered: bool = False  # gpt-neox: layer files hold an OrderedDict, as today's DeepSpeed writes them
    configs: tuple[Place, ...] = ()  # gpt-neox: the YAML files
    set_aside: tuple[str, ...] = ()  # files that hold no weights (optimizer states), named and not opened
    stored: tuple[dict[str, LazyTensor], ...] = ()  # gpt-neox: what fp32 masters in `ranks` stand in for, if they do

    @property
    def where(self) -> Place:
        """What messages call the source: the file that it is, or the folder."""
        alone = self.format in ("gguf", "safetensors") and len(self.files) == 1
        return self.files[0].storage.path if alone else self.folder


@dataclass(frozen=True)
class Context:
    """What an encoder may use besides the rows; nothing of it is needed to decode.

    `importance` [columns] float32: how much an error in each column matters, of any scale; `thorough`: take more time
    for less error.
    """

    importance: Floats | None = None
    thorough: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        columns = b"" if self.importance is None else self.importance.tobytes()
        return hashlib.sha256(columns + bytes([self.thorough])).hexdigest()


class Check(Protocol):
    """Which weights [n, columns] no correct encoder could have stored as they are: a boolean for each.

    `weighted`: the encoder may have known an importance of the columns, and sacrificed others to them.
    """

    def __call__(self, rows: Floats, stored: Array, weighted: bool = False) -> npt.NDArray[np.bool_]: ...


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
class Grain:
    """Which weights of a tensor share a scale; a group's size is its largest magnitude.

    `unit`: the least number of rows of so many columns that are whole groups; `sizes`: of [n, columns] float32, one for
    each group in order; `span`: which groups rows `start` to `stop` of so many columns touch; `spread`: of a number of
    each group [k] one for every weight of these rows [n, columns].
    """

    unit: Callable[[int], int]
    sizes: Callable[[Floats], Floats]
    span: Callable[[int, int, int], slice]
    spread: Callable[[Floats, tuple[int, ...]], Floats]


@dataclass(frozen=True)
class Bound:
    """How far a weight is rounded at most: a `part` of what `of` names."""

    part: float
    of: str
    least: str = ""  # what small weights may be rounded by, where that is more

    def __str__(self) -> str:
        return f"{self.part:.3g} of the {self.of}{', or ' * bool(self.least)}{self.least}"


@dataclass(frozen=True)
class Encoding:
    """How rows of float32 become stored bytes, and back.

    `encode` takes [n, columns] float32 and gives [n, ...] of `dtype.stored` (for block types [n, row bytes] of uint8);
    `decode` is the way back. `wrong` says which weights no correct encoder could have stored as they are. `search` is
    an encoder that makes use of a context; None where there is nothing to choose. Weights of a
    magnitude beyond `limit` are cut to the largest that the type holds.
    """

    name: str
    dtype: DType
    encode: Callable[[Floats], Array]
    decode: Callable[[Array], Floats]
    wrong: Check
    search: Callable[[Floats, Context], Array] | None = None
    limit: float = math.inf
    bound: Bound | None = None

    @property
    def bits(self) -> float:
        """Bits for each weight."""
        return 8 * self.dtype.nbytes / self.dtype.block


@dataclass(frozen=True)
class Settled:
    """What a value of 1 stands for in each group when it is encoded and when it is read back, and how far the latter
    may be off in a file of another program."""

    encoded: Floats
    decoded: Floats
    slack: Floats


@dataclass(frozen=True)
class Scaled:
    """An encoding whose scales lie in tensors of their own, beside that of the codes.

    `parts` are the stored tensors, codes first, named as they follow the module's name. `encode` makes codes of rows
    [n, columns] that are whole groups, and of their sizes; `finish` makes the bytes of the other parts when all sizes
    are known; `decode` makes a reader of float32 rows from the parts by name, and the shape. With `whole` a tensor is
    read once for its size and once more for its codes; `rounded` is the type that its weights, of the source's type,
    are rounded to before.

    For verification: `settle` tells what becomes of sizes, and `nearest` what the nearest codes of weights stand for,
    both as parts of what 1 stands for in their group.
    """

    name: str
    dtype: DType  # of what `decode` reads
    grain: Grain
    parts: Callable[[LazyTensor], tuple[Part, ...]]
    encode: Callable[[Floats, Floats], Array]
    finish: Callable[[LazyTensor, Floats], tuple[bytes, ...]]
    decode: Callable[[Mapping[str, LazyTensor], tuple[int, ...]], Read]
    nearest: Callable[[Floats], Floats]
    settle: Callable[[Floats], Settled]
    bound: Bound
    rounded: Callable[[DType], DType] | None = None
    whole: bool = False

    def groups(self, tensor: LazyTensor) -> int:
        """How many groups, each with a size, a tensor has."""
        return 1 if self.whole else int(self.grain.span(0, tensor.rows, tensor.columns).stop)


@dataclass(frozen=True)
class Entry:
    """A tensor on its way into a target: the target's name for it, where it comes from and how it is stored."""

    name: str
    unified: str
    tensor: LazyTensor
    encoding: Encoding | Scaled
    context: Context | None = None  # only where the encoding has a search

    @property
    def search(self) -> Callable[[Floats, Context], Array] | None:
        """The encoder that makes use of a context, if there is one."""
        return self.encoding.search if isinstance(self.encoding, Encoding) else None

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
        """The tensors that the target holds of it: one, or codes and what belongs to them."""
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
        """Bytes that are held until the last row is encoded: sizes, and what is made of them."""
        return 2 * 4 * self.encoding.groups(self.tensor) if isinstance(self.encoding, Scaled) else 0


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
    """What a target will hold: files of weights, small files as they are, and what is worth telling."""

    files: tuple[FileLayout, ...]
    sidecars: dict[str, bytes]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What the shapes of a source's tensors tell of the model, over all ranks."""

    layers: int
    hidden: int
    ff: int
    rows: int
    tied: bool  # there is no head


@dataclass(frozen=True)
class Architecture:
    """One model family: the table of its weights, and its hyperparameters in every format's words.

    `config_of[format](index, measured, preset)` gives the hyperparameters, and notes on what was guessed.
    """

    name: str
    weights: tuple[Weight, ...]
    dropped: tuple[str, ...]  # patterns of buffers that are recomputed, by any format's name
    config_of: Mapping[str, Callable[[Index, Measured, str | None], tuple[ModelConfig, tuple[str, ...]]]]
    to_hf: Callable[[ModelConfig, str], dict[str, Any]]
    to_gguf: Callable[[ModelConfig], dict[str, Any]]
    to_neox: Callable[[ModelConfig], dict[str, Any]]
    buffers: tuple[Buffer, ...] = ()

    def names(self, config: ModelConfig) -> list[tuple[int | None, Weight]]:
        """Every weight of a model, its names spelled for its layer (None outside), in the order of the forward pass."""
        before = [(None, w) for w in self.weights if w.stage == "embed"]
        layers = [(i, w.at(i)) for i in range(config.layers) for w in self.weights if w.stage == "layer"]
        after = [(None, w) for w in self.weights if w.stage == "norm" or (w.stage == "head" and not config.tied)]
        return [*before, *layers, *after]

    def stored(self, config: ModelConfig) -> Iterator[tuple[int | None, Weight, Buffer | None]]:
        """Every tensor of 2022's layer files in their order: a weight, or the buffer that follows it."""
        for layer, weight in self.names(config):
            yield layer, weight, None
            yield from ((layer, weight, buffer) for buffer in self.buffers if buffer.after == weight.source[0])


@dataclass(frozen=True)
class Opening:
    """What was asked for when a checkpoint was opened, with which it is opened anew elsewhere."""

    path: Place
    config: tuple[Path, ...] = ()  # gpt-neox YAML files, instead of those beside the weights
    preset: str | None = None  # a released model
    norms: str = "mean"  # how the ranks' norms are joined
    weights: str = "stored"  # or master, the optimizer's fp32 copies
    partial: bool = False  # whether it may be a part of a model


@dataclass(frozen=True)
class Checkpoint:
    """A model from any source under unified names: nothing is read until rows are asked for."""

    opening: Opening
    index: Index
    architecture: Architecture
    config: ModelConfig
    tensors: dict[str, LazyTensor]  # unified names, in the order of the forward pass
    dropped: tuple[str, ...]  # source tensors that are recomputed, by the source's names
    notes: tuple[str, ...]  # what was guessed or is worth knowing, for people and for the manifest

    @property
    def norms(self) -> str:
        """How the ranks' norms were joined."""
        return self.opening.norms

    @property
    def weights(self) -> str:
        """Which weights were read."""
        return self.opening.weights

    @property
    def unusual(self) -> dict[str, str]:
        """Which weights it is made of, for fingerprints and manifests; nothing where they are the stored ones."""
        return {"weights": self.weights} if self.weights != "stored" else {}

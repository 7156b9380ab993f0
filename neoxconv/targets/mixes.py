"""Mixes: which encoding each weight of a GGUF file gets, by its role and layer. The first row that fits decides.

The rows are what llama-quantize does, with and without an importance matrix; it treats the fused attn_qkv like attn_v.
The `classic` rows for attn_qkv are as they were until early 2025, better known and a little smaller or larger.
Source: llama.cpp's llama-quant.cpp (llama_tensor_get_type_impl).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from neoxconv.core.encoding import Encoding
from neoxconv.errors import PlanError, raise_all
from neoxconv.quant import ENCODINGS

_ANY = "*"
_VECTORS = ("norm", "bias", "positions")  # always F32 in GGUF


@dataclass(frozen=True)
class Where:
    """Where a weight is: in `layer` of `layers`, in a file that is made with an importance matrix or without.

    `queries` are the heads of queries for each one of keys and values.
    """

    layer: int
    layers: int
    imatrix: bool
    queries: int = 1


_When = Callable[[Where], bool]


@dataclass(frozen=True)
class _Row:
    """A weight of this role gets this encoding, in the layers that `when` says."""

    role: str
    encoding: str
    when: _When = lambda where: True


def more(where: Where) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and every third between."""
    eighth = where.layers // 8
    return where.layer < eighth or where.layer >= 7 * where.layers // 8 or (where.layer - eighth) % 3 == 2


def first(count: int) -> _When:
    """The first `count` layers."""
    return lambda where: where.layer < count


def share(divisor: int, imatrix: bool | None = None) -> _When:
    """The first layers / divisor; only with or only without an importance matrix where that is said."""
    return lambda where: where.layer < where.layers // divisor and imatrix in (None, where.imatrix)


def grouped(where: Where) -> bool:
    """Four queries or more for each key, so that attn_v is small."""
    return where.queries >= 4


def of_70b(where: Where) -> bool:
    """Llama 70B, as llama.cpp tells it: 80 layers and grouped queries; types below Q5_K are raised to it."""
    return where.layers == 80 and where.queries > 1


def grouped_70b(where: Where) -> bool:
    """Llama 70B with four queries or more for each key."""
    return of_70b(where) and grouped(where)


def between_eighths(where: Where) -> bool:
    """All layers but the first and the last eighth."""
    return where.layers // 8 <= where.layer < 7 * where.layers // 8


def without_matrix(where: Where) -> bool:
    """In a file that is made without an importance matrix."""
    return not where.imatrix


HEAD, SMALL_HEAD = _Row("head", "Q6_K"), _Row("head", "Q5_K")
_ALIKE = {"qkv": "attn_v"}  # roles that share rows


@dataclass(frozen=True)
class _Mix:
    """llama.cpp's general.file_type, and the rows: `classic` ones, if any, stand before the others."""

    file_type: int
    rows: tuple[_Row, ...]
    classic: tuple[_Row, ...] = ()


def simple(file_type: int, name: str, *rows: _Row, classic: tuple[_Row, ...] = ()) -> _Mix:
    """The rows, and `name` for all else."""
    return _Mix(file_type, (*rows, _Row(_ANY, name)), classic)


def _two_bits(name: str, attn_out: str) -> tuple[_Row, ...]:
    """What mixes of two bits and fewer have in common: `name` for what matters more."""
    return (
        SMALL_HEAD, _Row("embedding", name), _Row("attn_v", "Q4_K", grouped), _Row("attn_v", name),
        _Row("mlp_out", name, share(8)), _Row("attn_out", attn_out),
    )  # fmt: skip


MIXES: dict[str, _Mix] = {
    "F32": simple(0, "F32"),
    "F16": simple(1, "F16"),
    "BF16": simple(32, "BF16"),
    "Q8_0": simple(7, "Q8_0"),
    "Q6_K": simple(18, "Q6_K"),
    "Q5_K_M": simple(17, "Q5_K", HEAD, _Row("attn_v", "Q6_K", more), _Row("mlp_out", "Q6_K", more),
                     classic=(_Row("qkv", "Q6_K"),)),
    "Q5_K_S": simple(16, "Q5_K", HEAD),
    "Q5_1": simple(9, "Q5_1", HEAD),
    "Q5_0": simple(8, "Q5_0", HEAD, _Row("mlp_out", "Q5_1", share(8, imatrix=True))),
    "Q4_K_M": simple(15, "Q4_K", HEAD, _Row("attn_v", "Q6_K", more), _Row("attn_v", "Q5_K", of_70b),
                     _Row("mlp_out", "Q6_K", more),
                     classic=(_Row("qkv", "Q5_K"),)),
    "Q4_K_S": simple(14, "Q4_K", HEAD, _Row("attn_v", "Q5_K", first(4)), _Row("attn_v", "Q5_K", of_70b),
                     _Row("mlp_out", "Q5_K", share(8)),
                     classic=(_Row("qkv", "Q4_K"),)),
    "Q4_1": simple(3, "Q4_1", HEAD),
    "Q4_0": simple(2, "Q4_0", HEAD, _Row("mlp_out", "Q4_1", share(8, imatrix=True))),
    "IQ4_NL": simple(25, "IQ4_NL", HEAD, _Row("attn_v", "Q5_K", grouped),
                     _Row("mlp_out", "Q5_K", share(8, imatrix=False))),
    "IQ4_XS": simple(30, "IQ4_XS", HEAD, _Row("attn_v", "Q5_K", grouped),
                     _Row("mlp_out", "Q5_K", share(8, imatrix=False))),
    "Q3_K_L": simple(13, "Q3_K", HEAD, _Row("attn_v", "Q5_K"), _Row("attn_out", "Q5_K"), _Row("mlp_out", "Q5_K"),
                     classic=(_Row("qkv", "Q4_K"),)),
    "Q3_K_M": simple(12, "Q3_K", HEAD, _Row("attn_v", "Q5_K", first(2)), _Row("attn_v", "Q5_K", of_70b),
                     _Row("attn_v", "Q4_K"), _Row("attn_out", "Q4_K"),
                     _Row("mlp_out", "Q5_K", share(16)), _Row("mlp_out", "Q4_K"),
                     classic=(_Row("qkv", "Q4_K"),)),
    "Q3_K_S": simple(11, "Q3_K", HEAD, _Row("attn_v", "Q5_K", of_70b)),
    "Q2_K": simple(10, "Q2_K", HEAD, _Row("attn_v", "Q5_K", of_70b), _Row("attn_v", "Q4_K", grouped),
                   _Row("attn_v", "Q3_K"), _Row("attn_out", "Q3_K"), _Row("mlp_out", "Q3_K"),
                   classic=(_Row("qkv", "Q2_K"),)),
    "Q2_K_S": simple(21, "Q2_K", HEAD, _Row("attn_v", "Q5_K", grouped_70b), _Row("attn_v", "Q4_K", grouped),
                     _Row("mlp_out", "Q4_K", share(8))),
    "IQ3_M": simple(27, "IQ3_S", HEAD, _Row("attn_v", "Q5_K", of_70b), _Row("attn_v", "Q4_K"), _Row("attn_out", "Q4_K"),
                    _Row("mlp_out", "Q4_K", share(8))),
    "IQ3_S": simple(26, "IQ3_S", HEAD, _Row("attn_v", "Q5_K", grouped_70b), _Row("attn_v", "Q4_K", grouped)),
    "IQ3_XS": simple(22, "IQ3_S", HEAD, _Row("attn_v", "Q5_K", grouped_70b), _Row("attn_v", "Q4_K", grouped),
                     _Row("attn_q", "IQ3_XXS"), _Row("attn_k", "IQ3_XXS"),
                     _Row("mlp_in", "IQ3_XXS", between_eighths)),
    "IQ3_XXS": simple(23, "IQ3_XXS", SMALL_HEAD, _Row("embedding", "IQ3_S"),
                      _Row("attn_v", "Q5_K", grouped_70b), _Row("attn_v", "Q4_K", grouped),
                      _Row("attn_v", "IQ3_S", without_matrix), _Row("attn_q", "IQ2_S"), _Row("attn_k", "IQ2_S"),
                      _Row("mlp_out", "Q4_K", share(8, imatrix=False)), _Row("mlp_out", "Q3_K", without_matrix),
                      _Row("attn_out", "IQ3_S")),
    "IQ2_M": simple(29, "IQ2_S", *_two_bits("IQ3_S", "IQ3_S")),
    "IQ2_S": simple(28, "IQ2_XS", *_two_bits("IQ3_S", "IQ3_S")),
    "IQ2_XS": simple(20, "IQ2_XS", *_two_bits("Q2_K", "IQ2_XS")),
    "IQ2_XXS": simple(19, "IQ2_XXS", *_two_bits("Q2_K", "IQ2_XXS")),
    "IQ1_M": simple(31, "IQ1_M", *_two_bits("Q2_K", "IQ2_XXS")),
    "IQ1_S": simple(24, "IQ1_S", *_two_bits("Q2_K", "IQ2_XXS")),
}  # fmt: skip

# Types that llama.cpp makes only with an importance matrix, but of embedding and head: tensor_requires_imatrix.
_NEED_MATRIX = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

# For rows that no super-block divides, as llama-quantize does; rows that no block of 32 divides are F16.
_FALLBACK = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0", "IQ4_XS": "IQ4_NL",
    **dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "IQ4_NL"),
}  # fmt: skip
_LAST_RESORT = "F16"


@dataclass(frozen=True)
class Choice:
    """What decides: a mix, in its current or classic form or `pure` (its main type for every matrix), with an
    importance matrix or without; and what overrides it: `output` and `embedding` types, and (pattern, type) pairs, the
    first whose pattern a GGUF name holds.

    Raises PlanError for a name or a pattern that is none.
    """

    mix: str
    classic: bool = False
    pure: bool = False
    output: str | None = None
    embedding: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    imatrix: bool = False

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise PlanError(f"--type {self.mix}: expected one of {', '.join(MIXES)}.")
        types = [self.output, self.embedding, *(name for _, name in self.overrides)]
        for name in filter(None, types):
            if name not in ENCODINGS:
                raise PlanError(f"type {name}: expected one of {', '.join(ENCODINGS)}.")
        for pattern, _ in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise PlanError(
                    f"--tensor-type {pattern}: is not a regular expression ({error}); correct it."
                ) from error


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as a mix sees it; `layer` of `layers`, None outside of them; `queries` as in `Where`.

    The embedding of a tied model is the head as well, if the file has none, and counts as both.
    """

    name: str
    role: str
    layer: int | None
    layers: int
    columns: int
    queries: int = 1
    tied: bool = False


def choose(choice: Choice, tensor: GgufTensor) -> Encoding:
    """The encoding of a tensor. Vectors are F32; where the block does not divide the rows, what stands in for it."""
    if tensor.role in _VECTORS:
        return ENCODINGS["F32"]
    name = wanted(choice, tensor)
    return ENCODINGS[next(n for n in _stand_ins(name, tensor) if tensor.columns % ENCODINGS[n].dtype.block == 0)]


def wanted(choice: Choice, tensor: GgufTensor) -> str:
    """What the overrides or the mix give a matrix, whatever its width."""
    for pattern, name in choice.overrides:
        if re.search(pattern, tensor.name):
            return name
    special = {"head": [choice.output], "embedding": [choice.embedding, choice.output if tensor.tied else None]}
    if asked := [*filter(None, special.get(tensor.role, []))]:
        return asked[0]
    mix, role = MIXES[choice.mix], "head" if tensor.tied else tensor.role
    rows = mix.rows[-1:] if choice.pure else (*(mix.classic if choice.classic else ()), *mix.rows)
    where = Where(-1 if tensor.layer is None else tensor.layer, tensor.layers, choice.imatrix, tensor.queries)
    roles = role, _ALIKE.get(role), _ANY
    return next(row.encoding for row in rows if row.role in roles and row.when(where))


def needs_matrix(mix: str, tensor: GgufTensor, name: str) -> bool:
    """Whether llama.cpp would make a tensor of a mix this type only by the importance of its columns."""
    needed = name in _NEED_MATRIX or (mix == "Q2_K_S" and name == "Q2_K")
    return needed and tensor.role not in ("embedding", "head", *_VECTORS)


def check_patterns(choice: Choice, tensors: Sequence[GgufTensor]) -> list[str]:
    """Notes on overrides that earlier ones leave nothing to, since the first whose pattern a name holds decides.

    Raises PlanError for each that no matrix of the model is given by its name, whatever the others say.
    """
    matrices = [tensor.name for tensor in tensors if tensor.role not in _VECTORS]
    held = {pattern: [name for name in matrices if re.search(pattern, name)] for pattern, _ in choice.overrides}
    raise_all(PlanError, (_unmatched(pattern, tensors) for pattern, names in held.items() if not names))
    notes, taken = [], set[str]()
    for number, (pattern, name) in enumerate(choice.overrides):
        if taken.issuperset(held[pattern]):
            before = ", ".join(f"{earlier}={given}" for earlier, given in choice.overrides[:number])
            notes.append(f"--tensor-type {pattern}={name} has no effect: {before} before it took all that it matches")
        taken |= set(held[pattern])
    for option, role, type_ in (("output", "head", choice.output), ("embedding", "embedding", choice.embedding)):
        own = {tensor.name for tensor in tensors if tensor.role == role or (tensor.tied and role == "head")}
        if type_ and own and own <= taken:
            notes.append(f"--{option}-type {type_} has no effect: --tensor-type decides {', '.join(sorted(own))}")
    return notes


def _unmatched(pattern: str, tensors: Sequence[GgufTensor]) -> str:
    """Why a pattern has nothing to give a type to."""
    vectors = [tensor.name for tensor in tensors if re.search(pattern, tensor.name)]
    if vectors:
        return (
            f"--tensor-type {pattern}: matches only vectors ({vectors[0]}), which are F32 always; correct or drop it."
        )
    known = dict.fromkeys(re.sub(r"\d+", "N", tensor.name) for tensor in tensors if tensor.role not in _VECTORS)
    return f"--tensor-type {pattern}: no tensor's name holds it; there are {', '.join(known)}. Correct or drop it."


def _stand_ins(name: str, tensor: GgufTensor) -> Iterator[str]:
    """The type itself, then what replaces it where its blocks do not divide the rows."""
    yield name
    if name in _FALLBACK:
        yield "Q8_0" if tensor.tied or tensor.role == "head" else _FALLBACK[name]
    yield _LAST_RESORT

"""What `tests.fuzz` feeds to the parsers: valid files in pieces (fields, opcodes, tokens), and ways to change them.

A seed is a file in pieces. A change replaces, drops, repeats or moves pieces; `finish` puts them together and mends
what a mere checksum or length would refuse, so that the changes reach the code behind it; then bytes may be changed.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from random import Random
from typing import Any

from neoxconv.arch.ctranslate2.names import rows_of
from neoxconv.arch.ctranslate2.settings import scalars_of
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.core.encoding import Part
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, F32, U8
from neoxconv.formats.pt.pickling import TensorRef, dump_pickle
from neoxconv.formats.pt.unpickle import Size
from neoxconv.formats.pt.zip_headers import CENTRAL
from neoxconv.quant import SCALED
from neoxconv.quant.scaled import gptq
from neoxconv.quant.scaled.fourbit import NF4_TABLE
from neoxconv.quant.scaled.nested import nested_table
from neoxconv.quant.scaled.packed import PackedForm

Pieces = tuple[bytes, ...]
Change = Callable[[Random, list[bytes], Sequence[Pieces]], None]
LARGEST = 1 << 15  # bytes of an input

POWERS = (7, 8, 15, 16, 24, 31, 32, 40, 60, 61, 62, 63, 64)
INTEGERS = (0, 1, -1, 2, 3, *(sign * (1 << power) + off for power in POWERS for sign in (1, -1) for off in (-1, 0, 1)))
TEXTS = (
    b"", b"0", b"a", b"os", b"system", b"builtins", b"__builtin__", b"eval", b"set", b"posix", b"torch", b"Size",
    b"torch._utils", b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", b"_rebuild_parameter", b"collections",
    b"OrderedDict", b"_codecs", b"encode", b"latin1", b"utf-16", b"storage", b"FloatStorage", b"UntypedStorage",
    b"ComplexFloatStorage", b"float16", b"__dict__", b"__class__", b"../../etc/passwd", b"/etc/passwd", b"\0", b"\n",
    b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J\x1b[31mPASS\r\n", "\u202e\u2028é".encode(), b"a" * 3000,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A way to make inputs: seeds in pieces, changes beside the usual ones, how the pieces become a file."""

    seeds: tuple[Pieces, ...]
    finish: Callable[[Random, list[bytes]], bytes]
    changes: tuple[Change, ...] = ()
    mend: Callable[[bytes], bytes] | None = None  # after single bytes were changed


def make_input(rng: Random, kinds: Sequence[Kind]) -> bytes:
    """One input: pieces changed, put together, and in a third of the cases bytes changed."""
    kind = rng.choice(kinds)
    pieces = list(rng.choice(kind.seeds))
    own = rng.random() < 0.75
    for _ in range(1 + min(rng.getrandbits(2), rng.getrandbits(3)) if own else 0):
        rng.choice((*USUAL, *kind.changes, *kind.changes) if pieces else (steal,))(rng, pieces, kind.seeds)
    data = kind.finish(rng, pieces)[:LARGEST]
    if not own or rng.random() < 0.2:
        for _ in range(1 + min(rng.getrandbits(2), rng.getrandbits(2))):
            data = rng.choice(BYTES)(rng, data, b"".join(rng.choice(kind.seeds)))[:LARGEST]
        if kind.mend and rng.random() < 0.5:
            data = kind.mend(data)
    return data


# --- changes of pieces -----------------------------------------------------------------------------------------------


def integer(rng: Random, width: int) -> bytes:
    """An odd integer in so many bytes."""
    return (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")


def field(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Make a field of 1, 2, 4 or 8 bytes an odd integer, or one a little larger or smaller."""
    places = [at for at, piece in enumerate(pieces) if len(piece) in (1, 2, 4, 8)]
    if places:
        at = rng.choice(places)
        width = len(pieces[at])
        near = (int.from_bytes(pieces[at], "little") + rng.randint(-9, 9)) % (1 << 8 * width)
        pieces[at] = near.to_bytes(width, "little") if rng.random() < 0.4 else integer(rng, width)


def drop(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Leave out a few pieces."""
    at = rng.randrange(len(pieces))
    del pieces[at : at + 1 + rng.getrandbits(2)]


def again(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Repeat a few pieces, seldom a thousand times."""
    at, count = rng.randrange(len(pieces)), 1 + rng.getrandbits(3)
    times = rng.choice((1, 1, 2, 3, 1 << rng.randrange(11)))
    pieces[at:at] = pieces[at : at + count] * times


def swap(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Exchange two pieces."""
    a, b = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    pieces[a], pieces[b] = pieces[b], pieces[a]


def steal(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Put pieces of a seed in, or instead of as many."""
    other = rng.choice(seeds)
    start, count = rng.randrange(len(other)), 1 + rng.getrandbits(3)
    at = rng.randint(0, len(pieces))
    pieces[at : at + count * rng.getrandbits(1)] = other[start : start + count]


def splice(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Go on as another seed."""
    other = rng.choice(seeds)
    pieces[rng.randint(0, len(pieces)) :] = other[rng.randrange(len(other)) :]


def text(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Make a piece another text, and the four or eight bytes before it, if they told its length, the new length."""
    at = rng.randrange(len(pieces))
    new, before = rng.choice(TEXTS), pieces[at - 1] if at else b""
    if len(before) in (4, 8) and int.from_bytes(before, "little") == len(pieces[at]) and rng.random() < 0.9:
        pieces[at - 1] = len(new).to_bytes(len(before), "little")
    pieces[at] = new


USUAL: tuple[Change, ...] = (field, field, field, drop, again, swap, steal, splice, text)


# --- changes of bytes ------------------------------------------------------------------------------------------------


def flip(rng: Random, data: bytes, other: bytes) -> bytes:
    """Flip a bit."""
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"\0"


def poke(rng: Random, data: bytes, other: bytes) -> bytes:
    """Set a byte."""
    at = rng.randrange(len(data) or 1)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def cut(rng: Random, data: bytes, other: bytes) -> bytes:
    """End early."""
    return data[: rng.randint(0, len(data))]


def leave_out(rng: Random, data: bytes, other: bytes) -> bytes:
    """Leave some bytes out."""
    at = rng.randint(0, len(data))
    return data[:at] + data[at + 1 + rng.getrandbits(5) :]


def insert(rng: Random, data: bytes, other: bytes) -> bytes:
    """Put random bytes in."""
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(1 + rng.getrandbits(4)) + data[at:]


def repeat(rng: Random, data: bytes, other: bytes) -> bytes:
    """Repeat some bytes."""
    at = rng.randint(0, len(data))
    return data[:at] + data[at : at + 1 + rng.getrandbits(6)] * (1 << rng.randrange(9)) + data[at:]


def join(rng: Random, data: bytes, other: bytes) -> bytes:
    """Go on as another file."""
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def aligned(rng: Random, data: bytes, other: bytes) -> bytes:
    """Set an aligned integer."""
    width = 1 << rng.randrange(4)
    at = rng.randrange(len(data) or 1) // width * width
    return data[:at] + integer(rng, width) + data[at + width :]


BYTES = (flip, poke, cut, leave_out, insert, repeat, join, aligned, aligned)


# --- pickles ---------------------------------------------------------------------------------------------------------

CODES = tuple(pickletools.opcodes)
UNTIL_NEWLINE = (b"0", b"1", b"-5", b"00", b"01", b"9" * 300, b"1e9", b"nan", b"0x1", b"1L", b"'a'", b'"', b"\xff", b"")


def operations(data: bytes) -> Pieces:
    """The opcodes of a valid pickle, each with its argument."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return tuple(data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def operation(rng: Random) -> bytes:
    """Any opcode with any argument."""
    code = rng.choice(CODES)
    return code.code.encode("latin1") + (argument(rng, code.arg) if code.arg else b"")


def argument(rng: Random, kind: Any) -> bytes:
    """An argument of an opcode: a fixed number of bytes, a line or two, or a length and as many bytes, or a lie."""
    if kind.n >= 0:
        small = rng.getrandbits(3).to_bytes(kind.n, "little")
        return small if rng.random() < 0.5 else integer(rng, kind.n)
    if kind.n == pickletools.UP_TO_NEWLINE:
        lines = 2 if kind.name == "stringnl_noescape_pair" else 1
        return b"".join(rng.choice((*UNTIL_NEWLINE, *TEXTS)).replace(b"\n", b" ") + b"\n" for _ in range(lines))
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(kind.n, 4)
    content = rng.choice(TEXTS)[: 255 if width == 1 else None]
    length = len(content).to_bytes(width, "little") if rng.random() < 0.8 else integer(rng, width)
    return length + content


def operate(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Insert opcodes, or put one instead of another."""
    at, count = rng.randint(0, len(pieces)), rng.choice((1, 1, 1, 2, 5))
    pieces[at : at + rng.getrandbits(1)] = [operation(rng) for _ in range(count)]


def scramble(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Give an opcode another argument."""
    at = rng.randrange(len(pieces))
    code = next((code for code in CODES if code.code.encode("latin1") == pieces[at][:1]), None)
    if code and code.arg:
        pieces[at] = pieces[at][:1] + argument(rng, code.arg)


def tensor_or_none(value: Any) -> TensorRef | None:
    return value if isinstance(value, TensorRef) else None


def pickled(value: Any) -> bytes:
    return dump_pickle(value, tensor_or_none, "a seed")


def tensor(key: str, *shape: int, storage: str = "HalfStorage") -> TensorRef:
    return TensorRef(key, storage, shape)


def framed(pickle_of: bytes) -> bytes:
    """Protocol 4: a pickle of protocol 2 with a frame around it, some of its names as STACK_GLOBAL, memoized."""
    body = re.sub(
        rb"c([\w.]+)\n(\w+)\n[qr]", lambda m: b"".join(short(name) for name in m.groups()) + b"\x93q", pickle_of[2:]
    )
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def short(name: bytes) -> bytes:
    return b"\x8c" + bytes([len(name)]) + name


WEIGHTS = {"a.weight": tensor("0", 4, 8), "a.bias": tensor("1", 4, storage="FloatStorage")}
TREES: tuple[Any, ...] = (
    OrderedDict(WEIGHTS),
    {"module": WEIGHTS, "step": 10, "args": {"lr": 1e-4, "set": {"a", "b"}, "none": [None, True, (1, 2, -3, 1 << 70)]}},
    [tensor("0", 2, 4, 4), Size((2, 3)), b"\x00\xff", tensor("1", storage="FloatStorage"), tensor("0", 0, 3)],
)
STRIDED = pickled([tensor("0", 8, 4)]).replace(b"(K\x04K\x01t", b"(K\x01K\x08t")  # transposed
PARAMETER = (
    b"\x80\x02ctorch._utils\n_rebuild_parameter\nctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storagectorch.stor"
    b"age\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x40tQK\x00K\x04\x85K\x02\x85\x89N"
    b"ctorch\nfloat16\ntR\x88N\x87R."
)
CALLS = (
    b"\x80\x02]q\x00(cos\nsystem\nX\x04\x00\x00\x00true\x85R"
    b"cbuiltins\neval\nX\x01\x00\x00\x001\x85Rcos\nmkdir\n)\x81X\x01\x00\x00\x00aNs}b(K\x01oe."
)
PICKLES = (
    *map(pickled, TREES),
    framed(pickled(TREES[0])),
    STRIDED,
    PARAMETER,
    pickle.dumps({"a": [1.5, "é", b"x", {1, 2}, frozenset({3})], "b": (1, "a", None)}, 5),
    pickle.dumps([1, 2.5, "text", None, True, {"k": (1, 2)}], 0),
)
OPERATIONS = (*map(operations, PICKLES), tuple(CALLS[i : i + 1] for i in range(len(CALLS))))
STORAGES = {"0": bytes(range(64)), "1": bytes(16)}


def joined(rng: Random, pieces: list[bytes]) -> bytes:
    return b"".join(pieces)


PICKLE = (Kind(OPERATIONS, joined, (operate, operate, operate, scramble, scramble)),)


# --- files of torch.save ---------------------------------------------------------------------------------------------


def zip_pieces(members: dict[str, bytes], wide: bool = False) -> Pieces:
    """A zip of stored members, each header field a piece; `wide` has the directory's place in a zip64 record."""
    pieces: list[bytes] = []
    entries: list[bytes] = []
    for name, data in members.items():
        crc, size = struct.pack("<I", zlib.crc32(data)), struct.pack("<I", len(data))
        offset = struct.pack("<I", sum(map(len, pieces)))
        common = [b"\0\0", b"\0\0", b"\0\0", b"\0\0", crc, size, size, struct.pack("<H", len(name))]
        pieces += [b"PK\3\4", b"\x14\0", *common, b"\6\0", name.encode(), b"FB\2\0ZZ", data]
        attributes = [b"\0\0", b"\0\0", b"\0\0", b"\0\0", bytes(4), offset]
        entries += [b"PK\1\2", b"\x14\0", b"\x14\0", *common, *attributes, name.encode()]
    start, size = sum(map(len, pieces)), sum(map(len, entries))
    end64 = start + size
    count = struct.pack("<Q", len(members))
    if wide:
        places = struct.pack("<Q", size), struct.pack("<Q", start)
        entries += [b"PK\6\6", struct.pack("<Q", 44), b"-\0", b"-\0", bytes(4), bytes(4), count, count, *places]
        entries += [b"PK\6\7", bytes(4), struct.pack("<Q", end64), b"\1\0\0\0"]
    where = (b"\xff" * 4, b"\xff" * 4) if wide else (struct.pack("<I", size), struct.pack("<I", start))
    return (*pieces, *entries, b"PK\5\6", b"\0\0", b"\0\0", count[:2], count[:2], *where, b"\0\0")


def members(data: bytes) -> dict[str, bytes]:
    storages = {f"x/data/{key}": content for key, content in STORAGES.items()}
    return {"x/data.pkl": data, "x/byteorder": b"little", **storages, "x/version": b"3\n"}


def zipped(rng: Random, pieces: list[bytes]) -> bytes:
    return b"".join(zip_pieces(members(b"".join(pieces)), rng.random() < 0.2))


def mend_crc(data: bytes) -> bytes:
    """The zip with the CRC-32 that the bytes have which its directory gives to data.pkl; as it is where none is found.

    The local header's place in the directory, its two lengths and the size in the directory say which bytes these are.
    """
    name = data.rfind(b"x/data.pkl")
    at = name - CENTRAL.size
    if at < 0 or data[at : at + 4] != b"PK\1\2":
        return data
    size, offset = struct.unpack_from("<I", data, at + 24)[0], struct.unpack_from("<I", data, at + 42)[0]
    if offset + 30 > len(data):
        return data
    start = offset + 30 + sum(struct.unpack_from("<2H", data, offset + 26))
    return data[: at + 16] + struct.pack("<I", zlib.crc32(data[start : start + size])) + data[at + 20 :]


ZIPS = tuple(zip_pieces(members(data), wide) for data in PICKLES[:5] for wide in (False, True))
ZIP = (
    Kind(OPERATIONS, zipped, (operate, operate, scramble), mend_crc),
    Kind(ZIPS, joined, mend=mend_crc),
)


def legacy_pieces(value: bytes, keys: Sequence[str] = ("0", "1")) -> Pieces:
    """A file older than the zips around a pickle of float16 numbers in storage 0, and float32 ones in storage 1."""
    head = [operations(pickled(part)) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    body = (*operations(value), *operations(pickled(list(keys))))
    counts = {"0": struct.pack("<Q", 32), "1": struct.pack("<Q", 4)}
    storages = [piece for key in keys for piece in (counts[key], STORAGES[key])]
    return (*head[0], *head[1], *head[2], *body, *storages)


VIEWED = (
    pickled(TREES[0]).replace(b"K tQ", b"K (X\x01\x00\x00\x00vK\x02K\x1dttQ").replace(b"(K\x04K\x08t", b"(K\x02K\x08t")
)
OLD = (legacy_pieces(STRIDED, "0"), *map(legacy_pieces, (pickled(TREES[0]), pickled(TREES[2]), VIEWED)))
LEGACY = (Kind(OLD, joined, (operate, scramble)),)


# --- safetensors, Hugging Face folders -------------------------------------------------------------------------------

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[\d.]+(?:[eE][-+]?\d+)?|\w+|[^\w"]')
DEEP = b"[" * 3000 + b"]" * 3000
ODD = (
    *(str(number).encode() for number in INTEGERS), b"1" * 5000, b"1e400", b"-1e-400", b"1.5", b"2.0", b"NaN",
    b"Infinity",
    b"null", b"true", b"false", b"[]", b"{}", b"[[]]", b'[0, "a", null]', b'{"a": 1, "a": 2}', DEEP, b'"\\ud800"',
    *(json.dumps(content.decode("latin1")).encode() for content in TEXTS),
    b'"F16"', b'"F8_E4M3"', b'"U8"', b'"I8"', b'"BOOL"', b'"float32"', b'"shape"', b'"dtype"', b'"data_offsets"',
    b'"nf4"',
    b'"one.safetensors"', b'"two.safetensors"', b'"../one.safetensors"', b'"/dev/zero"', b'"config.json"', b'"sub"',
    b'"."',
    b"[8, 8]", b"[0, 0]", b"[8]", b"[1, 64]",
)  # fmt: skip


def tokens(value: Any) -> Pieces:
    return tuple(TOKEN.findall(json.dumps(value).encode()))


def odd_token(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Put another value in the place of one."""
    places = [at for at, piece in enumerate(pieces) if piece[:1] not in b"{}[],: "]
    if places:
        pieces[rng.choice(places)] = rng.choice(ODD)


def odd_entry(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Put another entry into an object or a list."""
    places = [at for at, piece in enumerate(pieces) if piece in (b"{", b"[")]
    if places:
        at = rng.choice(places) + 1
        name = rng.choice([piece for piece in ODD if piece[:1] == b'"'])
        pieces[at:at] = [*([name, b": "] if pieces[at - 1] == b"{" else []), rng.choice(ODD), b", "]


JSON: tuple[Change, ...] = (odd_token,) * 9 + (odd_entry,) * 3


def placed(parts: Sequence[Part], contents: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of tensors, zeros where there are no contents."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for part in parts:
        content = contents.get(part.name, bytes(part.nbytes))
        shape = [len(content)] if part.late or "quant_state" in part.name else list(part.shape)
        places = [len(data), len(data) + len(content)]
        header[part.name] = {"dtype": part.dtype.name, "shape": shape, "data_offsets": places}
        data += content
    return header, data


def with_length(rng: Random, pieces: list[bytes]) -> bytes:
    """The header's length, mostly right; the header; the data, the last piece."""
    *header, data = pieces or [b""]
    head = b"".join(header)
    length = len(head).to_bytes(8, "little") if rng.random() < 0.95 else integer(rng, 8)
    return length + head + data


SIMPLE = [Part("a", F32, (2, 3)), Part("b", F16, (4,)), Part("c", U8, (0,)), Part("d", F16, (2, 2, 2))]
LONE = {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}


def safetensors_pieces(header: dict[str, Any], data: bytes) -> Pieces:
    return (*tokens(header), data)


SAFETENSORS = (Kind((safetensors_pieces(*placed(SIMPLE, {})), safetensors_pieces(LONE, bytes(4))), with_length, JSON),)

CONFIG = ModelConfig(
    layers=1, hidden=8, heads=2, ff=32, rows=8, context=16, rotary_pct=0.5, rotary_base=1e4, norm_eps=1e-5,
    parallel_residual=True, activation="gelu_tanh", tied=False,
)  # fmt: skip
LAYER = "gpt_neox.layers.0."
QUANTIZED = {
    f"{LAYER}attention.query_key_value.": "NF4_DQ", f"{LAYER}attention.dense.": "INT8",
    f"{LAYER}mlp.dense_h_to_4h.": "E4M3_CHANNEL", f"{LAYER}mlp.dense_4h_to_h.": "FP4",
    "gpt_neox.layers.1.mlp.dense_4h_to_h.": "W4A16_G32_ASYM", "gpt_neox.layers.2.mlp.dense_4h_to_h.": "MLX_4BIT_32",
    "gpt_neox.layers.3.mlp.dense_4h_to_h.": "GPTQ",
}  # fmt: skip
ENCODINGS = SCALED | {"GPTQ": gptq.encoding(gptq.Reading(PackedForm(4, 32, False), less_one=True, indexed=True))}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [24, 8]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
OTHER_STATE = {**STATE, "quant_type": "fp4", "shape": [8, 32]}
ONE, TWO, INDEX, SETTINGS = "one.safetensors", "two.safetensors", "model.safetensors.index.json", "config.json"


def unread(start: int, stop: int) -> Any:
    raise AssertionError


def parts_of(name: str, shape: tuple[int, ...]) -> list[Part]:
    """The stored tensors of a weight."""
    module = name.removesuffix("weight")
    if module not in QUANTIZED or module == name:
        return [Part(name, F16, shape)]
    encoding = ENCODINGS[QUANTIZED[module]]
    parts = encoding.parts(LazyTensor(shape, F16, unread, F16))
    return [Part(module + part.name, part.dtype, part.shape, part.late) for part in parts]


@cache
def model() -> dict[str, bytes]:
    """A folder of a quantized model in two shards."""
    return model_with(json.dumps({**STATE, **NESTED}).encode())


def model_with(state: bytes) -> dict[str, bytes]:
    """The folder with other JSON beside its first quantized weight."""
    config = replace(CONFIG, layers=4)
    weights = [
        (weight.unified, tuple(config.sizes[size] for size in weight.shape)) for _, weight in GPT_NEOX.names(config)
    ]
    parts = [part for name, shape in weights for part in parts_of(name, shape)]
    tables = {"weight.quant_map": struct.pack("<16f", *NF4_TABLE), "nested_quant_map": nested_table().tobytes()}
    contents = {part.name: data for part in parts for end, data in tables.items() if part.name.endswith(end)}
    for part in parts:
        if "quant_state" in part.name:
            contents[part.name] = state if part.name.endswith("nf4") else json.dumps(OTHER_STATE).encode()
        if part.name.endswith("weight_shape"):
            contents[part.name] = struct.pack("<2q", *dict(weights)[part.name.removesuffix("_shape")])
    shards = {ONE: parts[:12], TWO: parts[12:]}
    files = {name: with_length(Random(0), list(safetensors_pieces(*placed(shards[name], contents)))) for name in shards}
    places = {part.name: name for name, inside in shards.items() for part in inside}
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    told = {
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "quantization": {"group_size": 32, "bits": 4, "mode": "affine"},
    }
    return {**files, SETTINGS: json.dumps(GPT_NEOX.to_hf(config, "float16") | told).encode()}


def in_folder(name: str) -> Callable[[Random, list[bytes]], bytes]:
    """A finish that says, in a first line, which file of the folder the rest is."""
    finish = with_length if name.endswith(".safetensors") else joined
    return lambda rng, pieces: name.encode() + b"\n" + finish(rng, pieces)


def with_state(rng: Random, pieces: list[bytes]) -> bytes:
    return ONE.encode() + b"\n" + model_with(b"".join(pieces))[ONE]


def shard(name: str) -> Pieces:
    """A shard in pieces."""
    data = model()[name]
    end = 8 + int.from_bytes(data[:8], "little")
    return (*TOKEN.findall(data[8:end]), data[end:])


def json_pieces(name: str) -> Pieces:
    return tuple(TOKEN.findall(model()[name]))


@cache
def hf() -> tuple[Kind, ...]:
    """Changes of one file of a folder."""
    files = [Kind((json_pieces(name),), in_folder(name), JSON) for name in (SETTINGS, INDEX)]
    shards = [Kind((shard(name),), in_folder(name), JSON) for name in (ONE, TWO)]
    states = tuple(tokens(value) for value in ({**STATE, **NESTED}, STATE))
    return (*files, *shards, Kind(states, with_state, JSON))


# --- GGUF and importance matrices ------------------------------------------------------------------------------------


def counted(content: bytes) -> list[bytes]:
    return [struct.pack("<Q", len(content)), content]


def key(name: str, kind: int, *value: bytes) -> list[bytes]:
    return [*counted(name.encode()), struct.pack("<I", kind), *value]


def array(kind: int, items: Sequence[Sequence[bytes]]) -> list[bytes]:
    return [struct.pack("<I", kind), struct.pack("<Q", len(items)), *(piece for item in items for piece in item)]


def described(name: str, extents: Sequence[int], kind: int, offset: int) -> list[bytes]:
    """A tensor in a header."""
    sizes = [struct.pack("<Q", extent) for extent in extents]
    numbers = [struct.pack("<I", kind), struct.pack("<Q", offset)]
    return [*counted(name.encode()), struct.pack("<I", len(extents)), *sizes, *numbers]


def gguf_pieces(keys: Sequence[list[bytes]], tensors: Sequence[list[bytes]], data: bytes) -> Pieces:
    counts = struct.pack("<I", 3), struct.pack("<Q", len(tensors)), struct.pack("<Q", len(keys))
    return (b"GGUF", *counts, *(piece for group in (*keys, *tensors) for piece in group), data)


def padded(rng: Random, pieces: list[bytes]) -> bytes:
    """The header filled up to a multiple of 32, mostly; then the data, the last piece."""
    *header, data = pieces or [b""]
    head = b"".join(header)
    return head + bytes(-len(head) % 32 if rng.random() < 0.9 else 0) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


RICH = gguf_pieces(
    [
        key("general.architecture", 8, *counted(b"gptneox")), key("general.alignment", 4, u32(32)), key("a", 0, b"\1"),
        key("b", 3, b"\xff\xff"), key("c", 6, struct.pack("<f", 1e-5)), key("d", 7, b"\1"), key("e", 10, bytes(8)),
        key("f", 12, bytes(8)), key("text", 9, *array(8, [counted(b"a"), counted("é".encode()), counted(b"")])),
        key("deep", 9, *array(9, [array(4, [[u32(1)], [u32(2)]]), array(9, [array(0, [[b"\1"]])])])),
        key("split.count", 2, b"\0\0"),
    ],
    [described("w", [32, 3], 8, 0), described("v", [5], 0, 128), described("u", [2, 2, 2], 1, 160)],
    bytes(range(176)),
)  # fmt: skip
BLOCKS = gguf_pieces(
    [key("general.architecture", 8, *counted(b"gptneox"))],
    [described(f"t{kind}", [256, 1], kind, 256 * at) for at, kind in enumerate((2, 3, 6, 7, 12, 14, 23))],
    bytes(256 * 7),
)
MATRIX = gguf_pieces(
    [key("general.type", 8, *counted(b"imatrix")), key("imatrix.chunk_count", 4, u32(5))],
    [described("a.in_sum2", [8], 0, 0), described("a.counts", [1], 0, 32)],
    struct.pack("<8f", *range(8)) + struct.pack("<f", 2),
)


def gguf_model() -> Pieces:
    """A whole model of one layer, its weights F32."""
    keys = {name.removeprefix("gptneox."): value for name, value in GPT_NEOX.to_gguf(CONFIG).items()}
    codes = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
    pieces = [key("general.architecture", 8, *counted(b"gptneox"))]
    for name, value in keys.items():
        kind, letter = codes[type(value)]
        pieces.append(key(f"gptneox.{name}", kind, struct.pack("<" + letter, value)))
    tensors, data = [], b""
    for _, weight in GPT_NEOX.names(CONFIG):
        shape = [CONFIG.sizes[size] for size in weight.shape]
        tensors.append(described(weight.gguf, shape[::-1], 0, len(data)))
        data += bytes(4 * math.prod(shape))
    return gguf_pieces(pieces, tensors, data)


GGUF = (Kind((RICH, BLOCKS, MATRIX), padded), Kind((gguf_model(),), padded))


def dat_pieces(entries: dict[str, Sequence[float]]) -> Pieces:
    """An importance matrix of the old form."""
    pieces = [u32(len(entries))]
    for name, values in entries.items():
        numbers = [struct.pack("<f", value) for value in values]
        pieces += [u32(len(name)), name.encode(), u32(7), u32(len(values)), *numbers]
    return (*pieces, u32(5), u32(8), b"text.txt")


DAT = dat_pieces({"blk.0.ffn_up.weight": range(12), "blk.0.ffn_down.weight": [0.5, 1e30, 0, 1e-40]})
IMATRIX = (Kind((DAT, dat_pieces({"a": [1]})), joined), Kind((MATRIX,), padded))

# --- CTranslate2 -----------------------------------------------------------------------------------------------------


def text16(text: str) -> list[bytes]:
    data = text.encode() + b"\0"
    return [struct.pack("<H", len(data)), data]


def variable(name: str, sizes: Sequence[int], kind: int, data: bytes) -> list[bytes]:
    shape = [bytes([len(sizes)]), *map(u32, sizes)]
    return [*text16(name), *shape, bytes([kind]), u32(len(data)), data]


def ctranslate2_pieces(variables: Sequence[list[bytes]], aliases: Sequence[list[bytes]]) -> Pieces:
    head = [u32(6), *text16("TransformerDecoderSpec"), u32(8), u32(len(variables))]
    return (*head, *(piece for each in variables for piece in each), u32(len(aliases)), *chain.from_iterable(aliases))


def ctranslate2_model() -> Pieces:
    """A whole model of one layer: its matrices in 8 bits but one in F16, the rest F32."""
    scalars = scalars_of("gpt_neox", CONFIG)
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3}
    variables = [variable(name, (), kinds[value.dtype.name], value.tobytes()) for name, value in scalars.items()]
    sizes = {weight.unified: [CONFIG.sizes[size] for size in weight.shape] for _, weight in GPT_NEOX.names(CONFIG)}
    for row in rows_of("gpt_neox", CONFIG):
        shape = sizes[row.parts[0]]
        if len(shape) == 1 or "linear_1" in row.name:
            kind, width = (0, 4) if len(shape) == 1 else (4, 2)
            variables.append(variable(row.name, shape, kind, bytes(width * math.prod(shape))))
            continue
        variables.append(variable(row.name, shape, 1, bytes(math.prod(shape))))
        variables.append(variable(f"{row.name}_scale", shape[:1], 0, struct.pack("<f", 1) * shape[0]))
    return ctranslate2_pieces(variables, ())


FEW = ctranslate2_pieces(
    [variable("a", (2, 3), 4, bytes(12)), variable("b", (), 2, b"\1\0"), variable("c", (1, 1, 1, 1), 5, bytes(2))],
    [[*text16("d"), *text16("a")], [*text16("e/weight"), *text16("c")]],
)
CTRANSLATE2 = (Kind((ctranslate2_model(), FEW), joined),)

# --- settings of gpt-neox, manifests ---------------------------------------------------------------------------------

YAML_TOKEN = re.compile(rb'"[^"]*"|[\w./+-]+|\n *|[^\w"\n]')
SETTING = """# a comment
{
  "num-layers": 2, "hidden_size": 16, "num-attention-heads": 2,
  "max-position-embeddings": 128, "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25,
  "no-weight-tying": true, "attention-config": [[["flash"], 2]], "soft_prompt_tuning": {"enabled": false},
}
"""
BLOCK_SETTING = """%YAML 1.1
---
num_layers: &n 2
hidden-size: !!int "16"
num-attention-heads: *n
layernorm-epsilon: 1e-5
pos_emb: rotary
other: {<<: {a: 1}, b: [x, ~, 0x1F, 1:30, 2001-01-01, .inf]}
text: |
  lines
  more
? key
: - !!set {a, b}
  - >-
    folded
...
"""
YAML_ODD = (
    b"*n", b"&n", b"*a", b"&a [*a]", b"<<: *n", b"!!python/object/apply:os.system [true]", b"!!binary x", b"!!omap",
    b"!!timestamp 1", b"!!float x", b"!!int 9z", b"!!null", b"!!set", b"!<tag:yaml.org,2002:python/name:os.system>",
    b"=",
    b"%TAG ! tag:x:", b"---", b"...", b"? ", b": ", b"- ", b"[", b"{", b"]", b"}", b"\t", b"|9", b">+",
    b"0x" + b"f" * 2900,
    b"0b1", b"0o7", b"1:1:1:1", b"190:20:30.15", b"9" * 5000, b".nan", b"1_000", b"2001-99-99", b"2001-01-01 25:61:61",
    b"\xef\xbb\xbf", b"\0", b"[" * 400, b"- " * 400, b"'", b'"\\ud800"', b'"\\U00110000"', b'"\\x"',
    "\u2028\u0085".encode(),
    b"!" + b"a" * 2000, b"[[1]]: 1", b"? [a] : b", b"{{}: 1}",
)  # fmt: skip


def odd_yaml(rng: Random, pieces: list[bytes], seeds: Sequence[Pieces]) -> None:
    """Put something else of YAML's in, or in the place of a token."""
    at = rng.randint(0, len(pieces))
    pieces[at : at + rng.getrandbits(1)] = [rng.choice((*YAML_ODD, *ODD[-40:])), *rng.choice(((), (b" ",), (b"\n",)))]


def sized(number: int, *inner: bytes) -> Pieces:
    """A field of sentencepiece's file that holds others; all shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(b"".join(inner))]), *inner


def piece(text: bytes, score: float, kind: int) -> Pieces:
    return sized(1, *sized(1, text), b"\x15" + struct.pack("<f", score), bytes([3 << 3, kind]))


SPIECE_TOKENS = *piece(b"<unk>", 0, 2), *piece(b"</s>", 0, 3), *piece("▁a".encode(), -1.5, 1)
MAP = struct.pack("<I3I", 12, 1 << 10, 0x100, 7) + b" \0"
SPIECE_SETTINGS = *sized(2, b"\x18\1", b"\x98\2\1", *sized(5, b"<s>")), *sized(3, *sized(2, MAP), b"\x18\0", b"\x20\1")
SPIECE = (Kind((SPIECE_TOKENS + piece(b"<0x41>", 0, 6) + SPIECE_SETTINGS, SPIECE_TOKENS), joined),)

YAML = (
    Kind(tuple(tuple(YAML_TOKEN.findall(text.encode())) for text in (SETTING, BLOCK_SETTING)), joined, (odd_yaml,) * 8),
)

ENTRIES = [
    {"name": "", "offset": 0, "bytes": 3, "sha256": "0" * 64},
    {"name": "t", "offset": 3, "bytes": 5, "sha256": ""},
]
LISTED = {"norms": "mean", "files": [{"name": "weights.bin", "bytes": 8, "sha256": "", "ranges": ENTRIES}]}
MANIFEST = (Kind((tokens(LISTED),), joined, JSON),)


KINDS_OF: dict[str, Callable[[], Sequence[Kind]]] = {
    "zip": lambda: ZIP,
    "legacy": lambda: LEGACY,
    "pickle": lambda: PICKLE,
    "safetensors": lambda: SAFETENSORS,
    "gguf": lambda: GGUF,
    "ctranslate2": lambda: CTRANSLATE2,
    "imatrix": lambda: IMATRIX,
    "sentencepiece": lambda: SPIECE,
    "hf": hf,
    "yaml": lambda: YAML,
    "manifest": lambda: MANIFEST,
}


def seeds(name: str) -> list[bytes]:
    """The files from which a parser's inputs are made, whole."""
    return [kind.finish(Random(0), list(pieces)) for kind in KINDS_OF[name]() for pieces in kind.seeds]


def nth_input(name: str, seed: int, number: int) -> bytes:
    """The input of a number, the same on every machine."""
    return make_input(Random(f"{name}/{seed}/{number}"), KINDS_OF[name]())

"""GGUF: read as gguf's reader reads, written byte for byte as its writer writes, anything malformed named."""

from __future__ import annotations

import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neoxconv.core.encoding import Encoding, copied
from neoxconv.core.layout import Entry, FileLayout
from neoxconv.core.model import Index
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, PLAIN, Array, DType, narrow, widen
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.gguf.read import MAX_ITEMS, TYPES, index
from neoxconv.formats.gguf.write import layout
from tests.fixtures import fixture
from tests.oracles import llama_logits

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")

READABLE = [kind for kind in gguf.GGMLQuantizationType if kind in quants._type_traits or kind.name in PLAIN]
QUANTIZED = ("Q2_K", "Q4_0", "Q4_K_M", "Q8_0")


def random_rows(dtype: DType, rows: int = 3, columns: int = 512) -> Array:
    """Rows of random bits as `dtype` stores them."""
    return np.random.default_rng(0).integers(0, 256, (rows, dtype.size(columns)), np.uint8)


def encoding(dtype: DType) -> Encoding:
    """What a layout needs of an encoding, with gguf's quantizers."""

    def encode(rows: Array) -> Array:
        if dtype.block == 1:
            return narrow(rows, dtype)
        return np.asarray(quants.quantize(rows, gguf.GGMLQuantizationType[dtype.name]))

    return replace(copied(dtype), encode=encode, decode=lambda stored: widen(stored, dtype))


def entry(name: str, tensor: LazyTensor, dtype: DType | None = None) -> Entry:
    return Entry(name, name, tensor, encoding(dtype or tensor.dtype))


def matrix(rows: Array) -> LazyTensor:
    """A tensor of float32 in memory."""
    return LazyTensor(rows.shape, F32, lambda start, stop: rows[start:stop], F32)


def materialise(files: Sequence[FileLayout], folder: Path) -> list[Path]:
    """Write files as their layouts say."""
    folder.mkdir(exist_ok=True)
    for file in files:
        data = bytearray(file.size)
        ranges = [*file.pieces, *((slot.offset, stored_bytes(slot.entry)) for slot in file.slots)]
        for offset, piece in ranges:
            assert offset + len(piece) <= file.size and not any(data[offset : offset + len(piece)])
            data[offset : offset + len(piece)] = piece
        (folder / file.name).write_bytes(data)
    return [folder / file.name for file in files]


def stored_bytes(item: Entry) -> bytes:
    tensor = item.tensor
    rows = tensor.read(0, tensor.rows)
    data = rows if tensor.dtype == item.encoding.dtype else item.encoding.encode(widen(rows, tensor.dtype))
    assert data.nbytes == item.nbytes
    return data.tobytes()


def from_writer(path: Path, keys: Mapping[str, Any], entries: Sequence[Entry], split_size: int = 0) -> list[Path]:
    """The same file or files by gguf's own writer."""
    writer = gguf.GGUFWriter(path, keys["general.architecture"], split_max_size=split_size)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        if key != "general.architecture":
            adders.get(type(value), writer.add_array)(key, value)
    for item in entries:
        kind = gguf.GGMLQuantizationType[item.encoding.name]
        rows = np.frombuffer(stored_bytes(item), np.uint8).reshape(*item.tensor.shape[:-1], -1)
        writer.add_tensor(item.name, rows, raw_dtype=kind)
    return write(writer)


def write(writer: Any) -> list[Path]:
    writer.write_header_to_file()
    paths = [Path(file.name) for file in writer.fout]
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return paths


def assert_equal_to_reader(found: Index, path: Path) -> None:
    """Keys, names, shapes, types and bytes of an index are those that gguf's reader finds."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found.settings == keys
    [tensors] = found.ranks
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        tensor = tensors[expected.name]
        assert (tensor.shape, tensor.dtype.name) == (tuple(expected.shape[::-1].tolist()), expected.tensor_type.name)
        assert tensor.nbytes == expected.n_bytes
        middle = tensor.rows // 2
        assert tensor.read(0, middle).tobytes() + tensor.read(middle, tensor.rows).tobytes() == expected.data.tobytes()


def quantized(name: str) -> Path:
    return fixture(f"trained_tp2_pp4/llama_quantize/{name}.gguf")


# --- files made by hand -----------------------------------------------------------------------------------------------


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data) if length is None else length) + data


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    return u32(kind) + u64(len(items) if count is None else count) + b"".join(items)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: str | bytes, extents: Sequence[int], kind: int, offset: int) -> bytes:
    return string(name) + u32(len(extents)) + b"".join(map(u64, extents)) + u32(kind) + u64(offset)


def made(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file from its parts; `counts` of tensors and keys may lie."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = b"".join([b"GGUF", u32(version), u64(tensor_count), u64(key_count), *keys, *tensors])
    return header + bytes(-len(header) % 32) + data


def placed(folder: Path, data: bytes, name: str = "x.gguf") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def nested(depth: int) -> bytes:
    return array(4, [u32(1)]) if depth == 0 else array(9, [nested(depth - 1)])


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_table_of_types_is_that_of_gguf() -> None:
    newer = {41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18)}  # ggml.h has them, gguf not yet
    expected = newer | {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in READABLE}
    assert {number: (dtype.name, dtype.block, dtype.nbytes) for number, dtype in TYPES.items()} == expected


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_every_type_of_tensor_and_key_is_read_as_gguf_reads_it(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    writer.add_custom_alignment(alignment)
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Ġé\n\0")
    for name, values in {"bools": [True, False], "wholes": [-1, 2], "floats": [0.5, 1.5], "texts": ["", "ä"]}.items():
        writer.add_array(name, values)
    writer.add_key_value("halves", [1, 2, 3], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT16)
    for kind in READABLE:
        writer.add_tensor(kind.name, random_rows(TYPES[kind.value]), raw_dtype=kind)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("cube", np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    [path] = write(writer)
    assert_equal_to_reader(index(path), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_files_of_llama_quantize_are_read_as_gguf_reads_them(name: str) -> None:
    assert_equal_to_reader(index(quantized(name)), quantized(name))


def test_version_2_is_read_and_the_order_of_tensors_is_free(tmp_path: Path) -> None:
    data = made([key("a", 4, u32(7))], [tensor("x", [4], 0, 32), tensor("y", [4], 0, 0)], bytes(48), version=2)
    found = index(placed(tmp_path, data))
    assert found.settings == {"a": 7} and list(found.ranks[0]) == ["x", "y"]


def test_nested_arrays_become_nested_lists(tmp_path: Path) -> None:
    data = made([key("a", 9, array(9, [array(4, [u32(1), u32(2)]), array(8, [string("x")])]))])
    assert index(placed(tmp_path, data)).settings == {"a": [[1, 2], ["x"]]}


NATIVES = {
    "half": ("F16 F16 F16 F32", "F16"),
    "bfloat": ("BF16", "BF16"),
    "blocks": ("Q4_0", "F16"),
    "blocks and a float head": ("Q8_0 Q8_0 Q8_0 Q8_0 F32", "F16"),
    "most bytes, not most numbers": ("Q4_0 Q4_0 BF16", "BF16"),
    "float": ("F32 I8", "F32"),
    "vectors alone": ("", "F16"),
}


@pytest.mark.parametrize("case", NATIVES)
def test_vectors_take_the_native_type_of_the_matrices(case: str, tmp_path: Path) -> None:
    kinds, common = NATIVES[case]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    writer.add_tensor("vector", np.ones(3, np.float32))
    writer.add_tensor("ids", np.ones(3, np.int32))
    for i, kind in enumerate(kinds.split()):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(str(i), random_rows(TYPES[number.value]), raw_dtype=number)
    [tensors] = index(write(writer)[0]).ranks
    own = [kind if kind in PLAIN else "F16" for kind in kinds.split()]
    assert [tensor.native.name for tensor in tensors.values()] == [common, "I32", *own]


# --- writing ---------------------------------------------------------------------------------------------------------


def rewritten(source: Index) -> tuple[dict[str, Any], list[Entry]]:
    """The keys and tensors of an index, on their way into another file."""
    return source.settings, [entry(name, tensor) for name, tensor in source.ranks[0].items()]


def in_written_order(keys: Mapping[str, Any]) -> dict[str, Any]:
    general = {key: value for key, value in keys.items() if key.startswith("general.")}
    words = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    return {**general, **{key: value for key, value in keys.items() if key not in {**general, **words}}, **words}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_file_of_llama_quantize_survives_with_every_key_and_type(name: str, tmp_path: Path) -> None:
    keys, entries = rewritten(index(quantized(name)))
    [path] = materialise(layout("x", keys, entries, None), tmp_path)
    ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(quantized(name))
    assert {key: field.types for key, field in ours.fields.items()} == {k: f.types for k, f in theirs.fields.items()}
    assert {key: field.contents() for key, field in ours.fields.items()} == {
        key: field.contents() for key, field in theirs.fields.items()
    }
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type, mine.shape.tolist()) == (
            other.name,
            other.tensor_type,
            other.shape.tolist(),
        )
        assert mine.data.tobytes() == other.data.tobytes()
    assert path.stat().st_size == quantized(name).stat().st_size


@pytest.mark.parametrize("split_size", [None, 1_500_000, 1])
def test_bytes_are_those_of_ggufs_writer(split_size: int | None, tmp_path: Path) -> None:
    keys, entries = rewritten(index(quantized("Q4_K_M")))
    ours = materialise(layout("x", keys, entries, split_size), tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    theirs = from_writer(tmp_path / "theirs" / "x.gguf", in_written_order(keys), entries, split_size or 0)
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.read_bytes() == other.read_bytes(), mine.name


def test_tensors_that_end_between_alignments_lie_as_ggufs_writer_lays_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = {"F32": (3, 5), "F16": (7, 3), "BF16": (1, 1), "Q8_0": (3, 96), "Q4_0": (5, 32), "Q5_1": (1, 64)}
    dtypes = {dtype.name: dtype for dtype in TYPES.values()}
    entries = [
        entry(kind, matrix(random.standard_normal(shape).astype(np.float32)), dtypes[kind])
        for kind, shape in sizes.items()
    ]
    entries.append(entry("cube", matrix(random.standard_normal((2, 3, 5)).astype(np.float32))))
    entries.append(entry("vector", matrix(random.standard_normal(9).astype(np.float32))))
    keys = {"general.architecture": "test", "a.whole": [1, -2], "a.text": "ä", "a.floats": [1.5], "a.yes": [True]}
    for split_size in (None, 150):
        ours = materialise(layout("x", keys, entries, split_size), tmp_path / "ours")
        theirs = from_writer(tmp_path / "x.gguf", keys, entries, split_size or 0)
        assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_keys_come_in_sections_and_the_sources_alignment_is_dropped(tmp_path: Path) -> None:
    keys = {"tokenizer.b": 1, "gptneox.c": 2, "general.alignment": 64, "general.z": 3, "general.a": 4}
    [path] = materialise(layout("x", keys, [], None), tmp_path)
    assert list(index(path).settings) == ["general.z", "general.a", "gptneox.c", "tokenizer.b"]


ROUND_TRIPS: dict[str, Any] = {
    "u32": 2**32 - 1, "i32": -1, "u64": 2**64 - 1, "i64": -(2**63), "bool": False, "f32": 0.5, "str": "",
    "wholes": [0, -1], "large": [0, 2**32 - 1], "larger": [2**64 - 1], "strings": ["", "é"], "bools": [True],
    "empty": [], "nested": [[1], [2, 3], []], "mixed depths": [["a"], [1.5]],
}  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_values_survive(case: str, tmp_path: Path) -> None:
    [path] = materialise(layout("x", {"k": ROUND_TRIPS[case]}, [], None), tmp_path)
    found = index(path).settings["k"]
    assert found == ROUND_TRIPS[case] and type(found) is type(ROUND_TRIPS[case])


@pytest.mark.parametrize(
    "value", [None, {"a": 1}, 2**64, -(2**63) - 1, 1e300, "\ud800", ["a", "\udc80"], [1, 2.5], [True, 1], [None]]
)
def test_values_that_gguf_cannot_hold_are_refused(value: Any) -> None:
    with pytest.raises(PlanError, match=r"some\.key"):
        layout("x", {"some.key": value}, [], None)


def test_tensors_that_gguf_cannot_hold_are_refused() -> None:
    ones = np.ones((2, 48), np.float32)
    plain = entry("a.weight", matrix(ones))
    unknown = replace(plain, encoding=replace(plain.encoding, name="NF4"))
    scalar = entry("a.weight", matrix(np.ones((), np.float32)))
    for item in (
        unknown,
        entry("a.weight", matrix(ones), TYPES[8]),
        entry("a.weight", matrix(ones[0]), TYPES[8]),
        scalar,
    ):
        with pytest.raises(PlanError, match=r"a\.weight: GGUF cannot hold shape"):
            layout("x", {}, [item], None)


def test_more_parts_than_can_be_counted_are_refused() -> None:
    item = entry("a", matrix(np.ones(1, np.float32)))
    with pytest.raises(PlanError, match="65536 files"):
        layout("x", {}, [item] * 65536, 1)


# --- split files -----------------------------------------------------------------------------------------------------


def parts(folder: Path, count: int = 3) -> list[Path]:
    """A model of `count` vectors, each in a part of its own."""
    entries = [entry(f"t{i}", matrix(np.full(3, i, np.float32))) for i in range(count)]
    return materialise(layout("m", {"general.architecture": "test", "a.b": 1}, entries, 1), folder)


def test_any_part_opens_all(tmp_path: Path) -> None:
    files = parts(tmp_path)
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for file in files:
        found = index(file)
        assert [source.storage.path for source in found.files] == files
        assert found.settings == {"general.architecture": "test", "a.b": 1}
        assert {name: tensor.read(0, 3).tolist() for name, tensor in found.ranks[0].items()} == {
            f"t{i}": [i] * 3 for i in range(3)
        }


def swap(files: list[Path]) -> None:
    shutil.move(files[1], files[1].with_name("aside"))
    shutil.move(files[2], files[1])
    shutil.move(files[1].with_name("aside"), files[2])


def from_another(files: list[Path]) -> None:
    shutil.copy(parts(files[0].parent / "other", 4)[1], files[1])


def patched(old: bytes, new: bytes) -> Callable[[list[Path]], object]:
    """The second part with other bytes in one place."""

    def damage(files: list[Path]) -> None:
        data = files[1].read_bytes()
        assert data.count(old) == 1
        files[1].write_bytes(data.replace(old, new))

    return damage


BAD_PARTS: dict[str, tuple[Callable[[list[Path]], object], tuple[str, ...]]] = {
    "missing": (lambda files: files[1].unlink(), ("m-00002-of-00003.gguf: is missing",)),
    "swapped": (swap, ("m-00002-of-00003.gguf: split.no is 2, expected 1", "m-00003-of-00003.gguf: split.no is 1")),
    "of another model": (from_another, ("m-00002-of-00003.gguf: split.count is 4, expected 3",)),
    "not a part": (lambda files: files[1].write_bytes(made()), ("m-00002-of-00003.gguf: split.count is None",)),
    "tensor count": (
        patched(key("split.tensors.count", 5, u32(3)), key("split.tensors.count", 5, u32(9))),
        ("m-00002-of-00003.gguf: split.tensors.count is 9, expected 3",),
    ),
    "a tensor twice": (patched(string("t1"), string("t0")), ("m-00002-of-00003.gguf: holds 't0', as m-00001",)),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_belong_together_are_named(case: str, tmp_path: Path) -> None:
    damage, expected = BAD_PARTS[case]
    files = parts(tmp_path)
    damage(files)
    with pytest.raises(CheckpointError) as caught:
        index(files[0])
    assert all(words in str(caught.value) for words in expected), caught.value


@pytest.mark.parametrize("name", ["m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-00000.gguf"])
def test_impossible_part_numbers_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is named part"):
        index(placed(tmp_path, made(), name))


def test_a_part_under_another_name_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    renamed = parts(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf: split\.count is 3, expected 1"):
        index(renamed)


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_model_is_whole(count: int, tmp_path: Path) -> None:
    keys = [key("split.no", 2, bytes(2)), key("split.count", 2, struct.pack("<H", count)), key("a", 4, u32(1))]
    assert index(placed(tmp_path, made(keys))).settings == {"a": 1}


@pytest.mark.oracle
def test_llama_cpp_computes_the_same_from_parts(tmp_path: Path) -> None:
    source = quantized("Q8_0")
    files = materialise(layout("x", *rewritten(index(source)), 3_000_000), tmp_path)
    assert len(files) > 2
    tokens = np.load(fixture("trained_tp2_pp4/reference/tokens.npy"))[:1, :32]
    assert np.array_equal(llama_logits(files[0], tokens), llama_logits(source, tokens))


# --- bad input -------------------------------------------------------------------------------------------------------


ONE = tensor("w", [4, 2], 0, 0)  # 32 bytes
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "another file": (b"PK\x03\x04" * 20, "is not a GGUF file"),
    "magic alone": (b"GGUF", "the header: claims bytes 4 to 8 of 4"),
    "version 1": (made(version=1), "is GGUF version 1; expected little-endian, version 2 or 3"),
    "version 4": (made(version=4), "is GGUF version 4"),
    "big-endian": (made(version=3 << 24), "is GGUF big-endian, version 3; expected little-endian"),
    "many keys": (made(counts=(0, 2**63)), "the header: claims 9223372036854775808"),
    "many tensors": (made(counts=(2**64 - 1, 0)), "the header: claims 18446744073709551615"),
    "a key too few": (made([key("a", 4, u32(1))], counts=(0, 2)), "the name of key 1: is empty"),
    "a tensor too few": (made((), [ONE], bytes(256), counts=(2, 0)), "the name of tensor 1: is empty"),
    "a name beyond the file": (made([string("general.name", 2**40) + bytes(64)]), "the name of key 0: claims"),
    "a text beyond the file": (made([key("a.b", 8, string("x", 2**62))]), "key 'a.b': claims"),
    "an array beyond the file": (made([key("a.b", 9, array(8, [], 2**61))]), "key 'a.b': claims"),
    "an array of bytes beyond the file": (made([key("a.b", 9, array(0, [], 1000))]), "key 'a.b': claims 1000"),
    "a type of value": (made([key("a.b", 13, bytes(8))]), "key 'a.b': has a value of type 13, expected 0 to 12"),
    "a type of item": (made([key("a.b", 9, array(99, []))]), "key 'a.b': has a value of type 99"),
    "deep arrays": (made([key("a.b", 9, nested(4))]), "key 'a.b': has arrays in arrays, more than 4 deep"),
    "a key that is no text": (made([key(b"a\xff", 4, u32(1))]), "the name of key 0: is not UTF-8"),
    "a value that is no text": (made([key("a.b", 8, string(b"\xc3"))]), "key 'a.b': is not UTF-8"),
    "an item that is no text": (made([key("a.b", 9, array(8, [string(b"\xed\xa0\x80")]))]), "key 'a.b': is not UTF-8"),
    "a key twice": (made([key("a.b", 4, u32(1)), key("a.b", 7, b"\1")]), "key 'a.b': is there twice"),
    "a tensor twice": (made((), [ONE, tensor("w", [4], 0, 32)], bytes(64)), "tensor 'w': is there twice"),
    "a tensor that is no text": (made((), [tensor(b"\xff", [4], 0, 0)]), "the name of tensor 0: is not UTF-8"),
    "no dimension": (made((), [tensor("w", [], 0, 0)], bytes(32)), "tensor 'w': has 0 dimensions, expected 1 to 4"),
    "five dimensions": (made((), [tensor("w", [1] * 5, 0, 0)], bytes(32)), "tensor 'w': has 5 dimensions"),
    "many dimensions": (made((), [string("w") + u32(2**32 - 1)], bytes(99)), "tensor 'w': has 4294967295 dimensions"),
    "no numbers": (made((), [tensor("w", [0, 4], 0, 0)], bytes(32)), r"tensor 'w': has shape \[4, 0\]"),
    "huge": (made((), [tensor("w", [2**63, 2**63], 0, 0)], bytes(32)), "tensor 'w': ends at byte"),
    "wraps to nothing": (made((), [tensor("w", [2**32] * 4, 1, 0)], bytes(32)), "tensor 'w': ends at byte"),
    "broken blocks": (made((), [tensor("w", [48, 2], 8, 0)], bytes(128)), "expected rows of a multiple of 32 weights"),
    "a vector of blocks": (made((), [tensor("w", [32], 8, 0)], bytes(64)), "expected rows of a multiple of 32 weights"),
    "a removed type": (made((), [tensor("w", [32, 1], 4, 0)], bytes(64)), "tensor 'w' is of ggml type 4, which cannot"),
    "a type to come": (made((), [tensor("w", [32, 1], 1000, 0)], bytes(64)), "tensor 'w' is of ggml type 1000"),
    "not aligned": (made((), [tensor("w", [4, 2], 0, 16)], bytes(64)), "tensor 'w': begins at 16, no multiple of 32"),
    "overlapping": (made((), [ONE, tensor("v", [9], 0, 0)], bytes(64)), "tensor 'v': begins at 0, inside of 'w'"),
    "cut short": (made((), [ONE], bytes(31)), "tensor 'w': ends at byte"),
    "an offset far away": (made((), [tensor("w", [4], 0, 2**63)], bytes(32)), "tensor 'w': ends at byte"),
}  # fmt: skip


ALIGNMENTS = ((4, u32(0)), (4, u32(24)), (4, u32(1 << 31)), (7, b"\1"), (8, string("32")), (5, u32(2**32 - 32)))
BAD |= {
    f"alignment {kind} {value!r}": (
        made([key("general.alignment", kind, value)]),
        "general.alignment is .* power of two",
    )
    for kind, value in ALIGNMENTS
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_file_and_key_or_tensor(case: str, tmp_path: Path) -> None:
    data, words = BAD[case]
    path = placed(tmp_path, data)
    with pytest.raises(CheckpointError, match=words) as caught:
        index(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < len(str(path)) + 300


def rich() -> bytes:
    """A small file with every kind of value and several tensors."""
    values = [key(f"k{kind}", kind, bytes(size)) for kind, size in ((0, 1), (2, 2), (6, 4), (7, 1), (10, 8), (12, 8))]
    texts = array(8, [string("a"), string("é"), string("")])
    values += [key("text", 8, string("words")), key("texts", 9, texts), key("deep", 9, nested(2))]
    values += [key("general.alignment", 4, u32(32)), key("split.count", 2, bytes(2))]
    tensors = [tensor("w", [32, 3], 8, 0), tensor("v", [5], 0, 128), tensor("u", [2, 2, 2], 1, 160)]
    return made(values, tensors, bytes(range(176)))


def read_all(path: Path) -> None:
    """Open a file and read every tensor in it."""
    found = index(path)
    for each in found.ranks[0].values():
        assert each.read(0, each.rows).nbytes == each.nbytes


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = rich()
    read_all(placed(tmp_path, whole))
    for length in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            index(placed(tmp_path, whole[:length]))


@settings(max_examples=300)  # tests/fuzz.py does many more
@given(st.lists(st.tuples(st.integers(0, len(rich()) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(folder: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(rich())
    for position, value in changes:
        data[position] = value
    try:
        read_all(placed(folder, bytes(data)))
    except CheckpointError as error:
        assert "x.gguf" in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


GIANT = 8 << 30
LIES = {
    "a text": key("k", 8, u64(GIANT // 2)),
    "a name": u64(GIANT // 2),
    "bytes": key("k", 9, array(0, [], GIANT // 2)),
    "texts": key("k", 9, array(8, [], GIANT // 16)),
    "arrays": key("k", 9, array(9, [], GIANT // 32)),
    "items over many arrays": key("k", 9, array(9, [array(0, [bytes(MAX_ITEMS // 2)], MAX_ITEMS // 2)] * 3)),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lie_that_the_files_size_allows_takes_little_memory(case: str, tmp_path: Path) -> None:
    path = placed(tmp_path, made([LIES[case]]))
    with open(path, "r+b") as file:
        file.truncate(GIANT)  # a hole of zeros
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            index(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_header_of_20b_opens_at_once(tmp_path: Path) -> None:
    tokens = [f"Ġtoken{i}" for i in range(50432)]
    keys = {
        "general.architecture": "gptneox",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [f"Ġ {token}" for token in tokens[:50009]],
    }
    entries = [entry(f"blk.{i}.weight", matrix(np.ones((1, 1), np.float32))) for i in range(532)]
    [path] = materialise(layout("x", keys, entries, None), tmp_path)
    start = time.process_time()
    found = index(path)
    assert time.process_time() - start < 5  # 0.2 s; what grows with the square of the tokens takes minutes
    assert found.settings == keys and len(found.ranks[0]) == 532

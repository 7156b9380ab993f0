"""Safetensors: read as the safetensors library reads them, written so that it reads them, lies refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file

from neoxconv.core.layout import Entry
from neoxconv.dtypes import BF16, F16, F32, DType
from neoxconv.errors import CheckpointError
from neoxconv.formats import safetensors
from neoxconv.storage import open_storage
from tests.fixtures import fixture
from tests.tensor_files import OFFICIAL, TORCH, assert_same, entry, write

SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path) -> safetensors.Header:
    return safetensors.read_header(open_storage(path))


# --- what the library writes -----------------------------------------------------------------------------------------

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip
SHAPES = ((), (0,), (7,), (3, 0), (5, 4), (2, 3, 4))
SAVED = {f"{dtype}.{shape}": torch.full(shape, 3).cumsum(-1).to(dtype) if shape else torch.tensor(1).to(dtype)
         for dtype in TYPES for shape in SHAPES}  # fmt: skip


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(SAVED, tmp_path / "x.safetensors", {"format": "pt", "ключ": "значение"})
    header = read(tmp_path / "x.safetensors")
    assert_same(header.tensors, SAVED)
    assert header.metadata == {"format": "pt", "ключ": "значение"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_real_file_is_read_as_the_library_reads_it(name: str) -> None:
    path = fixture(f"{name}/hf_official_converter/model.safetensors")
    assert_same(read(path).tensors, load_file(path))


def test_the_checksum_tells_headers_apart(tmp_path: Path) -> None:
    sums = set()
    for name in ("a", "b", "a"):
        save_file({name: torch.zeros(3)}, tmp_path / "x.safetensors")
        sums.add(read(tmp_path / "x.safetensors").checksum)
    assert len(sums) == 2


# --- what we write ---------------------------------------------------------------------------------------------------

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), unique=True, max_size=6)
SHAPE = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(NAMES, st.data(), st.dictionaries(st.text(max_size=3, alphabet='aé"'), st.text(max_size=5, alphabet='b"\\☃')))
@SETTINGS
def test_the_library_reads_what_we_write(
    tmp_path: Path, names: list[str], data: st.DataObject, metadata: dict[str, str]
) -> None:
    random = np.random.default_rng(0)
    values = {name: np.asarray(random.standard_normal(data.draw(SHAPE)), np.float32) for name in names}
    types = {name: data.draw(st.sampled_from(list(TORCH))) for name in names}
    file = safetensors.layout("x.safetensors", [entry(n, v, types[n]) for n, v in values.items()], metadata)
    path = write(tmp_path, file)
    expected = {name: torch.from_numpy(value).to(TORCH[types[name]]) for name, value in values.items()}
    assert_same(read(path).tensors, expected)
    theirs = load_file(path)
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    with safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata == read(path).metadata
    assert all(slot.offset % slot.entry.encoding.dtype.nbytes == 0 for slot in file.slots)
    assert len(file.pieces[0][1]) % safetensors.ALIGNMENT == 0


def entries(types: Sequence[DType]) -> list[Entry]:
    return [entry(f"t{i}", np.full((i + 1, 3), i, np.float32), dtype) for i, dtype in enumerate(types)]


def test_tensors_of_one_type_keep_their_order_and_wider_ones_come_first() -> None:
    def order(*types: DType) -> list[str]:
        return [slot.entry.name for slot in safetensors.layout("x", entries(types), {}).slots]

    assert order(F16, F16, F16) == ["t0", "t1", "t2"]
    assert order(F16, F32, BF16, F32) == ["t1", "t3", "t0", "t2"]


def test_a_layout_depends_on_nothing_but_its_arguments() -> None:
    first, second = (safetensors.layout("x", entries([F32, F16]), {"b": "1", "a": "2"}) for _ in range(2))
    assert first.pieces == second.pieces and first.size == second.size
    assert first.pieces[0][1][8:].startswith(b'{"__metadata__":{"b":"1","a":"2"},"t0":{"dtype":"F32","shape":[1,3],')


# --- lies ------------------------------------------------------------------------------------------------------------


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file(header: Any, data: bytes = b"12345678", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = json.dumps({"a": tensor()})
TWICE = GOOD[:-1] + ", " + GOOD[1:]
DEEP = 100_000
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cut short"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "cut short"),
    "length beyond the file": (file({"a": tensor()}, length=10_000), "claims 10000 bytes"),
    "length of 2^64 - 1": (file({}, length=2**64 - 1), f"claims {2**64 - 1} bytes"),
    "length zero": (file(b"", length=0), "claims 0 bytes"),
    "cut data": (file({"a": tensor()}, b"1234"), "end at byte"),
    "trailing data": (file({"a": tensor()}, b"123456789"), "end at byte"),
    "no JSON": (file(b"<html>404 not found</html>"), "its header is not JSON"),
    "no UTF-8": (file(GOOD.replace("a", "\xff", 1).encode("latin-1")), "can't decode byte 0xff"),
    "UTF-16": (file(GOOD.encode("utf-16")), "can't decode"),
    "UTF-32": (file(GOOD.encode("utf-32-le")), "not JSON"),
    "byte order mark": (file(b"\xef\xbb\xbf" + GOOD.encode()), "BOM"),
    "lone surrogate": (file(GOOD.replace("a", "\\ud800", 1).encode()), "surrogates"),
    "name twice": (file(TWICE.encode()), "'a' stands in it twice"),
    "field twice": (file(GOOD.replace('"shape"', '"dtype": "F32", "shape"').encode()), "'dtype' stands in it twice"),
    "list": (file([]), "is a list"),
    "deep lists": (file(b"[" * DEEP + b"]" * DEEP), "its header is not JSON"),
    "deep objects": (file(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "its header is not JSON"),
    "endless number": (file(GOOD.replace("8", "8" * 9999).encode()), "its header is not JSON"),
    "metadata that is no text": (file({"__metadata__": {"a": 1}, "a": tensor()}), "__metadata__ is {'a': 1}"),
    "metadata that is a list": (file({"__metadata__": [], "a": tensor()}), "__metadata__ is []"),
    "long name": (file({"a" * 100_000: tensor()}), "100000 characters"),
    "no object": (file({"a": 1}), "a is of type None"),
    "no fields": (file({"a": {}}), "a is of type None"),
    "unknown type": (file({"a": tensor("F7")}), "a is of type 'F7', which cannot be read yet"),
    "scales alone": (file({"a": tensor("F8_E8M0", [8])}), "a is of type 'F8_E8M0', which cannot be read yet"),
    "type that is a list": (file({"a": tensor(["F32"])}), "a is of type ['F32']"),
    "shape that is a number": (file({"a": tensor(shape=2)}), "a has shape 2"),
    "float size": (file({"a": tensor(shape=[2.0])}), "a has shape [2.0]"),
    "true as size": (file({"a": tensor(shape=[True], offsets=[0, 4])}), "a has shape [True]"),
    "text as size": (file({"a": tensor(shape=["2"])}), "a has shape ['2']"),
    "negative sizes": (file({"a": tensor(shape=[-1, -2])}), "a has shape [-1, -2]"),
    "vast size": (file({"a": tensor(shape=[2**64, 0], offsets=[0, 0])}), "a has shape"),
    "many axes": (file({"a": tensor(shape=[1] * 100_000)}), "a has shape [1, 1, 1, 1, 1, 1, ...]"),
    "three offsets": (file({"a": tensor(offsets=[0, 8, 8])}), "byte range [0, 8, 8]"),
    "negative offset": (file({"a": tensor(offsets=[-8, 0])}), "byte range [-8, 0]"),
    "float offset": (file({"a": tensor(offsets=[0, 8.0])}), "byte range [0, 8.0]"),
    "no offsets": (file({"a": tensor(offsets=None)}), "byte range None"),
    "reversed range": (file({"a": tensor(offsets=[8, 0])}), "a has -8 bytes"),
    "size and shape differ": (file({"a": tensor(shape=[3])}), "a has 8 bytes, but [3] of F32 are 12"),
    "range beyond the file": (file({"a": tensor(shape=[4], offsets=[0, 16])}), "end at byte"),
    "overlap": (file({"a": tensor(), "b": tensor("U8", [4], [4, 8])}), "b begins at byte 4"),
    "same range": (file({"a": tensor(), "b": tensor()}), "b begins at byte 0"),
    "hole in front": (file({"a": tensor(shape=[1], offsets=[4, 8])}), "a begins at byte 4"),
    "hole between": (
        file({"a": tensor("U8", [2], [0, 2]), "b": tensor("U8", [4], [4, 8])}), "b begins at byte 4 of the data"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_in_a_short_message_that_names_the_file(lie: str, tmp_path: Path) -> None:
    data, expected = LIES[lie]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message and len(message) < len(str(path)) + 400


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((safetensors.MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(path, 3 * safetensors.MAX_HEADER)
    with pytest.raises(CheckpointError, match=f"claims {safetensors.MAX_HEADER + 1} bytes"):
        read(path)


VALID = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0)}, {"format": "pt"})


@pytest.mark.parametrize("length", range(len(VALID)))
def test_every_truncation_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(VALID[:length])
    with pytest.raises(CheckpointError, match=r"cut short|end at byte"):
        read(tmp_path / "x")


def assert_refused_or_read_alike(data: bytes, folder: Path) -> None:
    """We refuse, or the library reads the same; it never happens that we read what it refuses."""
    (folder / "x").write_bytes(data)
    try:
        ours = read(folder / "x").tensors
    except CheckpointError:
        return
    try:
        theirs = load(data)
    except SafetensorError as error:
        raise AssertionError(f"we read what the library refuses: {data!r}") from error
    assert_same(ours, theirs)


EDIT = st.tuples(st.integers(0, len(VALID)), st.integers(0, 3), st.binary(max_size=3) | st.sampled_from(
    [b"0", b"1", b"9", b"-", b"{", b"}", b"[", b"]", b'"', b",", b":", b"a", b"b", b"F16", b"null"]))  # fmt: skip


@given(st.lists(EDIT, min_size=1, max_size=4))
@SETTINGS
def test_changed_bytes_are_refused_or_read_as_the_library_does(
    tmp_path: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    data = VALID
    for place, removed, added in edits:
        data = data[:place] + added + data[place + removed :]
    assert_refused_or_read_alike(data, tmp_path)


NUMBER: st.SearchStrategy[Any] = st.integers(-2, 40) | st.sampled_from(
    [2**31, 2**63, 2**64, 10**30, 1.0, 1.5, True, None, "1", []]
)
FIELD = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "", 1])),
    st.tuples(st.just("shape"), st.lists(NUMBER, max_size=3) | NUMBER),
    st.tuples(st.just("data_offsets"), st.lists(NUMBER, max_size=3) | NUMBER),
)


@given(st.lists(st.tuples(st.sampled_from("abcd"), FIELD), min_size=1, max_size=4))
@SETTINGS
def test_changed_fields_are_refused_or_read_as_the_library_does(
    tmp_path: Path, changes: list[tuple[str, tuple[str, Any]]]
) -> None:
    length = int.from_bytes(VALID[:8], "little")
    header = json.loads(VALID[8 : 8 + length])
    for name, (field, value) in changes:
        header.setdefault(name, tensor("U8", [0], [0, 0]))[field] = value
    assert_refused_or_read_alike(file(header, VALID[8 + length :]), tmp_path)

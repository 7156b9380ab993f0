"""Files of torch.save: read as torch reads them, never obeyed, and written so that torch reads them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neoxconv.core.encoding import copied
from neoxconv.core.layout import Digest, Entry, FileLayout
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import PLAIN
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.pt import layout_pt, read_pt
from neoxconv.formats.pt.unpickle import Placeholder, Size
from neoxconv.storage import Storage, open_storage
from tests.fixtures import fixture

REAL = ("neox_2022_tp2_pp4", "neox_2022_sequential_tp2", "neox_2026_bf16_tp2_pp2", "trained_tp2_pp4")
KINDS = ("layer_*", "mp_rank_*", "*optim_states")
NEVER_WRITTEN = {(REAL[1], KINDS[0]), (REAL[3], KINDS[2])}  # sequential: no layer files; trained: no optimizer
WRITTEN = [(name, kind) for name in REAL for kind in KINDS if (name, kind) not in NEVER_WRITTEN]
FORMATS = {"zip": True, "legacy": False}

BASE = torch.arange(2 * 3 * 40, dtype=torch.float32).reshape(6, 40)

# --- comparing with torch --------------------------------------------------------------------------------------------


class Anything:
    """Stands for classes that are not installed, when torch itself reads a fixture."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class Permissive(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return Anything if module.startswith("deepspeed") else super().find_class(module, name)


PERMISSIVE = types.SimpleNamespace(Unpickler=Permissive, load=pickle.load, __name__="permissive")


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's numbers as neoxconv stores them: bfloat16 as the bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def assert_same(ours: Any, theirs: Any) -> None:
    """Two trees are equal, the tensors bit for bit, whatever the bands in which ours is read."""
    if isinstance(ours, Placeholder):
        assert not isinstance(theirs, dict | list | str | bytes | int | float | set | torch.Tensor | torch.Size)
    elif isinstance(theirs, torch.Tensor):
        expected = array(theirs)
        assert isinstance(ours, LazyTensor) and ours.shape == tuple(theirs.shape)
        assert ours.dtype.numpy == expected.dtype
        step = max(5, ours.rows // 7)
        bands = [ours.read(row, min(row + step, ours.rows)) for row in range(0, ours.rows, step)]
        assert b"".join(band.tobytes() for band in bands) == expected.tobytes()
    elif isinstance(theirs, dict):
        assert type(ours) is type(theirs) and list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, Size if isinstance(theirs, torch.Size) else type(theirs))
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    else:
        assert type(ours) is type(theirs) and ours == theirs


def saved(folder: Path, value: Any, **options: Any) -> Storage:
    torch.save(value, folder / "file.pt", **options)
    return open_storage(folder / "file.pt")


@pytest.mark.parametrize(("name", "kind"), WRITTEN)
def test_real_files_are_read_as_torch_reads_them(name: str, kind: str) -> None:
    for path in fixture(f"{name}/checkpoints", f"*/{kind}.pt").glob(f"*/{kind}.pt"):
        theirs = torch.load(path, weights_only=False, map_location="cpu", pickle_module=PERMISSIVE)
        assert_same(read_pt(open_storage(path)).value, theirs)


TREES: dict[str, Any] = {
    "types": {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in {
        "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32,
        "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}.items()},
    "views": [BASE[2:4], BASE[1, 5:9], BASE[:, 3:7], BASE[::2], BASE[:, ::3], BASE[:, 0], BASE.flatten()[::7]],
    "strides": [BASE.T, BASE.T[3:9], BASE[:1].expand(4, 40), BASE[:, :1].expand(6, 5), BASE[0, 0].expand(3, 4)],
    "many axes": [BASE.reshape(2, 3, 40).permute(2, 0, 1), BASE.reshape(2, 3, 40)[:, 1:, ::2], BASE.expand(2, 6, 40)],
    "small": [torch.tensor(3.0), torch.zeros(0), BASE[0, 5:5], torch.zeros(0, 4), BASE[3, 7], torch.ones(1, 1).T],
    "containers": OrderedDict(a={"b": [1, -2, 2**40, 1.5, None, True, "é"], 3: (BASE.shape, ())}, s={"x", "y", 1}),
    "parameter": [torch.nn.Parameter(BASE)],
    "bytes": [b"", b"\x00\xff"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tree", TREES)
def test_what_torch_saves_is_read_back(tree: str, kind: str, tmp_path: Path) -> None:
    file = saved(tmp_path, TREES[tree], _use_new_zipfile_serialization=FORMATS[kind])
    assert_same(read_pt(file).value, torch.load(file.path, weights_only=False))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    value = {"tensor": BASE, "set": {"a", 1}, "none": set(), "tree": TREES["containers"], "bytes": b"\xff" * 300}
    assert_same(read_pt(saved(tmp_path, value, pickle_protocol=protocol)).value, value)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(tmp_path, [BASE])
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_pt(file).value, [BASE])


def test_what_is_no_plain_tensor_is_a_placeholder_and_harms_nothing_else(tmp_path: Path) -> None:
    complexes = torch.zeros(2, dtype=torch.complex64)
    odd = [
        torch.float16,
        complexes,
        torch.ones(2, dtype=torch.complex64).conj().imag,
        torch.zeros(3, dtype=torch.uint16),
        BASE.to_sparse(),
    ]
    odd += [torch.zeros(5).untyped_storage(), np.arange(3)]
    value = read_pt(saved(tmp_path, {"odd": odd, "tensor": BASE})).value
    assert all(isinstance(item, Placeholder) for item in value["odd"])
    assert_same(value["tensor"], BASE)


def test_a_typed_tensor_on_a_storage_of_bytes_is_read(tmp_path: Path) -> None:
    untyped = built("K\x01", "K\x01\x85K\x01\x85", b"torch.storage\nUntypedStorage")
    typed = untyped.replace(b"_v2", b"_v3").replace(b"\x89NtR", b"\x89Nctorch\nfloat16\ntR")
    assert_same(read_pt(wrapped(tmp_path, typed)).value, torch.zeros(1, dtype=torch.float16))
    beyond = typed.replace(b"K\x01K\x01\x85", b"K\x02K\x01\x85")
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_pt(wrapped(tmp_path, beyond))


def test_a_view_of_a_storage_in_an_old_file_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path, BASE[0, :12].clone(), _use_new_zipfile_serialization=False)
    view = file.text().replace(b"K\x0cN", b"K\x0c(X\x01\x00\x00\x00vK\x03K\x04t").replace(b"K\x0c\x85", b"K\x04\x85")
    file.path.write_bytes(view)
    assert_same(read_pt(open_storage(file.path)).value, BASE[0, 3:7])


def test_an_old_file_with_numbers_of_another_kind_is_refused(tmp_path: Path) -> None:
    tree = [torch.zeros(2, dtype=torch.complex64), BASE]
    with pytest.raises(CheckpointError, match="type that cannot be read"):
        read_pt(saved(tmp_path, tree, _use_new_zipfile_serialization=False))


def test_a_transposed_matrix_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = read_pt(saved(tmp_path, [torch.zeros(2000, 300).T, torch.zeros(300_000)[::3]])).value
    lengths: list[int] = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, at, count: lengths.append(count) or read(self, at, count))
    tensor[0].read(7, 9)
    assert max(lengths) <= 1 << 17
    lengths.clear()
    tensor[1].read(0, 100_000)
    assert max(lengths) <= 1 << 21 and len(lengths) < 100


# --- hostile files ---------------------------------------------------------------------------------------------------


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def wrapped(folder: Path, data: bytes, size: int = 16) -> Storage:
    """A zip with any bytes as its pickle, and two storages of `size` bytes."""
    with zipfile.ZipFile(folder / "file.pt", "w") as target:
        target.writestr("file/data.pkl", data)
        target.writestr("file/data/0", bytes(size))
        target.writestr("file/data/1", bytes(size))
    return open_storage(folder / "file.pt")


def built(place: str, size: str, storage: bytes = b"torch\nFloatStorage") -> bytes:
    """The pickle of a tensor, `place` and `size` in opcodes."""
    pid = b"(X\x07\x00\x00\x00storagec" + storage + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + f"{place}{size}".encode("latin1") + b"\x89NtR."


MILLION = b"\x80\x02](" + b"K\x01" * 500_000 + b"eq\x00"
REFUSED: dict[str, bytes] = {
    "not a storage": b"\x80\x02X\x04\x00\x00\x00evilQ.",
    "outside": built("K\x01", "(K\x04tK\x01\x85"),
    "strides outside": built("K\x00", "(K\x02K\x02tK\x03K\x01\x86"),
    "negative": built("J\xff\xff\xff\xff", "(K\x01tK\x01\x85"),
    "fewer strides": built("K\x00", "(K\x01K\x01tK\x01\x85"),
    "expanded without end": built("K\x00", "(\x8a\x08" + "\x00" * 7 + "\x10tK\x00\x85"),
    "wider than the record": built("K\x00", "(K\x04tK\x01\x85", b"torch\nDoubleStorage"),
    "memo": b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
    "long item": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a cycle": b"\x80\x02]q\x00h\x00a.",
    "doubling": b"\x80\x02)" + b"2\x86" * 60 + b".",
    "a square": MILLION + b"0](" + b"h\x00" * 500_000 + b"e.",
    "copies": MILLION + b"c__builtin__\nset\nq\x01](" + b"h\x01(h\x00tR" * 2000 + b"e.",
    "many values": b"\x80\x02(" + b"}" * 6_000_000 + b"l.",
    "many values in a frame": b"\x80\x04\x95" + struct.pack("<Q", 6_000_003) + b"(" + b"}" * 6_000_000 + b"l.",
    "unknown operation": b"\x80\x02\xff.",
    "protocol": b"\x80\x09N.",
    "no end": b"\x80\x02N",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_pickle_is_refused_naming_the_file(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case != "many values":  # one is enough to see how long the real limit takes
        monkeypatch.setattr("neoxconv.formats.pt.streams.MAX_STEPS", 400_000)
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        read_pt(wrapped(tmp_path, REFUSED[case]))


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_called_on_a_file_s_word(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "called"
    touch = Call(os.mkdir, str(mark))
    calls = [touch, Call(getattr, touch, "x"), Call(eval, f"__import__('os').mkdir({str(mark)!r})")]
    calls += [Call(torch.load, str(mark)), Call(pickle.loads, pickle.dumps(touch)), Call(open, str(mark), "w")]
    stateful = b"\x80\x02cos\nmkdir\n)\x81X\x08\x00\x00\x00__dict__N\x86b(K\x01K\x02e(K\x01K\x02uK\x01K\x02s."
    assert isinstance(read_pt(wrapped(tmp_path, stateful)).value, Placeholder)
    value = read_pt(wrapped(tmp_path, pickle.dumps(calls, protocol))).value
    assert all(isinstance(item, Placeholder) for item in value) and not mark.exists()


def sample(kind: str) -> bytes:
    buffer = io.BytesIO()
    tree = {"a": BASE.half(), "b": [BASE.T, {"c", 2}], "c": OrderedDict(d=BASE[1:3])}
    torch.save(tree, buffer, _use_new_zipfile_serialization=FORMATS[kind])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_short_is_refused(kind: str, tmp_path: Path) -> None:
    data = sample(kind)
    for end in range(0, len(data), 97):
        (tmp_path / "file.pt").write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"file\.pt"):
            read_pt(open_storage(tmp_path / "file.pt"))


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(sample(kind))
    places = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for at, byte in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[at] = byte
    (tmp_path / "file.pt").write_bytes(damaged)
    try:
        value = read_pt(open_storage(tmp_path / "file.pt")).value
    except CheckpointError as error:
        assert "file.pt" in str(error)
    else:
        for tensor in value.values() if isinstance(value, dict) else ():
            if isinstance(tensor, LazyTensor):
                tensor.read(0, tensor.rows)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_pickle_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(zipfile.ZipFile(io.BytesIO(sample("zip"))).read("archive/data.pkl"))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), min_size=1)):
        damaged[at] = byte
    try:
        read_pt(wrapped(tmp_path, bytes(damaged), 960))
    except CheckpointError as error:
        assert "file.pt" in str(error)


def patched(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """A change of the first `old` in a file's bytes."""
    return lambda data: data.replace(old, new, 1)


def overlapping(data: bytes) -> bytes:
    """The directory sends data/1 to the local header of data/0."""
    first, second = data.index(b"PK\1\2", data.rindex(b"PK\7\x08")), data.rindex(b"/data/1")
    entry = data.rindex(b"PK\1\2", first, second)
    before = data.rindex(b"PK\1\2", first, entry)
    return data[: entry + 42] + data[before + 42 : before + 46] + data[entry + 46 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (lambda data: b"<html>", "begins with b'<html>'"),
    "empty": (lambda data: b"", "begins with b''"),
    "pickle": (lambda data: pickle.dumps({"a": 1}), "not a PyTorch"),
    "big-endian": (patched(b"little", b"big\0\0\0"), "little-endian"),
    "another name": (patched(b"archive/data/0", b"archive/data/9"), "data/0"),
    "overlap": (overlapping, "data/1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_in_words(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    (tmp_path / "file.pt").write_bytes(damage(sample("zip")))
    with pytest.raises(CheckpointError, match=r"file\.pt: ") as error:
        read_pt(open_storage(tmp_path / "file.pt"))
    assert words in str(error.value)


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("file/data.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match="compressed"):
        read_pt(open_storage(tmp_path / "file.pt"))


# --- writing ---------------------------------------------------------------------------------------------------------


def entry(tensor: torch.Tensor) -> Entry:
    """An entry whose bytes are the tensor's."""
    numbers = array(tensor)
    dtype = {torch.bfloat16: PLAIN["BF16"], torch.bool: PLAIN["BOOL"]}.get(tensor.dtype)
    dtype = dtype or next(d for d in PLAIN.values() if d.numpy == numbers.dtype)
    lazy = LazyTensor(
        tuple(tensor.shape), dtype, lambda start, stop: numbers.reshape(-1, *tensor.shape[1:])[start:stop], dtype
    )
    return Entry("", "", lazy, copied(dtype))


def write(layout: FileLayout, folder: Path) -> Path:
    """The file that a layout describes; holes stay zero and nothing is written twice."""
    data, seen = bytearray(layout.size), np.zeros(layout.size, np.uint8)
    contents = [slot.entry.tensor.read(0, slot.entry.tensor.rows).tobytes() for slot in layout.slots]
    written = [Digest("", zlib.crc32(content)) for content in contents]
    ranges = [*layout.pieces, *zip((slot.offset for slot in layout.slots), contents, strict=True)]
    for late in layout.late:
        ranges.append((late.offset, late.make(written)))
        assert len(ranges[-1][1]) == late.size
    for offset, content in ranges:
        data[offset : offset + len(content)] = content
        seen[offset : offset + len(content)] += 1
    assert len(data) == layout.size and seen.max(initial=0) <= 1
    (folder / layout.name).parent.mkdir(parents=True, exist_ok=True)
    (folder / layout.name).write_bytes(data)
    return folder / layout.name


TENSORS = st.sampled_from([*TREES["types"].values(), torch.tensor(2.5), torch.zeros(0, 3), BASE])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
LEAVES = TENSORS | SCALARS | st.sets(st.text() | st.integers()) | st.just(torch.Size((2, 3)))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple)
                      | st.dictionaries(st.text() | st.integers(), inner).flatmap(
                          lambda d: st.sampled_from([d, OrderedDict(d)])), max_leaves=8)  # fmt: skip


def laid(value: Any) -> Any:
    """The tree with entries for tensors, as a writer gives it."""
    if isinstance(value, torch.Tensor):
        return entry(value)
    if isinstance(value, dict):
        return type(value)((key, laid(item)) for key, item in value.items())
    if isinstance(value, torch.Size):
        return Size(value)
    return type(value)(map(laid, value)) if isinstance(value, list | tuple) else value


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(value=VALUES)
def test_what_is_laid_out_loads_with_torch_and_here(value: Any, tmp_path: Path) -> None:
    path = write(layout_pt("step/layer_00.pt", laid(value)), tmp_path)
    assert zipfile.ZipFile(path).testzip() is None
    assert_same(read_pt(open_storage(path)).value, value)
    for mmap in (False, True):
        assert comparable(torch.load(path, weights_only=True, mmap=mmap)) == comparable(value)


def comparable(value: Any) -> Any:
    """A tree of torch's with its tensors as bytes, so that == compares it."""
    if isinstance(value, torch.Tensor):
        return array(value).tobytes(), tuple(value.shape), str(value.dtype)
    if isinstance(value, dict):
        return type(value)((key, comparable(item)) for key, item in value.items())
    return type(value)(map(comparable, value)) if type(value) in (list, tuple) else value


def test_storages_are_aligned_and_the_container_is_small(tmp_path: Path) -> None:
    layout = layout_pt("layer_02-model_00-model_states.pt", {f"some.tensor.{i}.weight": entry(BASE) for i in range(13)})
    assert all(slot.offset % 64 == 0 for slot in layout.slots)
    assert layout.size - sum(slot.entry.nbytes for slot in layout.slots) < 5400
    names = zipfile.ZipFile(write(layout, tmp_path)).namelist()
    assert names[0] == "layer_02-model_00-model_states/data.pkl" and "layer_02-model_00-model_states/version" in names


def test_a_sparse_file_beyond_4_gib_is_read_by_torch_and_here(tmp_path: Path) -> None:
    rows = (1 << 32) // 1024 + 3
    dtype = PLAIN["F16"]
    lazy = LazyTensor((rows, 512), dtype, lambda start, stop: np.zeros((stop - start, 512), "<f2"), dtype)
    large = Entry("", "", lazy, copied(dtype))
    layout = layout_pt("a.pt", {"large": large, "small": entry(BASE)})
    with open(tmp_path / "a.pt", "wb") as target:
        target.truncate(layout.size)
        for offset, content in [
            *layout.pieces,
            *((late.offset, late.make([Digest("", 7), Digest("", 9)])) for late in layout.late),
        ]:
            target.seek(offset)
            target.write(content)
        target.seek(layout.slots[1].offset)
        target.write(array(BASE).tobytes())
    ours, theirs = read_pt(open_storage(tmp_path / "a.pt")), torch.load(tmp_path / "a.pt", mmap=True)
    assert_same(ours.value["small"], BASE)
    assert ours.records["1"].crc32 == 9 and ours.value["large"].shape == tuple(theirs["large"].shape)
    assert torch.equal(theirs["small"], BASE)


@pytest.mark.parametrize("value", [Placeholder("deepspeed.Scaler"), object(), frozenset()])
def test_what_a_file_cannot_hold_is_named_by_its_path(value: Any) -> None:
    with pytest.raises(PlanError, match=r"a\.pt.*args.*odd"):
        layout_pt("a.pt", {"args": [1, {"odd": value}]})


def test_the_checksum_tells_files_apart(tmp_path: Path) -> None:
    first = read_pt(saved(tmp_path, [BASE])).checksum
    assert first == read_pt(saved(tmp_path, [BASE])).checksum != read_pt(saved(tmp_path, [BASE + 1])).checksum

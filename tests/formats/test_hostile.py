"""Hostile files, made by hand: nothing in them is imported, called, written or read elsewhere, each is refused soon.

What the tests of each format have already is not here: calls, deep and doubling pickles, memos (test_pt), headers that
lie (test_safetensors, test_gguf), names in an index that climb out of the folder (test_hf).
"""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from neoxconv import open_checkpoint, synthetic, verify_bytes
from neoxconv.cli.main import main
from neoxconv.core.model import Index
from neoxconv.errors import LONGEST, CheckpointError, NeoxconvError, raise_all
from neoxconv.formats import tokenizer
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox import yaml_settings
from neoxconv.formats.neox.folder import stage_starts, tag_folder
from neoxconv.formats.neox.yaml_settings import read_configs
from neoxconv.formats.pt import read_pt
from neoxconv.formats.pt.unpickle import Placeholder
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.storage import open_storage
from tests.fuzz import of_pt, start_watching, verdict, watched
from tests.fuzz_inputs import counted, described, gguf_pieces, key, legacy_pieces, model, pickled, u32, zip_pieces
from tests.toy import toy

SECONDS, MEMORY = 20, 64 << 20  # of processor time, on a slow machine; of memory beyond 60 times the file
Read = Callable[[Path], object]

assert yaml  # imported here, so that no parser has to


@pytest.fixture(autouse=True)
def _watching() -> None:
    start_watching()


def assert_refused(read: Read, path: Path, words: str = "") -> None:
    """A reader raises a CheckpointError with the words, in time, without anything that it may not do."""
    size = path.stat().st_size if path.is_file() else 0
    tracemalloc.start()
    try:
        assert_told(read, path, words)
        assert tracemalloc.get_traced_memory()[1] < MEMORY + 60 * size
    finally:
        tracemalloc.stop()


def assert_told(read: Read, path: Path, words: str) -> None:
    assert verdict(lambda given: told(read, given, words), path, SECONDS) == "refused"


def told(read: Read, path: Path, words: str) -> None:
    """Read, and see that a refusal has the words."""
    try:
        read(path)
    except CheckpointError as error:
        assert words in str(error), error
        raise


def placed(folder: Path, name: str, data: bytes | str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


# --- pickles ---------------------------------------------------------------------------------------------------------


def zipped(pickle: bytes, more: dict[str, bytes] | None = None) -> bytes:
    return b"".join(zip_pieces({"x/data.pkl": pickle, "x/data/0": bytes(16), **(more or {})}))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def pid(key: bytes, count: bytes = b"K\x04", kind: bytes = b"torch\nFloatStorage") -> bytes:
    """The opcodes of a storage."""
    return b"(" + text("storage") + b"c" + kind + b"\n" + key + text("cpu") + count + b"tQ"


def tensor(key: str) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid(text(key)) + b"K\x00K\x01\x85K\x01\x85\x89NtR"


DOUBLING = b")" + b"2\x86" * 60  # a tuple of two of a tuple of two ...
LONG_LIST = b"](" + b"K\x01" * 200_000 + b"eq\x00"
SAME_HASH = [b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") for i in range(100_000)]
REFUSED: dict[str, tuple[bytes, str]] = {
    "persistent id as text": (b"\x80\x02P../../etc/passwd\n.", "no checkpoint needs"),
    "storage in another file": (b"\x80\x02" + tensor("../../../../etc/passwd") + b".", "which the file does not hold"),
    "storage of the pickle itself": (b"\x80\x02" + tensor("../data.pkl") + b".", "which the file does not hold"),
    "storage whose key is endless": (b"\x80\x02" + pid(DOUBLING) + b".", "not a storage"),
    "count that is endless": (b"\x80\x02" + pid(text("0"), DOUBLING) + b".", "where a count is expected"),
    "count beyond a file": (b"\x80\x02" + pid(text("0"), b"\x8a\x09" + bytes(8) + b"\x01") + b".", "where a count"),
    "count of 10,000 digits": (b"\x80\x02" + pid(text("0"), b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096) + b".", "pickle"),
    "keys of one hash": (b"\x80\x02}(" + b"N".join(SAME_HASH) + b"Nu.", "more work"),
    "set of one hash": (b"\x80\x04\x8f(" + b"".join(SAME_HASH) + b"\x90.", "more work"),
    "long list as arguments, often": (
        b"\x80\x02" + LONG_LIST + b"cos\nsystem\nq\x01" + b"0h\x01h\x00R" * 100_000 + b".", "more work",
    ),
    "long list for an object, often": (
        b"\x80\x02" + LONG_LIST + b"cos\nsystem\nq\x01" + b"0h\x01h\x00\x81" * 100_000 + b".", "more work",
    ),
    "millions of sets": (b"\x80\x04(" + b"\x8f" * 3_000_000 + b"l.", "more work"),
    "bytes of all memory": (b"\x80\x05\x8e" + struct.pack("<Q", 1 << 40) + b"N.", "an item claims"),
    "a bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"N.", "no checkpoint needs"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "no checkpoint needs"),
    "an extension": (b"\x80\x02\x82\x01.", "no checkpoint needs"),
    "an instance": (b"(ios\nsystem\n.", "no checkpoint needs"),
    "an object": (b"(cos\nsystem\no.", "no checkpoint needs"),
    "a number of 50,000 digits": (b"L" + b"9" * 50_000 + b"L\n.", "its pickle is damaged"),
    "a line without end": (b"F" + b"1" * 200_000 + b"\n.", "its pickle is damaged"),
    "nothing on the stack": (b"\x80\x02.", "its pickle is damaged"),
    "a mark without end": (b"\x80\x02(((((.", "its pickle is damaged"),
    "a memo of nothing": (b"\x80\x02h\x07.", "its pickle is damaged"),
    "a call of a number": (b"\x80\x02K\x01)R.", "its pickle is damaged"),
    "attributes of a list": (b"\x80\x02]}" + text("append") + b"K\x01sb.", "gives a state to a list"),
    "negative length": (b"T\xff\xff\xff\xff.", "its pickle is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_pickle_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case != "millions of sets":  # one is enough to see how long the real limit takes
        monkeypatch.setattr("neoxconv.formats.pt.streams.MAX_STEPS", 400_000)
    data, words = REFUSED[case]
    assert_refused(of_pt, placed(tmp_path, "file.pt", zipped(data)), words)


GLOBALS = (
    "os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec", "builtins getattr",
    "builtins __import__", "__builtin__ apply", "importlib import_module", "runpy _run_code", "pickle loads",
    "torch load", "torch.hub load", "torch._utils _rebuild_sparse_tensor", "torch.serialization load", "numpy load",
    "numpy.core.multiarray _reconstruct", "functools partial", "operator attrgetter", "operator methodcaller",
    "copyreg _reconstructor", "types FunctionType", "types CodeType", "webbrowser open", "socket socket",
    "shutil rmtree",
    "pathlib Path", "io open", "ctypes CDLL", "pip main", "timeit timeit", "code InteractiveInterpreter",
    "zlib decompress",
    "neoxconv.storage.files Storage", "neoxconv.formats.pt.unpickle StorageRef", "collections OrderedDict.fromkeys",
    "codecs open",
)  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("how", ["global", "stack global", "new object", "state"])
def test_no_name_is_looked_up(name: str, how: str, tmp_path: Path) -> None:
    module, attribute = name.split()
    found = f"c{module}\n{attribute}\n".encode()
    if how == "stack global":
        found = (
            b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(attribute)]) + attribute.encode()
        )
        found += b"\x93"
    arguments = text(str(tmp_path / "made")) + b"\x85"
    build = {"new object": b"\x81", "state": b"R}" + text("__dict__") + b"}sb"}.get(how, b"R")
    assert_inert(placed(tmp_path, "file.pt", zipped(b"\x80\x04" + found + arguments + build + b".")))
    assert not (tmp_path / "made").exists()


def test_a_pickle_inside_a_pickle_stays_text(tmp_path: Path) -> None:
    inner = b"cos\nsystem\n(S'true'\ntR."
    data = b"\x80\x04cpickle\nloads\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    assert_inert(placed(tmp_path, "file.pt", zipped(data)))


def assert_inert(path: Path) -> None:
    """A file is read, nothing is done, and a placeholder is all that comes of it."""
    with watched(path.parent):
        assert isinstance(read_pt(open_storage(path)).value, Placeholder)


@pytest.mark.parametrize("codec", ["rot13", "zlib_codec", "bz2", "idna", "utf-16", "unicode_escape"])
def test_no_codec_but_the_one_of_torch_is_used(codec: str, tmp_path: Path) -> None:
    data = b"\x80\x02c_codecs\nencode\n" + text("x" * 999) + text(codec) + b"\x86R."
    assert_inert(placed(tmp_path, "file.pt", zipped(data)))


def test_an_old_file_that_claims_64_mib_takes_no_memory_for_them(tmp_path: Path) -> None:
    path = placed(tmp_path, "file.pt", b"\x80\x02X" + struct.pack("<I", (64 << 20) - 1) + b"abc")
    tracemalloc.start()
    try:
        assert_told(of_pt, path, "it ends early")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_old_file_whose_storages_have_no_names_is_refused(tmp_path: Path) -> None:
    whole = b"".join(legacy_pieces(pickled({})))
    listed = pickled(["0", "1"])
    assert listed in whole
    data = whole.replace(listed, b"\x80\x02](N)e.")
    assert_refused(of_pt, placed(tmp_path, "file.pt", data), "list of storages")


# --- zips ------------------------------------------------------------------------------------------------------------

PLAIN = b"\x80\x02N."


def bomb(claimed: int) -> bytes:
    """A zip whose storage is deflated zeros, and claims to become so many bytes."""
    packed = zlib.compress(bytes(1 << 20), 9)[2:-4]
    pieces = list(zip_pieces({"x/data.pkl": PLAIN, "x/data/0": packed}, wide=True))
    for at, piece in enumerate(pieces):
        if piece in (b"PK\3\4", b"PK\1\2") and b"x/data/0" in pieces[at : at + 18]:
            first = at + (2 if piece == b"PK\3\4" else 3)
            pieces[first + 1] = b"\x08\0"
            pieces[first + 6] = struct.pack("<I", claimed)
    return b"".join(pieces)


def overlapping(count: int) -> bytes:
    """A zip whose members are all the same bytes, under many names."""
    pieces = list(zip_pieces({"x/data.pkl": PLAIN, **{f"x/data/{i}": bytes(1000) for i in range(count)}}))
    central = [at for at, piece in enumerate(pieces) if piece == b"PK\1\2"]
    for at in central[2:]:
        pieces[at + 16] = pieces[central[1] + 16]  # the local header's place
    return b"".join(pieces)


def in_itself() -> bytes:
    """A zip with a member that reaches from its local header over the next ones to the directory."""
    pieces = list(zip_pieces({"x/data.pkl": PLAIN, "x/data/0": bytes(50), "x/data/1": bytes(50)}))
    at = [at for at, piece in enumerate(pieces) if piece == b"PK\1\2"][1]
    pieces[at + 8] = pieces[at + 9] = struct.pack("<I", 100)
    return b"".join(pieces)


def wide_sizes() -> bytes:
    """A zip64 whose member claims a terabyte in its extra field."""
    pieces = list(zip_pieces({"x/data.pkl": PLAIN, "x/data/0": bytes(50)}, wide=True))
    at = [at for at, piece in enumerate(pieces) if piece == b"PK\1\2"][1]
    pieces[at + 8] = pieces[at + 9] = b"\xff" * 4
    pieces[at + 11] = struct.pack("<H", 20)
    pieces[at + 17] += struct.pack("<2H2Q", 1, 16, 1 << 40, 1 << 40)
    end = next(at for at, piece in enumerate(pieces) if piece == b"PK\6\6")
    pieces[end + 8] = struct.pack("<Q", int.from_bytes(pieces[end + 8], "little") + 20)
    locator = pieces.index(b"PK\6\7")
    pieces[locator + 2] = struct.pack("<Q", int.from_bytes(pieces[locator + 2], "little") + 20)
    return b"".join(pieces)


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bomb of 4 GB": (lambda: bomb(0xFFFFFFFE), "compressed or encrypted"),
    "a bomb of a terabyte": (wide_sizes, "does not lie where"),
    "members on one another": (lambda: overlapping(500), "does not lie where"),
    "a member around others": (in_itself, "overlap"),
    "a million members": (
        lambda: b"PK\3\4" + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 65535, 65535, 46, 0, 0), "claims 65535 members",
    ),
    "no data.pkl": (lambda: b"".join(zip_pieces({"x/other": b""})), "0 data.pkl"),
    "two data.pkl": (lambda: b"".join(zip_pieces({"x/data.pkl": PLAIN, "y/data.pkl": PLAIN})), "2 data.pkl"),
    "a name twice": (lambda: b"".join(zip_pieces({"x/data.pkl": PLAIN, "x/data/0": b"", "x/data/1": b""}))
                     .replace(b"x/data/1", b"x/data/0"), "holds a member twice"),
    "encrypted": (lambda: zipped(PLAIN).replace(b"PK\1\2\x14\0\x14\0\0\0", b"PK\1\2\x14\0\x14\0\1\0", 1), "encrypted"),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused(case: str, tmp_path: Path) -> None:
    make, words = ZIPS[case]
    assert_refused(of_pt, placed(tmp_path, "file.pt", make()), words)


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/passwd", "x/../../evil", "C:\\evil", "x\0y", "x" * 60_000, "\x1b[31m", "con", "..", "."],
)
def test_names_in_a_zip_lead_nowhere(name: str, tmp_path: Path) -> None:
    path = placed(tmp_path, "in/file.pt", zipped(PLAIN, {name: b"evil", "x/data/" + name: b"evil"}))
    with watched(path.parent):
        assert read_pt(open_storage(path)).value is None
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", path]


def test_python_s_own_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        target.writestr("x/data.pkl", b"\x80\x02]" + b"0]" * 20_000_000 + b".")
    assert_refused(of_pt, tmp_path / "file.pt", "compressed")


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path) -> Path:
    """A small model as Hugging Face stores it."""
    for name, data in model().items():
        placed(tmp_path / "hf", name, data)
    return tmp_path / "hf"


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def writing(name: str, data: bytes | str) -> Callable[[Path], object]:
    return lambda folder: placed(folder, name, data)


def sparse(name: str, size: int) -> Callable[[Path], object]:
    """A file of zeros that takes no room."""
    return lambda folder: os.truncate(placed(folder, name, b""), size)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def of_many_digits(folder: Path) -> None:
    """The model in a .bin, the number of a layer in it beyond what Python takes for one."""
    for name in model():
        (folder / name).unlink()
    name = f"gpt_neox.layers.{'1' * 5000}.input_layernorm.weight"
    placed(folder, "config.json", model()["config.json"])
    placed(folder, "pytorch_model.bin", zipped(b"\x80\x02}" + text(name) + tensor("0") + b"s."))


VERDICT = "\x1b[2J\x1b[32mPASS\nneoxconv: PASS"
HALF = synthetic.tiny().data.replace(b'"!"', b'"\\ud800"')
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config of all digits": (with_config(num_hidden_layers=10**4000), "num_hidden_layers is '1000"),
    "config of NaN": (with_config(hidden_size=float("nan")), "hidden_size is 'nan'"),
    "config of infinity": (with_config(num_attention_heads=float("inf")), "num_attention_heads is 'inf'"),
    "config beyond floats": (writing("config.json", '{"hidden_size": 1e999}'), "config.json"),
    "config of a terabyte": (with_config(hidden_size=1 << 40), "1099511627776"),
    "config of many layers": (with_config(num_hidden_layers=10**12), "says 1000000000000 layers"),
    "config with deep activation": (with_config(hidden_act=nested(900)), "hidden_act is"),
    "config with deep model type": (with_config(model_type=nested(900)), "model; expected"),
    "config that obeys no one": (with_config(model_type=VERDICT), r"is a \x1b[2J\x1b[32mPASS\n"),
    "config of 17 MB": (sparse("config.json", 17 << 20), "expected at most"),
    "index of a terabyte": (sparse("model.safetensors.index.json", 1 << 40), "expected at most"),
    "shard of a terabyte of zeros": (sparse("one.safetensors", 1 << 40), "its header claims 0 bytes"),
    "index that is UTF-16": (writing("model.safetensors.index.json", '{"weight_map": {}}'.encode("utf-16")),
    "not JSON"),
    "index to a folder's link": (lambda folder: link_out(folder), "lacks 'two.safetensors'"),
    "tensor of 5,000 digits": (of_many_digits, "is not a tensor of gpt_neox"),
}  # fmt: skip


def link_out(folder: Path) -> None:
    """A shard that is a link to a folder outside."""
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("/etc")


@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder_is_refused(case: str, tmp_path: Path) -> None:
    change, words = FOLDERS[case]
    folder = folder_of(tmp_path)
    change(folder)
    assert_refused(open_checkpoint, folder, words)


def test_a_link_to_a_file_is_followed_as_in_hugging_face_s_cache(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "one.safetensors").rename(tmp_path / "blob")
    (folder / "one.safetensors").symlink_to(tmp_path / "blob")
    assert open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    "tag", ["..", ".", "../../etc", "/etc", "", "a\0b", "x" * 5000, "\x1b[31m", "global_step10\nevil"]
)
def test_the_tag_in_latest_stays_in_its_folder(tag: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "saved"
    placed(tmp_path / "run", "layer_00-model_00-model_states.pt", b"")
    placed(folder, "latest", tag)
    (folder / "global_step10").mkdir()
    assert_refused(tag_folder, folder, "latest: names")


def test_a_latest_without_end_is_not_read_whole(tmp_path: Path) -> None:
    sparse("latest", 1 << 40)(tmp_path)
    assert_refused(tag_folder, tmp_path, "latest: names")


TWICE = (
    ("layer_02-model_00-model_states.pt", "layer_2-model_0-model_states.pt"),
    ("mp_rank_00_model_states.pt", "mp_rank_0_model_states.pt"),
)


@pytest.mark.parametrize("names", TWICE, ids=("layers", "bookkeeping"))
def test_two_files_of_the_same_numbers_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert_refused(neox.index, tmp_path, f"{names[0]}: has the same numbers as {names[1]}")


def test_the_number_of_a_stage_is_a_number() -> None:
    names = {"²": 1, "1" * 5000: 1, "7.weight": 1, "12": 1, "x.1": 1}
    index = Index("neox", Path(), (), (), {}, states={0: {"param_shapes": names}, 1: {"param_shapes": [{"3.a": 1}]}})
    assert stage_starts(index) == (7,)


# --- YAML ------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))
YAMLS: dict[str, tuple[bytes | str, str]] = {
    "a call": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "an object": ("!!python/object:os.system {}", "could not determine a constructor"),
    "a module": ("a: !!python/module:antigravity", "could not determine a constructor"),
    "a billion laughs": (LAUGHS + "pos-emb: *a59", "more values than any"),
    "a billion merges": (MERGES, "more values than any"),
    "a list in itself": ("a: &a [*a]", "nested deeper"),
    "a mapping in itself": ("&a {a: *a}", "nested deeper"),
    "deep lists": ("a: " + "[" * 300 + "]" * 300, "nested deeper"),
    "deeper lists": ("a: " + "[" * 400, "cannot be read as YAML"),
    "a number of 8,000 digits": ("num-layers: 0x" + "f" * 7000, "longer than"),
    "a time that is none": ("a: !!timestamp x", "cannot be read as YAML"),
    "a whole number that is none": ("a: !!int", "cannot be read as YAML"),
    "a truth that is none": ("a: !!bool x", "cannot be read as YAML"),
    "no text": (b"\xff\xfe\0", "cannot be read as YAML"),
    "a key that is a list": ("? [a]\n: b", "cannot be read as YAML"),
    "two documents": ("a: 1\n---\nb: 2", "cannot be read as YAML"),
    "a large file": (b"#" * (yaml_settings.LARGEST + 1), "expected at most"),
    "many anchors": ("".join(f"- &a{i} 1\n" for i in range(2000)), "found list"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_hostile_yaml_is_refused(case: str, tmp_path: Path) -> None:
    data, words = YAMLS[case]
    assert_refused(lambda path: read_configs([path]), placed(tmp_path, "model.yml", data), words)


def test_a_number_that_equals_nothing_is_a_setting_like_others(tmp_path: Path) -> None:
    read = read_configs([placed(tmp_path, "model.yml", "rotary-pct: .nan"), placed(tmp_path, "b.yml", "a: 1")])
    assert math.isnan(read["rotary_pct"]) and read["a"] == 1


# --- tokenizers, manifests, GGUF -------------------------------------------------------------------------------------


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep": (writing("tokenizer.json", "[" * 100_000), "is not JSON"),
    "deep objects": (writing("tokenizer.json", '{"a":' * 100_000), "is not JSON"),
    "vast": (sparse("tokenizer.json", 1 << 40), "a tokenizer at most"),
    "UTF-32": (writing("tokenizer.json", "{}".encode("utf-32")), "is not JSON"),
    "a number of 10,000 digits": (writing("tokenizer.json", '{"a": ' + "1" * 10_000 + "}"), "is not JSON"),
    "half a character": (writing("tokenizer.json", HALF), "not valid Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(case: str, tmp_path: Path) -> None:
    make, words = TOKENIZERS[case]
    make(tmp_path)
    assert_refused(lambda path: tokenizer.gguf_keys(tokenizer.load(path), 1000), tmp_path / "tokenizer.json", words)


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 7)])
def test_a_tokenizer_with_a_deep_section_is_refused_where_it_is_told_of(depth: int) -> None:
    parsed = json.loads(synthetic.tiny().data)
    text = json.dumps(parsed | {"normalizer": "DEEP"}).replace('"DEEP"', "[" * depth + "]" * depth)

    def from_below(frames: int) -> None:
        if frames:
            return from_below(frames - 1)
        tokenizer.gguf_keys(opened, 300)

    try:
        opened = Tokenizer(text.encode())
        _ = opened.parsed
    except CheckpointError:
        return
    with pytest.raises(CheckpointError, match="normalizer"):
        from_below(40)


def listing(**changes: Any) -> str:
    """A manifest of one empty file, or of another."""
    return json.dumps({"files": [{"name": "a", "bytes": 0, "sha256": "", "ranges": []} | changes]})


def piece(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "", "offset": 0, "bytes": 1, "sha256": ""} | changes]


MANIFESTS: dict[str, str] = {
    "a name that is a list": listing(name=["a"]),
    "a name with NUL": listing(name="a\0b"),
    "half a character": listing(name="\ud800"),
    "an offset without end": listing(bytes=1, ranges=piece(offset=float("inf"))),
    "an offset that is no number": listing(bytes=1, ranges=piece(offset=float("nan"))),
    "a range before the file": listing(bytes=1, ranges=piece(offset=-1)),
    "digits without end": listing(bytes=1, ranges=piece(bytes="1" * 9999)),
    "a list in lists": '{"files": ' + "[" * 100_000,
    "files that are none": '{"files": {"a": 1}}',
    "nothing": "null",
    "UTF-16": "\ufeff{}",
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    data = MANIFESTS[case].encode("utf-16" if case == "UTF-16" else "utf-8")
    assert_refused(verify_bytes, placed(tmp_path, "manifest.json", data).parent, "manifest.json: is damaged")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "sub/../../secret", "link", "deep/link/passwd", "/dev/zero", "x" * 5000, "..", "."],
)
def test_a_manifest_makes_nothing_outside_the_target_be_read(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    placed(tmp_path, "secret", b"secret")
    placed(target, "manifest.json", listing(name=name, bytes=6, ranges=piece(bytes=6)))
    (target / "link").symlink_to(tmp_path / "secret")
    (target / "deep").mkdir()
    (target / "deep" / "link").symlink_to("/etc")
    with watched(target, SECONDS):
        findings = verify_bytes(target).findings
    assert {finding.what for finding in findings} & {"lies outside the target", "is missing"}


def test_a_manifest_prints_no_verdict_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\n  bytes: 1 files, 9 bytes\nPASS: bytes ok\x1b[8m"
    placed(tmp_path, "manifest.json", listing(name=name))
    assert main(["verify", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "PASS" in out and out.splitlines()[-1] == "FAIL: bytes differ" and "\x1b" not in out
    assert not any(line.startswith("PASS") for line in out.splitlines())


def gguf_of(*tensors: list[bytes], keys: list[list[bytes]] | None = None) -> bytes:
    pieces = gguf_pieces([key("general.architecture", 8, *counted(b"gptneox")), *(keys or [])], tensors, b"")
    head = b"".join(pieces)
    return head + bytes(-len(head) % 32 + 64)


COUNTS = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length", "context_length")
VAST = [key(f"gptneox.{name}", 10, struct.pack("<Q", (1 << 64) - 1)) for name in (*COUNTS, "rope.dimension_count")]
FLOATS = [key(f"gptneox.{name}", 12, struct.pack("<d", 1.7e308)) for name in (*COUNTS, "rope.dimension_count")]
EPSILON = [key("gptneox.attention.layer_norm_epsilon", 6, struct.pack("<f", 1e-5))]
GGUFS: dict[str, tuple[bytes, str]] = {
    "a layer of 5,000 digits": (gguf_of(described(f"blk.{'1' * 5000}.attn_norm.weight", [4], 0, 0)), ""),
    "counts of 64 bits": (gguf_of(keys=VAST + EPSILON), "layers but the files hold 0"),
    "counts beyond 64 bits": (gguf_of(keys=FLOATS + EPSILON), ""),
    "a name that is a verdict": (gguf_of(described("a\nPASS\x1b[8m", [4], 99, 0)), "ggml type 99"),
    "an architecture that is a list": (
        b"".join(gguf_pieces([key("general.architecture", 9, u32(0), bytes(8))], [], bytes(64))), "model; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_a_hostile_gguf_is_refused(case: str, tmp_path: Path) -> None:
    data, words = GGUFS[case]
    assert_refused(open_checkpoint, placed(tmp_path, "x.gguf", data), words)


@pytest.mark.parametrize("name", ["..-00001-of-00002.gguf", "x-00001-of-00999.gguf", "%2e%2e-00002-of-00002.gguf"])
def test_parts_of_a_gguf_are_looked_for_in_its_folder_alone(name: str, tmp_path: Path) -> None:
    path = placed(tmp_path / "in", name, gguf_of())
    placed(tmp_path, "-00002-of-00002.gguf", gguf_of())
    with (
        watched(path.parent, SECONDS),
        pytest.raises(CheckpointError, match=f"{path.parent}/.*is missing; download it again"),
    ):
        open_checkpoint(path)


# --- messages, targets -----------------------------------------------------------------------------------------------


def test_a_message_is_as_many_printable_lines_as_there_are_problems() -> None:
    with pytest.raises(CheckpointError) as caught:
        raise_all(CheckpointError, ["a\nPASS", "b\x1b[31m\r\u2028\ud800", "c" * 10_000])
    lines = str(caught.value).split("\n")
    assert lines[:2] == [r"a\nPASS", r"b\x1b[31m\r\u2028\ud800"] and len(lines) == 3
    assert lines[2].startswith("ccc") and len(lines[2]) <= LONGEST and str(caught.value).encode()
    assert str(NeoxconvError("plain ünïcode: 'a' \\ b")) == "plain ünïcode: 'a' \\ b"


def test_a_source_full_of_odd_names_writes_nothing_beside_the_target(tmp_path: Path) -> None:
    source = toy(tmp_path)
    step = next(source.glob("global_step*"))
    odd = {"../../evil": b"evil", "/tmp/evil": b"evil"}
    layer = next(step.glob("layer_02-model_00*"))
    members = {info.filename: zipfile.ZipFile(layer).read(info) for info in zipfile.ZipFile(layer).infolist()}
    layer.write_bytes(b"".join(zip_pieces(members | odd)))
    before = set(tmp_path.rglob("*"))
    for form in ("hf", "slim", "safetensors"):
        assert main(["convert", str(source), str(tmp_path / form), "--to", form, "--quiet"]) == 0
    made = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert made == {"hf", "slim", "safetensors", "safetensors.manifest.json"}

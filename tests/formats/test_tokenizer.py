"""The tokenizer: ids never change on the way through Hugging Face folders and GGUF keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import Tokenizer, from_gguf, gguf_keys, hf_files, load
from neoxconv.synthetic import tiny
from tests.fixtures import fixture

ROOT = Path(__file__).parents[2]
SOURCES = {
    "tiny": None,
    "cut": "neox_2022_tp2_pp4/tiny_tokenizer.json",
    "trained": "trained_tp2_pp4/tokenizer.json",
    "20B": "20B_tokenizer.json",
}
TEXTS = (
    "",
    "Hello, world!  It's 12345 o'clock; they've said \"no\".",
    "def f(x):\n        if x:\n\t\treturn x  # two  three   four    \n" + " " * 60 + "end \r\n\r\n ",
    "naïve Ångström ½ ﬁ — “quoted” … Привет, мир! 你好世界。 مرحبا بالعالم",
    "e\u0301 A\u030a \u1100\u1161\u11a8 \u212b  \u0301 q\u0323\u0307 \u0958",
    "🙂👩🏽‍🚀🇩🇪 \x00\x01\x7f\u00a0\u2003\u3000\ufeff\U0010ffff",
    "<|endoftext|>a<|padding|> <|endoftext|>  <|endof",
    "[PAD50277] [PAD8190]",
)


@cache
def source(name: str) -> Tokenizer:
    path = SOURCES[name]
    return load(fixture(path)) if path else tiny()


def library(tokenizer: Tokenizer) -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_str(tokenizer.data.decode())


@cache
def both_ways(name: str) -> tuple[Any, Any]:
    """The library's tokenizer of the source, and of what came back from GGUF keys with some padding."""
    rows = library(source(name)).get_vocab_size() + 7
    return library(source(name)), library(from_gguf(gguf_keys(source(name), rows)))


def changed(change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    parsed = json.loads(tiny().data)
    change(parsed)
    return Tokenizer(json.dumps(parsed).encode())


def fields(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer")}


@pytest.fixture(scope="module")
def written_by_llama_cpp() -> dict[str, Any]:
    return fields(fixture("trained_tp2_pp4/llama_quantize/Q8_0.gguf"))


def test_keys_equal_those_that_llama_cpp_wrote(written_by_llama_cpp: dict[str, Any]) -> None:
    ours = gguf_keys(source("trained"), 8192)
    assert {key: ours[key] for key in written_by_llama_cpp} == written_by_llama_cpp
    assert set(ours) - set(written_by_llama_cpp) == {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"}


def test_reading_what_llama_cpp_wrote_gives_the_tokenizer_of_the_run(written_by_llama_cpp: dict[str, Any]) -> None:
    found, expected = json.loads(from_gguf(written_by_llama_cpp).data), json.loads(source("trained").data)
    assert found["model"]["vocab"] == expected["model"]["vocab"]
    assert found["model"]["merges"] == [" ".join(pair) for pair in expected["model"]["merges"]]
    assert found["added_tokens"] == expected["added_tokens"]
    assert [found[key] for key in ("normalizer", "pre_tokenizer")] == [None, expected["pre_tokenizer"]]


def test_the_20b_tokenizer_has_the_counts_that_llama_cpp_gives_it() -> None:
    keys = gguf_keys(source("20B"), 50432)
    types, tokens = keys["tokenizer.ggml.token_type"], keys["tokenizer.ggml.tokens"]
    assert [types.count(kind) for kind in (1, 3, 4, 5)] == [50252, 2, 23, 155]
    assert tokens[50254:50277] == [" " * run for run in range(24, 1, -1)]
    assert (tokens[50277], tokens[50431]) == ("[PAD50277]", "[PAD50431]")
    assert keys["tokenizer.ggml.pre"] == "olmo"
    assert [keys[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown")] == [0, 0, 0]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_survive_gguf(name: str, text: str) -> None:
    before, after = both_ways(name)
    assert after.encode(text).ids == before.encode(text).ids
    assert after.decode(before.encode(text).ids) == before.decode(before.encode(text).ids)


@pytest.mark.parametrize("name", SOURCES)
@settings(deadline=None, max_examples=150)
@given(text=st.text() | st.text(" \n\ta'sé\u0301e0<|") | st.sampled_from(TEXTS).flatmap(st.permutations).map("".join))
def test_ids_of_any_text_survive_gguf(name: str, text: str) -> None:
    before, after = both_ways(name)
    assert after.encode(text).ids == before.encode(text).ids


@pytest.mark.parametrize("name", SOURCES)
def test_keys_and_added_tokens_survive_gguf(name: str) -> None:
    rows = library(source(name)).get_vocab_size() + 7
    keys = gguf_keys(source(name), rows)
    before, after = (json.loads(tokenizer.data)["added_tokens"] for tokenizer in (source(name), from_gguf(keys)))
    assert gguf_keys(from_gguf(keys), rows) == keys
    assert after == before


@pytest.mark.parametrize("name", SOURCES)
def test_the_list_of_tokens_is_the_librarys(name: str) -> None:
    tokenizer, keys = library(source(name)), gguf_keys(source(name), 60000)
    size = tokenizer.get_vocab_size()
    assert keys["tokenizer.ggml.tokens"][:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert keys["tokenizer.ggml.token_type"].count(5) == 60000 - size


def unpadded(parsed: dict[str, Any]) -> None:
    parsed["added_tokens"].pop(1)
    parsed["model"]["vocab"]["unused"] = parsed["model"]["vocab"].pop("<|padding|>")


def digits_apart(parsed: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, parsed["pre_tokenizer"]]}


HF_CLASSES: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "tiny": (tiny, "GPTNeoXTokenizerFast"),
    "trained": (lambda: source("trained"), "PreTrainedTokenizerFast"),
    "20B": (lambda: source("20B"), "GPTNeoXTokenizerFast"),
    "20B through GGUF": (lambda: from_gguf(gguf_keys(source("20B"), 50432)), "GPTNeoXTokenizerFast"),
    "not composing": (lambda: changed(lambda p: p.update(normalizer=None)), "PreTrainedTokenizerFast"),
    "unpadded": (lambda: changed(unpadded), "PreTrainedTokenizerFast"),
    "digits apart": (lambda: changed(digits_apart), "PreTrainedTokenizerFast"),
}


@pytest.mark.parametrize("make, kind", HF_CLASSES.values(), ids=HF_CLASSES)
def test_transformers_reads_the_folder_as_the_source(make: Callable[[], Tokenizer], kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files, expected = hf_files(make(), 2048), library(make())
    for file, data in {**files, "config.json": b'{"model_type": "gpt_neox"}'}.items():
        (tmp_path / file).write_bytes(data)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    assert files["tokenizer.json"] == make().data
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == kind
    assert [found(text)["input_ids"] for text in TEXTS] == [expected.encode(text).ids for text in TEXTS]
    assert (len(found), found.model_max_length) == (expected.get_vocab_size(), 2048)
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (0, 0, 0)
    assert found.decode(found(TEXTS[2])["input_ids"]) == TEXTS[2]


def test_tiny_is_whole_and_always_the_same() -> None:
    tokenizer = library(tiny())
    assert tiny() == tiny()
    assert tokenizer.get_vocab_size() == 2 + 256 + 14 + 4
    assert [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|padding|>", "!")] == [0, 1, 2]
    assert all(tokenizer.decode(tokenizer.encode(chr(i)).ids) == chr(i) for i in (0, 32, 65, 173, 255, 0x1F600))


def test_the_real_tokenizer_loads_in_little_memory_and_without_libraries() -> None:
    script = (
        "import resource, sys; from pathlib import Path; from neoxconv.formats.tokenizer import gguf_keys, load\n"
        "UNIT = 1 << (20 if sys.platform == 'darwin' else 10)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); gguf_keys(load(Path(sys.argv[1])), 50432); print((peak() - before) // UNIT)\n"
        "assert not {'torch', 'tokenizers', 'transformers', 'numba'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(fixture("20B_tokenizer.json"))]
    assert int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout) < 64


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "is empty"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b"[]", "no section `model`"),
        (b'{"hello": 5}', "no section `model`"),
        (b'{"model": {"type": "Unigram"}}', "Unigram vocabulary"),
        (b'{"model": {"type": "BPE"}, "decoder": {"type": "Metaspace"}}', "'Metaspace'"),
        (changed(lambda p: p["model"].update(vocab={"a": -1})).data, "vocabulary"),
        (changed(lambda p: p["model"].update(vocab={"a": True})).data, "vocabulary"),
        (changed(lambda p: p["model"].update(merges=["a b c"])).data, "merges"),
        (changed(lambda p: p["model"].update(merges=[["a", 1]])).data, "merges"),
        (changed(lambda p: p.update(added_tokens=[{"id": 1}])).data, "added tokens"),
        (changed(lambda p: p["added_tokens"][2].update(content="\ud800")).data, "Unicode"),
        (tiny().data.replace(b"<|endoftext|>", b"</s>"), "nothing says which token ends a text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_what_is_no_byte_level_bpe_is_refused(data: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=found) as caught:
        gguf_keys(load(tmp_path / "tokenizer.json"), 1000)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda p: p.update(normalizer={"type": "NFKC"}), "NFKC"),
        (lambda p: p["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
        (lambda p: p["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
        (lambda p: p.update(post_processor={"type": "RobertaProcessing"}), "post_processor"),
        (lambda p: p["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda p: p["added_tokens"][2].update(lstrip=True), "neighbouring"),
        (lambda p: p["added_tokens"][2].update(id=1000), "has id 1000 but programs read it as 272"),
        (lambda p: p["model"]["vocab"].update({"#": 2}), "275 ids"),
    ],
)
def test_what_gguf_cannot_say_is_refused(change: Callable[[dict[str, Any]], object], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        gguf_keys(changed(change), 1024)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused() -> None:
    assert len(gguf_keys(tiny(), 276)["tokenizer.ggml.tokens"]) == 276
    with pytest.raises(CheckpointError, match=r"last id is 275 .* 275 rows"):
        gguf_keys(tiny(), 275)


def test_the_library_too_numbers_added_tokens_itself() -> None:
    renumbered = changed(lambda p: p["added_tokens"][2].update(id=1000))
    assert library(renumbered).token_to_id(" " * 8) == library(tiny()).token_to_id(" " * 8) == 272


def test_a_token_that_looks_special_is_a_control_token_for_llama_cpp() -> None:
    other = changed(lambda p: p["added_tokens"][2].update(content="<|user|>"))
    assert [gguf_keys(each, 276)["tokenizer.ggml.token_type"][272] for each in (tiny(), other)] == [4, 3]


@pytest.mark.parametrize("pairs", [str.split, str])
def test_merges_may_be_pairs_or_texts(pairs: Callable[[str], Any]) -> None:
    other = changed(lambda p: p["model"].update(merges=[pairs(merge) for merge in p["model"]["merges"]]))
    assert gguf_keys(other, 300) == gguf_keys(tiny(), 300)


@pytest.mark.parametrize("extra", ["[PAD5]", "new"])
def test_ids_beyond_a_gap_are_kept(extra: str) -> None:
    keys = gguf_keys(tiny(), 300)
    keys["tokenizer.ggml.tokens"][299], keys["tokenizer.ggml.token_type"][299] = extra, 4
    assert library(from_gguf(keys)).encode(f"a{extra}").ids[-1] == 299


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("model", "llama", "llama tokenizer"),
        ("pre", "tekken", "'tekken'"),
        ("pre", [], r"\[\]"),
        ("tokens", 5, "0 tokens"),
        ("tokens", [["a"]] * 276, "276 tokens"),
        ("token_type", [1], "276 tokens .* 1 found"),
        ("token_type", [6] * 276, "types"),
        ("tokens", ["<|endoftext|>"] * 276, "twice"),
        ("merges", ["ab"], "merges"),
    ],
)
def test_keys_of_another_family_or_damaged_keys_are_refused(key: str, value: object, found: str) -> None:
    keys = {**gguf_keys(tiny(), 276), f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=found):
        from_gguf(keys)

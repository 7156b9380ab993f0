"""Tokenizers in GGUF: llama.cpp gives the ids that the tokenizers library gives; settings are as gguf reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import END, PADDING, Tokenizer, differences, from_gguf, gguf_keys
from neoxconv.formats.tokenizer.gguf import GPT_4, QWEN_2
from neoxconv.formats.tokenizer.special import TAKEN_FOR_SPECIAL
from neoxconv.synthetic import tiny
from tests.oracles import program
from tests.texts import SCRIPTS, odd_strings, of_llama_cpp, strings
from tests.toy import toy


@cache
def trained(kind: str) -> Any:
    """A tokenizer of the library whose text is split as `kind` says, trained on the strings."""
    tokenizers = program("tokenizers")
    split = tokenizers.pre_tokenizers
    plain, cut = split.ByteLevel(add_prefix_space=False), split.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = {
        "starcoder": [split.Digits(individual_digits=True), plain],
        "llama-bpe": [split.Split(tokenizers.Regex(GPT_4), "isolated"), cut],
        "dbrx": [split.Split(tokenizers.Regex(GPT_4), "isolated"), cut],
        "qwen2": [split.Split(tokenizers.Regex(QWEN_2), "isolated"), cut],
    }.get(kind, [plain])
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama-bpe"))
    made.normalizer = tokenizers.normalizers.NFC() if kind == "olmo" else None
    made.pre_tokenizer = steps[0] if len(steps) == 1 else split.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=split.ByteLevel.alphabet(), special_tokens=[END, PADDING], show_progress=False
    )
    made.train_from_iterator([f"{text}\n" for text in SCRIPTS * 3], trainer)
    return made


KINDS = ("gpt-2", "olmo", "starcoder", "llama-bpe", "dbrx", "qwen2")


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_the_library(kind: str, tmp_path: Path) -> None:
    library = trained(kind)
    keys = gguf_keys(Tokenizer(library.to_str().encode()), 1010)
    assert keys["tokenizer.ggml.pre"] == kind
    texts = strings()
    found = of_llama_cpp(keys, tmp_path, texts)
    other = [text for text, ids in zip(texts, found, strict=True) if ids != library.encode(text).ids]
    assert len({*texts}) > 200 and not other


@pytest.mark.parametrize("kind", KINDS)
def test_ids_survive_gguf_and_back(kind: str) -> None:
    library = trained(kind)
    keys = gguf_keys(Tokenizer(library.to_str().encode()), 1010)
    back = program("tokenizers").Tokenizer.from_str(from_gguf(keys).data.decode())
    assert [back.encode(text).ids for text in strings()] == [library.encode(text).ids for text in strings()]


def with_settings(tokenizer: Tokenizer, **settings: Any) -> Tokenizer:
    return Tokenizer(tokenizer.data, beside={"tokenizer_config.json": json.dumps(settings).encode()})


def test_what_begins_ends_and_fills_a_text_is_as_the_settings_say() -> None:
    names = {"bos_token": END, "eos_token": {"content": PADDING}, "pad_token": PADDING, "unk_token": END}
    keys = gguf_keys(with_settings(tiny(), **names, add_bos_token=True, chat_template="{{ x }}"), 276)
    special = {key: value for key, value in keys.items() if not isinstance(value, list)}
    assert special == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "olmo",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }
    back = from_gguf(keys)
    assert gguf_keys(back, 276) == keys


def test_a_template_of_one_token_first_is_said_as_a_setting() -> None:
    framed = json.loads(tiny().data)
    framed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    keys = gguf_keys(with_settings(Tokenizer(json.dumps(framed).encode()), bos_token=END, eos_token=END), 276)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)
    framed["post_processor"]["single"][0]["SpecialToken"]["id"] = PADDING
    with pytest.raises(CheckpointError, match=r"a post_processor that adds '<\|padding\|>'"):
        gguf_keys(with_settings(Tokenizer(json.dumps(framed).encode()), bos_token=END, eos_token=END), 276)


def test_ids_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(CheckpointError, match="token 50256 pad, but the model has 276 rows"):
        gguf_keys(tiny(), 276, {"pad_token_id": 50256})


@pytest.mark.parametrize("missing", ["pre", "token_type"])
def test_an_old_file_is_read(missing: str) -> None:
    keys = gguf_keys(tiny(), 300)
    old = {key: value for key, value in keys.items() if key != f"tokenizer.ggml.{missing}"}
    assert from_gguf(old).ids.items() >= tiny().ids.items()


# --- sentencepiece's families -----------------------------------------------------------------------------------------

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL = [*NAMES.values()]
PIECES = ("Unigram", "Unigram in words", "BPE", "BPE with a space first")


@cache
def of_pieces(kind: str) -> str:
    """A tokenizer.json of a family of sentencepiece's, trained on the strings."""
    tokenizers = program("tokenizers")
    unigram, words = kind.startswith("Unigram"), kind != "Unigram"
    made = tokenizers.Tokenizer(tokenizers.models.Unigram() if unigram else tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=words)
    settings = {"vocab_size": 1600, "show_progress": False}
    texts = [*(f"{text}\n" for text in SCRIPTS * 4 if END not in text), "aaaaa aaa"]
    if unigram:
        made.train_from_iterator(
            texts, tokenizers.trainers.UnigramTrainer(special_tokens=SPECIAL, unk_token="<unk>", **settings)
        )
        parsed = json.loads(made.to_str())
        parsed["model"]["vocab"] = [[text, float(np.float32(score))] for text, score in parsed["model"]["vocab"]]
        return json.dumps(parsed)
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(special_tokens=first, **settings))
    parsed = json.loads(made.to_str())
    parsed["added_tokens"] = parsed["added_tokens"][:3]
    model = parsed["model"]
    model |= {"byte_fallback": True, "fuse_unk": True, "merges": all_merges(model["merges"], model["vocab"])}
    if "first" in kind:
        parsed["pre_tokenizer"] = None
        parsed["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    return json.dumps(parsed)


def all_merges(merges: list[list[str]], vocab: dict[str, int]) -> list[list[str]]:
    """Every way to make each token of two, as transformers makes merges of sentencepiece's scores."""
    made = dict.fromkeys(left + right for left, right in merges)
    found = []
    for text in made:
        pairs = [[text[:i], text[i:]] for i in range(1, len(text)) if {text[:i], text[i:]} <= vocab.keys()]
        found += sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)
    return found


def named(text: str) -> Tokenizer:
    """With settings that name the special tokens."""
    return with_settings(Tokenizer(text.encode()), **NAMES)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", PIECES)
def test_llama_cpp_gives_the_ids_of_sentencepieces_families(kind: str, tmp_path: Path) -> None:
    library = program("tokenizers").Tokenizer.from_str(of_pieces(kind))
    keys = gguf_keys(named(of_pieces(kind)), 1700)
    assert keys["tokenizer.ggml.model"] == ("t5" if kind.startswith("Unigram") else "llama")
    texts = [text for text in strings() if text] + odd_strings()
    found = of_llama_cpp(keys, tmp_path, texts)
    assert not [text for text, ids in zip(texts, found, strict=True) if ids != library.encode(text).ids]


@pytest.mark.parametrize("kind", PIECES)
def test_ids_of_sentencepieces_families_survive_gguf_and_back(kind: str) -> None:
    load = program("tokenizers").Tokenizer.from_str
    keys = gguf_keys(named(of_pieces(kind)), 1700)
    back = from_gguf(keys)
    library, again = load(of_pieces(kind)), load(back.data.decode())
    texts = strings() + odd_strings()
    assert [again.encode(text).ids for text in texts] == [library.encode(text).ids for text in texts]
    assert gguf_keys(back, 1700) == keys


UNLIKE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a space first": ("Unigram", lambda p: p["pre_tokenizer"].update(prepend_scheme="always"), "pre_tokenizer"),
    "NFKC": ("Unigram", lambda p: p.update(normalizer={"type": "NFKC"}), "normalizer"),
    "bytes": ("Unigram", lambda p: p["model"].update(byte_fallback=True), "byte_fallback"),
    "float64": ("Unigram", lambda p: p["model"]["vocab"][9].__setitem__(1, -3.1), "scores of more than float32"),
    "inner spaces": ("Unigram", lambda p: p["pre_tokenizer"].update(split=True), "tokens with spaces inside"),
    "end of text": ("Unigram", lambda p: p["model"]["vocab"].append([END, -9.0]), "as ordinary tokens and not special"),
    "no merge": ("BPE", lambda p: p["model"]["merges"].pop(5), "merges that are not all ways"),
    "other order": ("BPE", lambda p: p["model"]["merges"].append(p["model"]["merges"][0]), "merges that are not all"),
    "no byte": ("BPE", lambda p: p["model"]["vocab"].update({"<x>": p["model"]["vocab"].pop("<0x41>")}), "<0x41>"),
    "normalized": ("BPE with a space first", lambda p: p["added_tokens"][1].update(normalized=True), "are normalized"),
}


@pytest.mark.parametrize("change", UNLIKE)
def test_what_llama_cpp_has_not_is_refused_or_the_nearest(change: str) -> None:
    kind, change_it, words = UNLIKE[change]
    parsed = json.loads(of_pieces(kind))
    change_it(parsed)
    changed = named(json.dumps(parsed))
    with pytest.raises(CheckpointError, match=words) as caught:
        gguf_keys(changed, 1700)
    assert "--allow-other-tokens" in str(caught.value)
    assert [words in fault for fault in differences(changed)] == [True]
    nearest = gguf_keys(changed, 1700, others=True)
    assert nearest["tokenizer.ggml.model"] == ("t5" if kind == "Unigram" else "llama")
    assert len(nearest["tokenizer.ggml.scores"]) == 1700


@pytest.mark.oracle
def test_the_differences_are_real(tmp_path: Path) -> None:
    parsed = json.loads(of_pieces("Unigram in words"))
    parsed["pre_tokenizer"]["prepend_scheme"] = "always"
    keys = gguf_keys(named(json.dumps(parsed)), 1700, others=True)
    library = program("tokenizers").Tokenizer.from_str(json.dumps(parsed))
    texts = ["a b", " a b"]
    same = [x == library.encode(text).ids for text, x in zip(texts, of_llama_cpp(keys, tmp_path, texts), strict=True)]
    assert same == [True, False]


def with_ordinary(text: str) -> Tokenizer:
    """The tiny tokenizer with one more ordinary token, which no merges make."""
    parsed = json.loads(tiny().data)
    parsed["model"]["vocab"][text] = 272
    for token in parsed["added_tokens"]:
        token["id"] += token["id"] >= 272
    return Tokenizer(json.dumps(parsed).encode())


@pytest.mark.oracle
def test_which_texts_llama_cpp_takes_for_special_tokens(tmp_path: Path) -> None:
    """By ids: llama.cpp finds such a token within a text, the library makes it of its bytes; others are alike."""
    plain = ("<|fim_sep|>", "<fim_repo>", "<fim-sep>", "<s>", "<unk>", "<pad>", "<mask>", "▁<EOT>", "<|user|>", "the")
    taken = set()
    for text in [*TAKEN_FOR_SPECIAL - {END}, *plain]:
        words = with_ordinary(text)
        library = program("tokenizers").Tokenizer.from_str(words.data.decode())
        keys = gguf_keys(words, 300, others=True)
        [found] = of_llama_cpp(keys, tmp_path, [f"a{text}b"])
        taken |= {text} if found != library.encode(f"a{text}b").ids else set()
        assert (272 in found) == (text in taken)
        assert bool(differences(words)) == (text in taken)
    assert taken == TAKEN_FOR_SPECIAL - {END}


def test_ordinary_tokens_that_llama_cpp_takes_for_special_ones_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"byte-level BPE and has '</s>' as ordinary tokens and not special ones"):
        gguf_keys(with_ordinary("</s>"), 300)
    assert gguf_keys(with_ordinary("</s>"), 300, others=True)["tokenizer.ggml.token_type"][272] == 1
    assert not differences(with_ordinary("<s>"))


def test_other_words_of_byte_level_are_the_nearest_only_where_allowed() -> None:
    other = Tokenizer(tiny().data.replace(b'"type": "NFC"', b'"type": "NFKC"'))
    with pytest.raises(CheckpointError, match="normalizer"):
        gguf_keys(other, 276)
    assert gguf_keys(other, 276, others=True)["tokenizer.ggml.pre"] == "gpt-2"


def test_the_nearest_is_written_with_a_note_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run(make_plan(open_checkpoint(toy(tmp_path, rows=1664)), Recipe("hf")), tmp_path / "hf")
    parsed = json.loads(of_pieces("Unigram"))
    parsed["normalizer"] = {"type": "NFKC"}
    (source / "tokenizer.json").write_text(json.dumps(parsed))
    (source / "tokenizer_config.json").write_text(json.dumps({**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}))
    words = ["convert", str(source), str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "F16"]
    assert main(words) == 1
    assert "Unigram" in capsys.readouterr().err
    assert main([*words, "--allow-other-tokens"]) == 0
    said = "".join(capsys.readouterr())
    assert "llama.cpp gives some texts other ids than the source's tokenizer" in said and "NFKC" in said
    assert main(["verify", str(source), str(tmp_path / "m.gguf")]) == 0

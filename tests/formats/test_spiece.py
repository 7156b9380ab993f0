"""sentencepiece's own files: read as its library reads them, and in GGUF with the ids that its library gives."""

# ruff: noqa: RUF001  (strings in many scripts are the point)

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import Tokenizer, charsmap, differences, from_gguf, gguf_keys, spiece
from neoxconv.formats.tokenizer.gguf import told
from tests.little_llamas import little_llama
from tests.oracles import program
from tests.texts import SCRIPTS, odd_strings, of_llama_cpp, strings
from tests.toy import toy

ROWS = 1700
BARE = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}  # nothing before a text, all spaces kept
PLAIN = {"normalization_rule_name": "identity"}  # characters as they are
BPE = {"model_type": "bpe", "byte_fallback": True}
LLAMA = {**BPE, **PLAIN, "remove_extra_whitespaces": False}

ALIKE: dict[str, dict[str, Any]] = {
    "T5": {},
    "T5 with extra tokens": {"control_symbols": ["<extra_id_0>", "<sep>"], "pad_id": 3},
    "Unigram": {**BARE, **PLAIN},
    "Unigram in NFKC": BARE,
    "Unigram in lower case": {**BARE, "normalization_rule_name": "nmt_nfkc_cf"},
    "Unigram with the user's tokens": {**BARE, "user_defined_symbols": ["<sep>", "def"]},
    "Llama 2": LLAMA,
    "BPE": {**LLAMA, **BARE},
    "BPE with the user's tokens": {**LLAMA, **BARE, "user_defined_symbols": ["<sep>", "def", "de"]},
}
UNLIKE: dict[str, tuple[dict[str, Any], str, str]] = {  # options, the fault, a text whose ids differ
    "bytes": ({**BARE, "byte_fallback": True}, "byte_fallback", "a€"),
    "spaces alone": ({"remove_extra_whitespaces": False}, "a text of spaces alone", "  "),
    "no space first": ({"add_dummy_prefix": False}, "remove_extra_whitespaces without add_dummy_prefix", "a b"),
    "▁ at the end": (PLAIN, "is cut off where it ends a text", "a▁"),
    "user's": ({"user_defined_symbols": ["<sep>"]}, "a token of the user's", "a<sep>b"),
    "user's spaces": ({**LLAMA, **BARE, "user_defined_symbols": ["  "]}, "a token of the user's with spaces", "a  b"),
    "overlap": ({**LLAMA, **BARE, "user_defined_symbols": ["<a", "abc"]}, "that can overlap", "<abc"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "a space after a text", "a b"),
    "BPE normalized": ({**BPE, **BARE}, "characters that are replaced in BPE", "ａ"),
    "BPE merged": ({**BPE, **PLAIN}, "spaces that are merged in BPE", "a  b"),
}


@cache
def trained(**options: Any) -> bytes:
    """A model of sentencepiece's, trained on the strings."""
    made = io.BytesIO()
    texts = [f"{line}" for text in SCRIPTS * 4 for line in text.split("\n") if "<|" not in line] + ["aaaaa aaa"] * 3
    settings = {"vocab_size": 900, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 1.0} | options
    settings |= {name: ",".join(value) for name, value in settings.items() if isinstance(value, tuple)}
    trainer = program("sentencepiece").SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_writer=made, **settings)
    return made.getvalue()


def model(options: dict[str, Any]) -> bytes:
    return trained(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})


def alone(data: bytes, **beside: Any) -> Tokenizer:
    """The tokenizer of a folder without tokenizer.json."""
    return Tokenizer(b"", beside={"spiece.model": data, **{name: json.dumps(v).encode() for name, v in beside.items()}})


def library(data: bytes) -> Any:
    return program("sentencepiece").SentencePieceProcessor(model_proto=data)


def score(made: Any, ids: Sequence[int]) -> float:
    return sum(made.get_score(i) for i in ids)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ALIKE)
def test_llama_cpp_gives_the_ids_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    data = model(ALIKE[kind])
    made = library(data)
    keys = gguf_keys(alone(data), ROWS)
    texts = [text for text in strings() if text and "<|" not in text] + odd_strings()
    found = zip(texts, of_llama_cpp(keys, tmp_path, texts), strict=True)
    other = {text: ids for text, ids in found if ids != made.encode(text)}
    # Equally good: sentencepiece decides by the last bit of a float32 sum.
    ties = {t: ids for t, ids in other.items() if abs(score(made, ids) - score(made, made.encode(t))) < 1e-4}
    assert ties == other and len(other) <= (2 if "T5" in kind or "Unigram" in kind else 0)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", UNLIKE)
def test_what_llama_cpp_does_otherwise_is_refused_or_the_nearest(kind: str, tmp_path: Path) -> None:
    options, words, text = UNLIKE[kind]
    data = model(options)
    with pytest.raises(CheckpointError) as caught:
        gguf_keys(alone(data), ROWS)
    assert words in str(caught.value) and "--allow-other-tokens" in str(caught.value)
    assert [words in fault for fault in differences(alone(data))] == [True]
    nearest = gguf_keys(alone(data), ROWS, others=True)
    assert nearest["tokenizer.ggml.model"] == ("llama" if options.get("model_type") == "bpe" else "t5")
    assert of_llama_cpp(nearest, tmp_path, [text, "zz"])[0] != library(data).encode(text)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", [{"model_type": "word"}, {"model_type": "char"}])
def test_other_models_are_named(kind: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match=f"is sentencepiece's {kind['model_type'].upper()}"):
        gguf_keys(alone(model(kind)), ROWS, others=True)


@pytest.mark.oracle
def test_bpe_without_bytes_is_refused() -> None:
    assert "no token <0x00> for a byte" in differences(alone(model({**LLAMA, "byte_fallback": False})))[0]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ALIKE)
def test_pieces_are_read_as_the_library_reads_them(kind: str) -> None:
    data = model(ALIKE[kind])
    made, read = library(data), spiece.read(data, "x")
    types = {spiece.UNKNOWN: made.is_unknown, spiece.CONTROL: made.is_control, spiece.BYTE: made.is_byte}
    assert [piece.text for piece in read.pieces] == [made.id_to_piece(i) for i in range(made.get_piece_size())]
    assert [piece.score for piece in read.pieces] == [made.get_score(i) for i in range(len(read.pieces))]
    for i, piece in enumerate(read.pieces):
        assert {type for type, is_it in types.items() if is_it(i)} == {piece.type} & {*types}
    ids = {"unk": made.unk_id(), "bos": made.bos_id(), "eos": made.eos_id(), "pad": made.pad_id()}
    assert {name: made.piece_to_id(text) for name, text in read.special.items()} == {
        name: i for name, i in ids.items() if i >= 0
    }


@pytest.mark.oracle
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
def test_characters_are_replaced_as_the_library_replaces_them(rule: str) -> None:
    data = model({**BARE, "normalization_rule_name": rule})
    table, normalizer = (
        spiece.read(data, "x").charsmap,
        program("sentencepiece").SentencePieceNormalizer(model_proto=data),
    )
    chars = [chr(i) for i in range(1, 0x20000) if not 0xD800 <= i < 0xE000 and not 0x300 <= i < 0x370]
    for char in chars:
        found = charsmap.replaced(table, char)
        assert normalizer.normalize(char) == (char if found is None else found).replace(" ", "▁"), ascii(char)
    assert charsmap.makes_spaces(table) == (rule == "nmt_nfkc")


@pytest.mark.oracle
def test_special_tokens_are_the_files_or_the_settings() -> None:
    data = model({"control_symbols": ["<sep>"], "pad_id": 3})
    keys = gguf_keys(alone(data), ROWS)
    names = ("bos", "eos", "unknown", "padding")
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in names] == [1, 2, 0, 3]
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)
    settings = {"eos_token": "<sep>", "tokenizer_class": "T5Tokenizer", "chat_template": "{{ x }}"}
    keys = gguf_keys(alone(data, **{"tokenizer_config.json": settings}), ROWS)
    assert keys["tokenizer.ggml.eos_token_id"] == 4 and keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.oracle
def test_tokens_beside_the_file_are_added(tmp_path: Path) -> None:
    data = model({**BARE, **PLAIN})
    count = len(spiece.read(data, "x").pieces)
    detail = {str(count + 1): {"content": "<|im|>", "special": True}}
    words = alone(
        data, **{"added_tokens.json": {"<new>": count}, "tokenizer_config.json": {"added_tokens_decoder": detail}}
    )
    keys = gguf_keys(words, ROWS)
    assert keys["tokenizer.ggml.tokens"][count : count + 3] == ["<new>", "<|im|>", f"[PAD{count + 2}]"]
    assert keys["tokenizer.ggml.token_type"][count : count + 3] == [spiece.USER_DEFINED, spiece.CONTROL, spiece.UNUSED]
    assert words.count == count + 2
    assert of_llama_cpp(keys, tmp_path, ["a<new>b<|im|>"])[0] == [
        *library(data).encode("a"), count, *library(data).encode("b"), count + 1,
    ]  # fmt: skip
    clash = alone(data, **{"added_tokens.json": {"<new>": 5}})
    assert "an added token '<new>' as 5" in differences(clash)[0]
    with pytest.raises(CheckpointError, match=f"last id is {count + 1} but the embedding has {count} rows"):
        gguf_keys(words, count)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["T5", "Unigram", "Llama 2", "BPE"])
def test_they_come_back_from_gguf_as_a_tokenizer_json(kind: str) -> None:
    keys = gguf_keys(alone(model(ALIKE[kind])), ROWS)
    back = from_gguf(keys)
    made, again = library(model(ALIKE[kind])), program("tokenizers").Tokenizer.from_str(back.data.decode())
    texts = [text for text in strings() if "<|" not in text]
    other = [text for text in texts if again.encode(text).ids != made.encode(text)]
    unigram = ["tokenizer.ggml.scores"] if kind in ("T5", "Unigram") else []
    assert len(other) <= len(unigram)  # of ties
    again_keys = gguf_keys(back, ROWS)  # the library has no scores for BPE's characters
    assert {name for name in keys if keys[name] != again_keys[name]} <= {"tokenizer.ggml.scores"} - {*unigram}


# --- a map of characters in a tokenizer.json --------------------------------------------------------------------------


def spelled(old: bool) -> tuple[Any, Any]:
    """Normalizers and splitter that transformers has for T5, in version 4 and before and after it."""
    split = program("tokenizers").pre_tokenizers
    normal = program("tokenizers").normalizers
    always = split.Metaspace(prepend_scheme="always", split=True)
    if not old:
        return [], split.Sequence([split.WhitespaceSplit(), always])
    return [normal.Strip(left=False), normal.Replace(program("tokenizers").Regex(" {2,}"), "▁")], always


def of_t5(*, old: bool, rule: str = "nmt_nfkc", scheme: str = "always") -> Tokenizer:
    tokenizers = program("tokenizers")
    read = spiece.read(model({"normalization_rule_name": rule}), "x")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(p.text, p.score) for p in read.pieces], unk_id=0))
    rest, splitter = spelled(old)
    made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Precompiled(read.charsmap), *rest])
    made.pre_tokenizer = splitter if scheme == "always" else tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(made.to_str().encode(), beside={"tokenizer_config.json": json.dumps(settings).encode()})


@pytest.mark.oracle
@pytest.mark.parametrize("old", [True, False])
def test_a_map_of_characters_is_written_where_spaces_are_merged(old: bool, tmp_path: Path) -> None:
    words = of_t5(old=old)
    keys = gguf_keys(words, ROWS)
    parsed = json.loads(words.data)["normalizer"]["normalizers"][0]
    assert bytes(keys["tokenizer.ggml.precompiled_charsmap"]) == base64.b64decode(parsed["precompiled_charsmap"])
    made = program("tokenizers").Tokenizer.from_str(words.data.decode())
    texts = [text for text in strings() if text]
    found = zip(texts, of_llama_cpp(keys, tmp_path, texts), strict=True)
    assert not [text for text, ids in found if ids != made.encode(text).ids]
    assert "decomposed accents" in told(words)[0]


@pytest.mark.oracle
@pytest.mark.parametrize(("changed", "text"), [({"rule": "nfkc"}, "a\n"), ({"scheme": "never"}, "a\r\nb")])
def test_a_map_that_llama_cpp_uses_otherwise_is_refused(changed: dict[str, str], text: str, tmp_path: Path) -> None:
    words = of_t5(old=True, **changed)
    assert "normalizer" in differences(words)[0]
    made = program("tokenizers").Tokenizer.from_str(words.data.decode())
    keys = gguf_keys(words, ROWS, others=True)
    assert of_llama_cpp(keys, tmp_path, [text])[0] != made.encode(text).ids


# --- files that are damaged, and whole folders ------------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def message(*fields: tuple[int, Any]) -> bytes:
    """Numbers and values: whole numbers, float32, texts and messages."""
    made = b""
    for number, value in fields:
        if isinstance(value, int):
            made += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            made += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode() if isinstance(value, str) else value
            made += varint(number << 3 | 2) + varint(len(data)) + data
    return made


PIECES = [
    (1, message((1, "<unk>"), (2, 0.0), (3, 2))),
    (1, message((1, "</s>"), (3, 3))),
    (1, message((1, "a"), (2, -1.5))),
]
SMALL = message(*PIECES, (2, message((3, 1))), (3, message((3, 0), (4, 0))))


def test_a_file_is_read_field_by_field() -> None:
    read = spiece.read(SMALL + message((9, 2.0), (3, message((5, 0)))), "x")
    assert read.pieces == (("<unk>", 0.0, 2), ("</s>", 0.0, 3), ("a", -1.5, 1))
    assert (read.kind, read.prefix, read.merged, read.byte_fallback) == ("Unigram", False, False, False)
    assert read.special == {"unk": "<unk>", "eos": "</s>"} and "not written as ▁" in read.odd[0]


def test_a_file_cut_anywhere_is_read_or_refused() -> None:
    for end in range(len(SMALL)):
        try:
            spiece.read(SMALL[:end], "x")
        except CheckpointError as error:
            assert str(error).startswith("x: ")


DAMAGED = {
    "no pieces": (message((2, message((3, 1)))), "has no pieces"),
    "no unknown": (message(*PIECES[1:]), "0 pieces of type unknown"),
    "twice": (message(*PIECES, PIECES[2]), "4 pieces but 3 texts"),
    "no text": (message(*PIECES, (1, message((2, -1.0)))), "without a text"),
    "type": (message(*PIECES, (1, message((1, "b"), (3, 9)))), "of type 9"),
    "no UTF-8": (message((1, message((1, b"\xff")))), "not UTF-8"),
    "a group": (b"\x0b", "a field of kind 3"),
    "no end": (b"\x08" + b"\xff" * 20, "has no end"),
    "short": (b"\x0a\x7fabc", "ends at byte 5, expected 129"),
    "a number for a piece": (message((1, 5)), "where bytes are expected"),
    "a piece for a number": (message(*PIECES, (2, message((3, "x")))), "is not a number"),
    "no float": (message((1, message((1, "a"), (2, "lon")))), "a score is no float32"),
    "not finite": (message((1, message((1, "a"), (2, float("nan"))))), "a score is nan"),
    "JSON": (b'{"model": {}}', "is no file of sentencepiece's"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_named(kind: str) -> None:
    data, words = DAMAGED[kind]
    with pytest.raises(CheckpointError, match=words) as caught:
        gguf_keys(alone(data), ROWS, others=True)
    assert "give another" in str(caught.value)


def test_a_file_of_too_many_fields_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spiece, "_MOST_FIELDS", 100)
    with pytest.raises(CheckpointError, match="more than 100 fields"):
        spiece.read(message((1, 1)) * 101, "x")


def of_sentencepiece(folder: Path, data: bytes, name: str = "spiece.model") -> Path:
    """A Hugging Face folder whose tokenizer is sentencepiece's file alone."""
    source = run(make_plan(open_checkpoint(toy(folder, rows=1024)), Recipe("hf")), folder / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "manifest.json"):
        (source / file).unlink(missing_ok=True)
    (source / name).write_bytes(data)
    return source


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_a_folder_with_the_file_alone_becomes_gguf(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = of_sentencepiece(tmp_path, SMALL, name)
    target = str(tmp_path / "m.gguf")
    assert main(["convert", str(source), target, "--to", "gguf", "--type", "F16"]) == 0
    said = "".join(capsys.readouterr())
    assert f"{name}: 3 tokens for 1024 rows" in said and "float64" in said
    assert main(["verify", str(source), target]) == 0
    keys = open_checkpoint(Path(target)).index.settings
    assert keys["tokenizer.ggml.tokens"][:3] == ["<unk>", "</s>", "a"]
    assert keys["tokenizer.ggml.eos_token_id"] == 1 and keys["tokenizer.ggml.scores"][2] == -1.5


def test_the_nearest_is_written_where_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = of_sentencepiece(tmp_path, message(*PIECES, (2, message((3, 1), (35, 1)))))
    words = ["convert", str(source), str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "F16"]
    assert main(words) == 1
    assert "byte_fallback" in capsys.readouterr().err
    assert main([*words, "--allow-other-tokens"]) == 0
    assert "it has no byte_fallback" in "".join(capsys.readouterr())
    assert main(["verify", str(source), str(tmp_path / "m.gguf")]) == 0


@pytest.mark.oracle
def test_a_map_of_characters_is_written_as_bytes(tmp_path: Path) -> None:
    source = of_sentencepiece(tmp_path, model({}))
    target = tmp_path / "m.gguf"
    assert main(["convert", str(source), str(target), "--to", "gguf", "--type", "F16"]) == 0
    reader = program("gguf").GGUFReader(target)
    field = reader.fields["tokenizer.ggml.precompiled_charsmap"]
    assert [kind.name for kind in field.types] == ["ARRAY", "UINT8"]
    assert bytes(field.contents()) == spiece.read(model({}), "x").charsmap
    made = program("llama_cpp").Llama(str(target), vocab_only=True, verbose=False)
    assert made.tokenize("The ﬁrst".encode(), add_bos=False) == library(model({})).encode("The ﬁrst")


@pytest.mark.parametrize(("eos", "expected"), [(2, 2), (3, 0)], ids=["special", "a letter"])
def test_an_end_that_is_special_is_kept_whatever_the_settings_say(eos: int, expected: int, tmp_path: Path) -> None:
    """Chat models often have another end in tokenizer_config.json than in config.json: both are the source's own."""
    source = little_llama(tmp_path / "hf", bos_token_id=1, eos_token_id=2)
    for path in source.glob("*token*"):
        path.unlink()
    (source / "tokenizer.model").write_bytes(trained(bos_id=1, eos_id=eos, pad_id=-1))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<unk>"}))
    made = run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, expected)

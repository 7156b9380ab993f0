"""Tokenizers in GGUF: llama.cpp gives the ids that the tokenizers library gives; settings are as gguf reads them."""

# ruff: noqa: RUF001  (strings in many scripts are the point)

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import END, PADDING, Tokenizer, from_gguf, gguf_keys
from neoxconv.formats.tokenizer.gguf import GPT_4, QWEN_2
from neoxconv.synthetic import tiny
from tests.oracles import program

SCRIPTS = (
    "The quick brown fox jumps over the lazy dog. I've told you it's 3:45 o'clock; WE'LL see, they'd say.",
    "Größe und Übermut täten selten gut, sagte der Bär um 12 Uhr.",
    "L'été dernier, j'ai mangé des crêpes à Orléans où il pleuvait.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ποιος είναι;",
    "いろはにほへと ちりぬるを。東京タワーは333メートルです。カタカナ",
    "我想在apple工作1314151天～你好，世界！",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣٤",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "அறிவியலும் தொழில்நுட்பமும்",
    "আমি বাংলায় গান গাই ১২৩",
    "ሰላም ለሁሉም",
    "ვეპხის ტყაოსანი",
    "Բել դղյակի ձախ ժամն օֆ",
    "កាន់តែពិសេសអាច",
    "မြန်မာဘာသာ",
    "Tiếng Việt rất đẹp và khó",
    "İstanbul'da ılık bir gün",
    "བོད་སྐད་ ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ພາສາລາວ සිංහල",
    'def f(x):\n    return x ** 2 + 0xFF  # note\n\n\tif (a<=b && c!=d) { printf("%d\\n", 42); }',
    "🚀 (normal) 😶‍🌫️ 👩‍👩‍👧‍👦 ✅ 🦙🦙 ❤️🇯🇵",
    "∑ᵢ xᵢ² ≤ √2 · π ≈ 3.14159e-10",
    "a  b   c    d\t\te\n\n\nf \n g   ",
    "3 33 333 3333 33333 333333 3.3 3..3 1,000,000 ²³ Ⅷ ½",
    "------======= '''''```\"\"\"......!!!!!!?????? «quoted» “quotes” …—–",
    f"{END}Hello{END} there {PADDING}",
    "I'M you'RE it'S\r\n\r\n \u00a0nbsp\u3000wide\u2003em",
)


def strings() -> list[str]:
    """Those, six pieces of each cut anywhere, and runs of white space: more than two hundred."""
    draw = random.Random(7)
    pieces = []
    for text in SCRIPTS:
        for _ in range(6):
            start = draw.randrange(len(text))
            pieces.append(text[start : draw.randrange(start, len(text)) + 1])
    return [*SCRIPTS, *pieces, *(" " * n for n in range(1, 9)), *("\n" * n for n in range(1, 4))]


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
    llama_cpp, gguf = program("llama_cpp"), program("gguf")
    library = trained(kind)
    keys = gguf_keys(Tokenizer(library.to_str().encode()), 1010)
    assert keys["tokenizer.ggml.pre"] == kind
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "gptneox")
    writer.add_context_length(64)
    for key, value in keys.items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(tmp_path / "words.gguf"), vocab_only=True, verbose=False)
    given = {text: model.tokenize(text.encode(), add_bos=False, special=True) for text in strings()}
    other = [text for text, ids in given.items() if ids != library.encode(text).ids]
    assert len(given) > 200 and not other


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

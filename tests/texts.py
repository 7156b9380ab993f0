"""Texts in twenty scripts, and the ids that llama.cpp gives for them."""

# ruff: noqa: RUF001  (strings in many scripts are the point)

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from neoxconv.formats.tokenizer import END, PADDING
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


def odd_strings() -> list[str]:
    """Characters of all scripts, and few ones often, in any order."""
    draw = random.Random(3)
    pools = "".join(SCRIPTS), " aaeb▁<s>/"
    return ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 40))) for _ in range(500)]


def of_llama_cpp(keys: dict[str, Any], folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids that llama.cpp gives for texts with the tokenizer that the keys describe."""
    llama_cpp, gguf = program("llama_cpp"), program("gguf")
    writer = gguf.GGUFWriter(folder / "words.gguf", "gptneox")
    writer.add_context_length(64)
    for key, value in keys.items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, bytes(value) if key.endswith("charsmap") else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(folder / "words.gguf"), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]

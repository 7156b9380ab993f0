"""Tokenizers of sentencepiece's families, without an alphabet of bytes: their texts write a space as `▁`.

Unigram is llama.cpp's model `t5`, BPE with byte fallback its model `llama`. They are read of a tokenizer.json
(`pieces_json`) or of sentencepiece's own file (`from_spiece`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from neoxconv.formats.tokenizer.spiece import CONTROL, USER_DEFINED

SPACE = "▁"
UNIGRAM, BPE = "t5", "llama"  # llama.cpp's names
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNUSED_SCORE = -10_000.0  # of rows without a token, as llama.cpp's converter has it: never the better choice


@dataclass(frozen=True)
class Pieces:
    """`ids` of all texts, added tokens included, `scores` of those that have one; `prefix`: a space before a text.

    `types` are those of texts that are no normal tokens; `merged`: spaces beside spaces, and at the ends, are removed;
    `charsmap`: see `charsmap.py`. `faults` are what the tokenizer has and llama.cpp has not, in words: with none of
    them its ids are the library's, but for what `told` says.
    """

    model: str
    ids: Mapping[str, int]
    scores: Mapping[str, float]
    unknown: str | None
    types: Mapping[str, int]
    prefix: bool
    faults: tuple[str, ...]
    merged: bool = False
    charsmap: bytes = b""
    told: tuple[str, ...] = ()


def type_of(token: Mapping[str, Any]) -> int:
    """An added token's; llama.cpp's converter also takes one that merely looks special (`<|...|>`) for one."""
    text = token["content"]
    return CONTROL if token.get("special") or (text.startswith("<|") and text.endswith("|>")) else USER_DEFINED


def splits(vocab: Iterable[str], added: Iterable[str]) -> Iterable[tuple[str, str]]:
    """All pairs that llama.cpp would join: it knows no merges, only that the result is a token.

    A character that is no token stands for itself there, while the library has made bytes of it.
    """
    texts = {*vocab}
    for text in texts - {*added} - {*BYTES}:
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if (left in texts or len(left) == 1) and (right in texts or len(right) == 1):
                yield left, right


def as_float32(number: float) -> float:
    """The number that GGUF stores."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])

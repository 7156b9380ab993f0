"""A tokenizer.json made here, as the tokenizers library spells it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from neoxconv.formats.json_text import as_json

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
STRIPPING = ("single_word", "lstrip", "rstrip")


def added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    """An added token as tokenizer.json spells it."""
    plain = dict.fromkeys(STRIPPING, False)
    return {"id": index, "content": text, **plain, "normalized": not special, "special": special}


def tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[str],
    added: Any,
    normalizer: Any,
    splitter: Any = BYTE_LEVEL,
    **options: Any,
) -> bytes:
    """A tokenizer.json of byte-level BPE."""
    model = {"type": "BPE", **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")), "fuse_unk": False}
    stages = {"normalizer": normalizer, "pre_tokenizer": splitter}
    stages |= dict.fromkeys(("post_processor", "decoder"), BYTE_LEVEL)
    model |= {**options, "vocab": vocab, "merges": list(merges)}
    return as_json({"version": "1.0", "added_tokens": added, **stages, "model": model})


def alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes in the order of their code points: printable Latin-1, then U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]

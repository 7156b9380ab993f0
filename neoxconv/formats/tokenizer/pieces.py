"""Tokenizers of sentencepiece's families, without an alphabet of bytes: their texts write a space as `▁`.

Unigram is llama.cpp's model `t5`, BPE with byte fallback its model `llama`. Which of them it encodes exactly as the
tokenizers library does was read in src/llama-vocab.cpp (llm_tokenizer_ugm, llm_tokenizer_spm) and measured: equal ids
on the strings of tests/formats/test_tokenizer_gguf.py.

It cannot: put a space before a text but not before one that begins with a space (Metaspace `first` and `always`), fall
back to bytes in Unigram, normalize as the library does (a Precompiled map is applied to graphemes there, to the longest
match here), or hold scores of more than float32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer.byte_level import SURROGATE, are_ids, merge, numbered
from neoxconv.formats.tokenizer.files import Tokenizer

_SPACE = "▁"
UNIGRAM, BPE = "t5", "llama"  # llama.cpp's names
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNUSED_SCORE = -10_000.0  # of rows without a token, as llama.cpp's converter has it: never the better choice
_NEVER = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False}
_LLAMA_2 = {  # the normalizer that transformers makes of sentencepiece's for Llama 2: a space before every text
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}


@dataclass(frozen=True)
class Pieces:
    """`ids` of all texts, added tokens included, `scores` of those that have one; `prefix`: a space before a text.

    `faults` are what the tokenizer has and llama.cpp has not, in words: with none of them its ids are the library's.
    """

    model: str
    ids: Mapping[str, int]
    scores: Mapping[str, float]
    unknown: str | None
    prefix: bool
    faults: tuple[str, ...]


def pieces(tokenizer: Tokenizer) -> Pieces | None:
    """What a tokenizer.json of these families says; None for one of another family.

    Raises CheckpointError where the vocabulary, the merges or the added tokens are none.
    """
    parsed = tokenizer.parsed
    model, decoder = parsed["model"], parsed.get("decoder")
    byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
    if model.get("type") == "Unigram":
        return _unigram(tokenizer, model)
    return (
        _bpe(tokenizer, model) if model.get("type") == "BPE" and model.get("byte_fallback") and not byte_level else None
    )


def _unigram(tokenizer: Tokenizer, model: Mapping[str, Any]) -> Pieces:
    entries = model.get("vocab")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise CheckpointError(f"{tokenizer.name}: its Unigram vocabulary is not a list of texts and scores.")
    scores = {text: float(score) for text, score in entries}
    if len(scores) < len(entries):
        raise CheckpointError(f"{tokenizer.name}: its Unigram vocabulary has a text twice. Repair the file.")
    ids, added = _ids(tokenizer, {text: i for i, text in enumerate(scores)})
    at = model.get("unk_id")
    unknown = entries[at][0] if type(at) is int and 0 <= at < len(entries) else None
    normal = [score for text, score in scores.items() if text not in added]
    faults = (
        *_stages(tokenizer.parsed, ids, added),
        *(["byte_fallback"] if model.get("byte_fallback") else []),
        *([] if unknown in added else ["an unknown token that is not among its added tokens"]),
        *([] if all(as_float32(score) == score for score in normal) else ["scores of more than float32"]),
        *([] if normal and min(normal) == min(scores.values()) else ["a special token of the lowest score"]),
    )
    return Pieces(UNIGRAM, ids, scores, unknown, _prefix(tokenizer.parsed), faults)


def _is_entry(entry: Any) -> bool:
    fits = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and entry[0] != ""
    return fits and type(entry[1]) in (int, float) and abs(entry[1]) < 1e30


def _bpe(tokenizer: Tokenizer, model: Mapping[str, Any]) -> Pieces:
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not are_ids(vocab.values()):
        raise CheckpointError(f"{tokenizer.name}: its vocabulary is not a table of texts and ids.")
    if not isinstance(merges, list) or not all(map(merge, merges)):
        raise CheckpointError(f"{tokenizer.name}: its merges are not a list of pairs.")
    ids, added = _ids(tokenizer, vocab)
    pairs = [tuple(merge(pair).split(" ")) for pair in merges]
    made = [text for text, _ in groupby(left + right for left, right in pairs)]
    ranks = {text: float(-rank) for rank, text in enumerate(made)}
    options = [
        key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges") if model.get(key)
    ]
    lacking = [text for text in BYTES if text not in vocab]
    faults = (
        *_stages(tokenizer.parsed, ids, added),
        *([f"BPE with {', '.join(options)}"] if options else []),
        *([f"no token {lacking[0]} for a byte"] if lacking else []),
        *([] if len(ranks) == len(made) and {*pairs} == {*_splits(vocab, added)} else [
            "merges that are not all ways to join two tokens, in the order of what they make",
        ]),
    )  # fmt: skip
    unknown = model.get("unk_token")
    scores = {text: ranks.get(text, float(-len(made))) for text in ids}
    return Pieces(BPE, ids, scores, unknown if unknown in ids else None, _prefix(tokenizer.parsed), faults)


def _splits(vocab: Iterable[str], added: Iterable[str]) -> Iterable[tuple[str, str]]:
    """All pairs that llama.cpp would join: it knows no merges, only that the result is a token.

    A character that is no token stands for itself there, while the library has made bytes of it.
    """
    texts = {*vocab}
    for text in texts - {*added} - {*BYTES}:
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if (left in texts or len(left) == 1) and (right in texts or len(right) == 1):
                yield left, right


def _ids(tokenizer: Tokenizer, vocab: Mapping[str, int]) -> tuple[dict[str, int], set[str]]:
    """The id of every text, and the added tokens."""
    parsed = tokenizer.parsed
    added = parsed["added_tokens"]
    fits = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and are_ids([token.get("id")])
        for token in added
    )
    if not fits:
        raise CheckpointError(f"{tokenizer.name}: its added tokens lack texts or ids.")
    ids = numbered(tokenizer, {**parsed, "model": {"vocab": vocab}})
    if SURROGATE.search("\n".join(ids)):
        raise CheckpointError(f"{tokenizer.name}: a token is not valid Unicode.")
    return ids, {token["content"] for token in added}


def _prefix(parsed: Mapping[str, Any]) -> bool:
    """Whether the nearest that llama.cpp has puts a space before a text."""
    splitter = parsed.get("pre_tokenizer")
    scheme = splitter.get("prepend_scheme", "always") if isinstance(splitter, dict) else "never"
    return parsed.get("normalizer") == _LLAMA_2 or scheme != "never"


def _stages(parsed: Mapping[str, Any], ids: Iterable[str], added: set[str]) -> Iterable[str]:
    """What of normalizer, pre-tokenizer and special texts llama.cpp has not."""
    normalizer, splitter, model = parsed.get("normalizer"), parsed.get("pre_tokenizer"), parsed["model"]["type"]
    whole = normalizer == _LLAMA_2 and splitter is None and model == "BPE"
    if not whole and normalizer is not None:
        yield f"normalizer {normalizer!r:.60}"
    if not whole and not _is_never(splitter):
        yield f"pre_tokenizer {splitter!r:.100}"
    elif splitter is not None and splitter.get("split", True) and any(_SPACE in text[1:] for text in {*ids} - added):
        yield "words split before spaces, and tokens with spaces inside"
    elif model == "Unigram" and _SPACE not in ids:
        yield f"no token {_SPACE}"
    if whole and any(token.get("normalized") for token in parsed["added_tokens"]):
        yield "added tokens that are normalized"


def _is_never(splitter: Any) -> bool:
    """Whether it is Metaspace that puts nothing before a text."""
    return isinstance(splitter, dict) and {**splitter, "split": False} == _NEVER


def as_float32(number: float) -> float:
    """The number that GGUF stores."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def unigram_json(entries: Sequence[tuple[str, float]], unknown: int | None, added: Any) -> bytes:
    """A tokenizer.json of Unigram that llama.cpp encodes alike, with nothing before a text."""
    model = {"type": "Unigram", "unk_id": unknown, "vocab": [list(entry) for entry in entries], "byte_fallback": False}
    split = not any(_SPACE in text[1:] for text, _ in entries)
    return _whole(model, added, None, {**_NEVER, "split": split})


def bpe_json(scores: Mapping[str, float], unknown: str | None, added: Any, *, prefix: bool) -> bytes:
    """A tokenizer.json of BPE with byte fallback, its merges made of the `scores` of the texts in the order of ids."""
    ids = {text: i for i, text in enumerate(scores)}
    pairs = [(pair, pair[0] + pair[1]) for pair in _splits(scores, [token["content"] for token in added])]
    order = sorted(pairs, key=lambda item: (-scores[item[1]], ids[item[1]], [ids.get(part, 0) for part in item[0]]))
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": ids, "merges": [list(pair) for pair, _ in order],
    }  # fmt: skip
    return _whole(model, added, *((_LLAMA_2, None) if prefix else (None, _NEVER)))


def _whole(model: Any, added: Any, normalizer: Any, splitter: Any) -> bytes:
    """The file; its decoder writes spaces for `▁` and characters for bytes."""
    steps = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    stages = {"normalizer": normalizer, "pre_tokenizer": splitter, "post_processor": None}
    decoder = {"type": "Sequence", "decoders": steps}
    return as_json({"version": "1.0", "added_tokens": added, **stages, "decoder": decoder, "model": model})

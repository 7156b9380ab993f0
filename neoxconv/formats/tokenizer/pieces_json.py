"""Tokenizers of sentencepiece's families as tokenizer.json: read, and made.

Which of them llama.cpp encodes exactly as the tokenizers library does was read in src/llama-vocab.cpp
(llm_tokenizer_ugm, llm_tokenizer_spm) and measured: equal ids on the strings of tests/formats/test_tokenizer_gguf.py.

It cannot: put a space before a text but not before one that begins with a space (Metaspace `first` and `always`, unless
spaces are merged as T5's tokenizers do), fall back to bytes in Unigram, normalize as the library does (a Precompiled
map is applied to graphemes there, to the longest match here: with merged spaces the ids are equal but for decomposed
characters, without them a line end of two characters differs too), or hold scores of more than float32.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer.byte_level import SURROGATE, are_ids, merge, numbered
from neoxconv.formats.tokenizer.charsmap import makes_spaces
from neoxconv.formats.tokenizer.files import Tokenizer
from neoxconv.formats.tokenizer.pieces import BPE, BYTES, SPACE, UNIGRAM, Pieces, as_float32, splits, type_of
from neoxconv.formats.tokenizer.spiece import BYTE, UNKNOWN

_NEVER = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
_LLAMA_2 = {  # the normalizer that transformers makes of sentencepiece's for Llama 2: a space before every text
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
# How transformers says that spaces are merged, behind a map of characters: normalizers, and splitters before Metaspace.
_MERGING: tuple[tuple[list[Any], list[Any]], ...] = (
    (
        [
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
        ],
        [],
    ),
    ([], [{"type": "WhitespaceSplit"}]),
)
_ALWAYS = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always"}
_CLUSTERS = (
    "llama.cpp replaces characters as sentencepiece does, the tokenizers library other ones where marks are combined: "
    "decomposed accents and jamo may have other ids than in transformers"
)


def of_json(tokenizer: Tokenizer) -> Pieces | None:
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
    charsmap, merged = _merging(tokenizer.parsed)
    alike = merged and makes_spaces(charsmap)
    faults = (
        *(_whole_words(tokenizer.parsed, ids, added) if alike else _stages(tokenizer.parsed, ids, added)),
        *(["byte_fallback"] if model.get("byte_fallback") else []),
        *([] if unknown in added else ["an unknown token that is not among its added tokens"]),
        *([] if all(as_float32(score) == score for score in normal) else ["scores of more than float32"]),
        *([] if normal and min(normal) == min(scores.values()) else ["a special token of the lowest score"]),
    )
    types = _types(tokenizer, unknown)
    prefix, told = _prefix(tokenizer.parsed), (_CLUSTERS,) if alike else ()
    return Pieces(UNIGRAM, ids, scores, unknown, types, prefix, faults, merged, charsmap, told)


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
        *([] if len(ranks) == len(made) and {*pairs} == {*splits(vocab, added)} else [
            "merges that are not all ways to join two tokens, in the order of what they make",
        ]),
    )  # fmt: skip
    unknown = model.get("unk_token")
    unknown = unknown if unknown in ids else None
    scores = {text: ranks.get(text, float(-len(made))) for text in ids}
    types = _types(tokenizer, unknown) | dict.fromkeys(BYTES, BYTE)
    return Pieces(BPE, ids, scores, unknown, types, _prefix(tokenizer.parsed), faults)


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


def _types(tokenizer: Tokenizer, unknown: str | None) -> dict[str, int]:
    types = {token["content"]: type_of(token) for token in tokenizer.parsed["added_tokens"]}
    return types | ({unknown: UNKNOWN} if unknown else {})


def _prefix(parsed: Mapping[str, Any]) -> bool:
    """Whether the nearest that llama.cpp has puts a space before a text."""
    splitter = steps_of(parsed, "pre_tokenizer", "pretokenizers")[-1:]
    schemes = [step.get("prepend_scheme", "always") for step in splitter if isinstance(step, dict)]
    return parsed.get("normalizer") == _LLAMA_2 or schemes not in ([], ["never"])


def steps_of(parsed: Mapping[str, Any], stage: str, inner: str) -> list[Any]:
    """The steps of a stage; of a single one that one, of none none."""
    found = parsed.get(stage)
    if isinstance(found, dict) and found.get("type") == "Sequence" and isinstance(found.get(inner), list):
        return list(found[inner])
    return [] if found is None else [found]


def _merging(parsed: Mapping[str, Any]) -> tuple[bytes, bool]:
    """The map of characters that comes first, and whether spaces are merged as `remove_extra_whitespaces` means it."""
    normalizers = steps_of(parsed, "normalizer", "normalizers")
    splitters = steps_of(parsed, "pre_tokenizer", "pretokenizers")
    charsmap = b""
    if normalizers and isinstance(normalizers[0], dict) and normalizers[0].get("type") == "Precompiled":
        charsmap = _decoded(normalizers.pop(0).get("precompiled_charsmap"))
    last = splitters.pop() if splitters else None
    return charsmap, _is_always(last) and (normalizers, splitters) in _MERGING


def _is_always(splitter: Any) -> bool:
    """Whether it is Metaspace that puts a space before every text; older files spell it `add_prefix_space`."""
    said = {**_ALWAYS, **splitter} if isinstance(splitter, dict) else {}
    return {name: value for name, value in said.items() if name not in ("split", "add_prefix_space")} == _ALWAYS


def _decoded(text: Any) -> bytes:
    """The bytes that base64 spells; none where it is no base64."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (TypeError, ValueError):
        return b""


def _whole_words(parsed: Mapping[str, Any], ids: Iterable[str], added: set[str]) -> Iterable[str]:
    """What of a tokenizer that merges spaces llama.cpp has not."""
    splitters = steps_of(parsed, "pre_tokenizer", "pretokenizers")
    if (len(splitters) > 1 or splitters[0].get("split", True)) and any(SPACE in text[1:] for text in {*ids} - added):
        yield "words split before spaces, and tokens with spaces inside"
    if any(token.get("normalized") for token in parsed["added_tokens"]):
        yield "added tokens that are normalized"


def _stages(parsed: Mapping[str, Any], ids: Iterable[str], added: set[str]) -> Iterable[str]:
    """What of normalizer, pre-tokenizer and special texts llama.cpp has not."""
    normalizer, splitter, model = parsed.get("normalizer"), parsed.get("pre_tokenizer"), parsed["model"]["type"]
    whole = normalizer == _LLAMA_2 and splitter is None and model == "BPE"
    if not whole and normalizer is not None:
        yield f"normalizer {normalizer!r:.60}"
    if not whole and not _is_never(splitter):
        yield f"pre_tokenizer {splitter!r:.100}"
    elif splitter is not None and splitter.get("split", True) and any(SPACE in text[1:] for text in {*ids} - added):
        yield "words split before spaces, and tokens with spaces inside"
    elif model == "Unigram" and SPACE not in ids:
        yield f"no token {SPACE}"
    if whole and any(token.get("normalized") for token in parsed["added_tokens"]):
        yield "added tokens that are normalized"


def _is_never(splitter: Any) -> bool:
    """Whether it is Metaspace that puts nothing before a text."""
    return isinstance(splitter, dict) and {**splitter, "split": False} == _NEVER


def unigram_json(
    entries: Sequence[tuple[str, float]], unknown: int | None, added: Any, merged: bytes | None = None
) -> bytes:
    """A tokenizer.json of Unigram that llama.cpp encodes alike, with nothing before a text.

    With a map of characters, `merged`, spaces are merged and one stands before a text.
    """
    model = {"type": "Unigram", "unk_id": unknown, "vocab": [list(entry) for entry in entries], "byte_fallback": False}
    split = not any(SPACE in text[1:] for text, _ in entries)
    if merged is None:
        return _whole(model, added, None, {**_NEVER, "split": split})
    charsmap = binascii.b2a_base64(merged, newline=False).decode()
    steps = [{"type": "Precompiled", "precompiled_charsmap": charsmap}, *_MERGING[0][0]]
    return _whole(model, added, {"type": "Sequence", "normalizers": steps}, {**_ALWAYS, "split": split})


def bpe_json(scores: Mapping[str, float], unknown: str | None, added: Any, *, prefix: bool) -> bytes:
    """A tokenizer.json of BPE with byte fallback, its merges made of the `scores` of the texts in the order of ids."""
    ids = {text: i for i, text in enumerate(scores)}
    pairs = [(pair, pair[0] + pair[1]) for pair in splits(scores, [token["content"] for token in added])]
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
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    stages = {"normalizer": normalizer, "pre_tokenizer": splitter, "post_processor": None}
    decoder = {"type": "Sequence", "decoders": steps}
    return as_json({"version": "1.0", "added_tokens": added, **stages, "decoder": decoder, "model": model})

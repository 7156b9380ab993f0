"""Byte-level BPE: the tokenizers of GPT-2, GPT-NeoX and most of their relatives.

A token's text is spelt in GPT-2's alphabet, where each byte is one printable character (a space is `Ġ`); only added
tokens, such as the 20B tokenizer's runs of spaces, stand as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer.files import END, JSON, PADDING, SETTINGS, SPECIAL, Tokenizer
from neoxconv.formats.tokenizer.made import BYTE_LEVEL, STRIPPING

_OTHER = "It belongs to another model; name the right one with --tokenizer."
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, no other format can
NFC = {"type": "NFC"}


def byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer.json says. Raises CheckpointError where that is not byte-level BPE."""
    parsed = tokenizer.parsed
    if found := _misfit(parsed):
        raise CheckpointError(f"{tokenizer.name}: {found}.")
    return parsed


def _misfit(parsed: Mapping[str, Any]) -> str | None:
    """What keeps `parsed` from being a byte-level BPE tokenizer.json, in words; None for nothing."""
    model, decoder = parsed["model"], parsed.get("decoder")
    kinds = model.get("type"), decoder.get("type") if isinstance(decoder, dict) else None
    if kinds != ("BPE", "ByteLevel"):
        return f"its model is {kinds[0]!r} and its decoder {kinds[1]!r}, not 'BPE' and 'ByteLevel'"
    vocab, merges, added = model.get("vocab"), model.get("merges"), parsed["added_tokens"]
    if not isinstance(vocab, dict) or not are_ids(vocab.values()):
        return "its vocabulary is not a table of texts and ids"
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "its added tokens are not a list of objects"
    contents = [token.get("content") for token in added]
    if not all(isinstance(text, str) for text in contents) or not are_ids(token.get("id") for token in added):
        return "its added tokens lack texts or ids"
    if not isinstance(merges, list) or not all(merge(pair) for pair in merges):
        return "its merges are not a list of pairs"
    return "a token is not valid Unicode" if SURROGATE.search("\n".join({*vocab, *contents})) else None


def are_ids(found: Iterable[Any]) -> bool:
    """Whether all are whole numbers from 0 on."""
    return all(type(index) is int and index >= 0 for index in found)


def merge(pair: Any) -> str:
    """A merge as "left right", whether it is stored so or as a list of two; empty where it is neither."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    fits = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)
    return " ".join(parts) if fits else ""


def check_rows(tokenizer: Tokenizer, rows: int) -> dict[str, int]:
    """The ids by text. Raises CheckpointError where one is beyond an embedding of `rows` rows."""
    ids = numbered(tokenizer, byte_level(tokenizer))
    check_ids(tokenizer, ids, rows)
    return ids


def check_ids(tokenizer: Tokenizer, ids: Mapping[str, int], rows: int) -> None:
    """Raise CheckpointError where one of the `ids` is beyond an embedding of `rows` rows."""
    last = max(ids.values(), default=0)
    if last >= rows:
        raise CheckpointError(f"{tokenizer.name}: its last id is {last} but the embedding has {rows} rows. {_OTHER}")


def numbered(tokenizer: Tokenizer, parsed: Mapping[str, Any]) -> dict[str, int]:
    """The id of every text, added tokens included, as the tokenizers library numbers them when it loads the file."""
    ids: dict[str, int] = dict(parsed["model"]["vocab"])
    following = len(ids)
    for token in parsed["added_tokens"]:
        index = ids.setdefault(token["content"], following)
        if index != token["id"]:
            found = f"added token {token['content']!r} has id {token['id']} but programs read it as {index}"
            raise CheckpointError(f"{tokenizer.name}: {found}. Repair the file, or name another with --tokenizer.")
        following = max(following, index + 1)
    if len(set(ids.values())) < len(ids):
        found = f"has {len(ids)} tokens but {len(set(ids.values()))} ids"
        raise CheckpointError(f"{tokenizer.name}: {found}. Repair the file, or name another with --tokenizer.")
    return ids


def hf_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files for a Hugging Face folder of a model of `context` positions: the source's own, as they are.

    Where the source has no settings for transformers, they are made, so that no id changes.
    """
    own = {JSON: tokenizer.data} if tokenizer.data and not (tokenizer.built and SETTINGS in tokenizer.beside) else {}
    files = {**own, **tokenizer.beside}
    if SETTINGS in files or not tokenizer.data:
        return files
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END) if END in tokenizer.ids else {}
    exact = {"add_prefix_space": False, "clean_up_tokenization_spaces": False} if special else {}
    settings = {**exact, **special, "model_max_length": context, "tokenizer_class": _class_of(tokenizer)}
    made = {SETTINGS: as_json(settings), **({SPECIAL: as_json(special)} if special else {})}
    return files | {name: data for name, data in made.items() if name not in files}


def _class_of(tokenizer: Tokenizer) -> str:
    """The class that changes no id: transformers 5 builds GPTNeoXTokenizerFast anew, always with NFC and padding."""
    if not tokenizer.ids:  # what cannot be looked into is carried all the same
        return "PreTrainedTokenizerFast"
    parsed = tokenizer.parsed
    plain = parsed.get("normalizer") == NFC and same_splitter(parsed.get("pre_tokenizer"), BYTE_LEVEL)
    like_20b = plain and not _misfit(parsed) and {END, PADDING} <= tokenizer.ids.keys() and not _strange(parsed)
    return "GPTNeoXTokenizerFast" if like_20b else "PreTrainedTokenizerFast"


def _strange(parsed: Mapping[str, Any]) -> bool:
    """Whether the tokenizer does more than GPT-NeoX's: BPE with options, tokens around a text, greedy added tokens."""
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    after = parsed.get("post_processor")
    greedy = any(token.get(key) for token in parsed["added_tokens"] for key in STRIPPING)
    framed = isinstance(after, dict) and after.get("type") != "ByteLevel"
    return any(parsed["model"].get(key) for key in options) or greedy or framed


def same_splitter(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a ByteLevel pre-tokenizer cuts as `wanted` does; offsets do not change ids."""
    return isinstance(found, dict) and {**wanted, **found, "trim_offsets": True} == {**wanted, "trim_offsets": True}

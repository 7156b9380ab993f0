"""The tokenizer: one tokenizer.json of byte-level BPE, found near a checkpoint and carried into other formats and back.

Its bytes are kept, not its tables: Hugging Face folders get the very same file, GGUF keys are computed when asked for.
A token's text is spelt in GPT-2's alphabet, where each byte is one printable character (a space is `Ġ`); only added
tokens, such as the 20B tokenizer's runs of spaces, stand as they are.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from neoxconv.errors import CheckpointError, raise_all
from neoxconv.storage import Place, open_storage

END, PADDING = "<|endoftext|>", "<|padding|>"  # gpt-neox looks them up by these texts
_WANTED = f"A byte-level BPE tokenizer.json with a token {END} is wanted; name one with --tokenizer."
_OTHER = "It belongs to another model; name the right one with --tokenizer."
_MAX_BYTES = 1 << 28
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, no other format can

_TYPES = _NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # of tokens in GGUF

# llama.cpp splits text alike for all three and never composes characters; for us the name tells what comes first.
NORMALIZERS = {"olmo": {"type": "NFC"}, "gpt-2": None, "mpt": {"type": "NFC"}}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_STRIPPING = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class Tokenizer:
    """The bytes of a tokenizer.json, and the file they were read from (None: made here)."""

    data: bytes
    path: Place | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path or "tokenizer")

    @cached_property
    def parsed(self) -> dict[str, Any]:
        """What `data` says. Raises CheckpointError where that is not a byte-level BPE tokenizer.json."""
        try:
            parsed = json.loads(self.data.decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: is not JSON ({error}). {_WANTED}") from error
        found = _misfit(parsed)
        if found:
            raise CheckpointError(f"{self.name}: {found}. {_WANTED}")
        return {**parsed, "added_tokens": parsed.get("added_tokens") or []}


def load(path: Place) -> Tokenizer:
    """The tokenizer in the file `path`. Raises CheckpointError where that is not a byte-level BPE tokenizer.json."""
    tokenizer = Tokenizer(read_bytes(path), path)
    _ = tokenizer.parsed  # raises for what is no tokenizer
    return tokenizer


def check_rows(tokenizer: Tokenizer, rows: int) -> dict[str, int]:
    """The ids by text. Raises CheckpointError where one is beyond an embedding of `rows` rows."""
    ids = _ids(tokenizer, tokenizer.parsed)
    last = max(ids.values())
    if last >= rows:
        raise CheckpointError(f"{tokenizer.name}: its last id is {last} but the embedding has {rows} rows. {_OTHER}")
    return ids


def gguf_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys as llama.cpp's converter writes them, for an embedding of `rows` rows.

    Types in GGUF: model and pre string; tokens and merges arrays of strings; token_type array of int32;
    bos_token_id, eos_token_id and unknown_token_id uint32; add_bos_token and add_eos_token bool.
    Raises CheckpointError where the tokenizer does what GGUF cannot say, or has an id beyond `rows`.
    """
    parsed = tokenizer.parsed
    raise_all(CheckpointError, (f"{tokenizer.name}: {problem}" for problem in _beyond_gguf(parsed)))
    ids = check_rows(tokenizer, rows)
    texts = {index: text for text, index in ids.items()}
    types = dict.fromkeys(texts, _NORMAL) | {ids[token["content"]]: _type(token) for token in parsed["added_tokens"]}
    keys = {
        "model": "gpt2",
        "pre": next(pre for pre, normalizer in NORMALIZERS.items() if normalizer == parsed.get("normalizer")),
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [types.get(i, _UNUSED) for i in range(rows)],
        "merges": [_merge(pair) for pair in parsed["model"]["merges"]],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"), ids[END]),
        **dict.fromkeys(("add_bos_token", "add_eos_token"), False),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def hf_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer for a model of `context` positions; tokenizer.json is the source's own."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    exact = {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    config = {**exact, **special, "model_max_length": context, "tokenizer_class": _hf_class(tokenizer.parsed)}
    made = {"tokenizer_config.json": _pretty(config), "special_tokens_map.json": _pretty(special)}
    return {"tokenizer.json": tokenizer.data, **made}


def from_gguf(keys: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` keys describe: equal ids, without the padding tokens; `where` is
    what messages name.

    Raises CheckpointError where the keys are missing, contradictory or not of byte-level BPE as gpt-2 splits it.
    """
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in tuple(NORMALIZERS):
        raise CheckpointError(
            f"{where}: tokenizer {model!r} of kind {pre!r} is not gpt2 of {[*NORMALIZERS]}. {_WANTED}"
        )
    found = [keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")]
    tokens, types, merges = (list(array) if isinstance(array, Iterable) else [] for array in found)
    texts = all(isinstance(text, str) for text in tokens)
    if not texts or len(tokens) != len(types) or any(kind not in _TYPES for kind in types):
        found_types = f"{len(tokens)} tokens need as many types of {_TYPES}, {len(types)} found"
        raise CheckpointError(f"{where}: {found_types}. {_WANTED}")
    kept = [(i, text, kind) for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED]
    # Added tokens stand in the vocabulary too: outside it the tokenizers library would number them anew.
    vocab = {text: i for i, text, _ in kept}
    if len(vocab) < len(kept):
        raise CheckpointError(f"{where}: {len(kept) - len(vocab)} of {len(kept)} tokens are there twice. {_WANTED}")
    added = [_added(i, text, kind == _CONTROL) for i, text, kind in kept if kind != _NORMAL]
    tokenizer = Tokenizer(_tokenizer_json(vocab, merges, added, NORMALIZERS[pre]))
    _ = tokenizer.parsed  # raises for what is no tokenizer
    return tokenizer


def read_bytes(path: Place) -> bytes:
    """The bytes of a file that may be a tokenizer. Raises CheckpointError for one that is far too large."""
    file = open_storage(path)
    if file.size > _MAX_BYTES:
        raise CheckpointError(f"{path}: has {file.size} bytes, a tokenizer at most {_MAX_BYTES}. {_WANTED}")
    return file.text()


def _misfit(parsed: Any) -> str | None:
    """What keeps `parsed` from being a byte-level BPE tokenizer.json, in words; None for nothing."""
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict):
        return "it has no section `model` (a vocabulary alone is not enough)"
    decoder = parsed.get("decoder")
    kinds = model.get("type"), decoder.get("type") if isinstance(decoder, dict) else None
    if kinds != ("BPE", "ByteLevel"):
        return f"its model is {kinds[0]!r} and its decoder {kinds[1]!r}, not 'BPE' and 'ByteLevel'"
    vocab, merges, added = model.get("vocab"), model.get("merges"), parsed.get("added_tokens") or []
    if not isinstance(vocab, dict) or not _are_ids(vocab.values()):
        return "its vocabulary is not a table of texts and ids"
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "its added tokens are not a list of objects"
    contents = [token.get("content") for token in added]
    if not all(isinstance(text, str) for text in contents) or not _are_ids(token.get("id") for token in added):
        return "its added tokens lack texts or ids"
    if not isinstance(merges, list) or not all(_merge(pair) for pair in merges):
        return "its merges are not a list of pairs"
    texts = {*vocab, *contents}
    if SURROGATE.search("\n".join(texts)):
        return "a token is not valid Unicode"
    return None if END in texts else f"it has no token {END}"


def _are_ids(found: Iterable[Any]) -> bool:
    return all(type(index) is int and index >= 0 for index in found)


def _merge(pair: Any) -> str:
    """A merge as "left right", whether it is stored so or as a list of two; empty where it is neither."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    fits = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)
    return " ".join(parts) if fits else ""


def _hf_class(parsed: Mapping[str, Any]) -> str:
    """The class that changes no id: transformers 5 builds GPTNeoXTokenizerFast anew, always with NFC and padding."""
    padded = PADDING in {*parsed["model"]["vocab"], *(token["content"] for token in parsed["added_tokens"])}
    like_20b = padded and parsed.get("normalizer") == NORMALIZERS["olmo"] and not _beyond_gguf(parsed)
    return "GPTNeoXTokenizerFast" if like_20b else "PreTrainedTokenizerFast"


def _beyond_gguf(parsed: Mapping[str, Any]) -> list[str]:
    """What this tokenizer does that llama.cpp, with the keys we write, would not do."""
    splitter, after = parsed.get("pre_tokenizer"), parsed.get("post_processor")
    options = [key for key in _OPTIONS if parsed["model"].get(key)]
    greedy = [token["content"] for token in parsed["added_tokens"] if any(token.get(key) for key in _STRIPPING)]
    plain = isinstance(splitter, dict) and {**_BYTE_LEVEL, **splitter, "trim_offsets": True} == _BYTE_LEVEL
    faults = (
        (parsed.get("normalizer") not in NORMALIZERS.values(), f"normalizer {reprlib.repr(parsed.get('normalizer'))}"),
        (not plain, f"pre_tokenizer {reprlib.repr(splitter)}"),
        (isinstance(after, dict) and after.get("type") != "ByteLevel", "a post_processor that adds tokens"),
        (options, f"BPE with {', '.join(options)}"),
        (greedy, f"added tokens that take neighbouring characters ({greedy[:3]})"),
    )
    advice = "which GGUF's gpt-2 family does not have. Choose another target, or another --tokenizer."
    return [f"it has {fault}, {advice}" for wrong, fault in faults if wrong]


def _ids(tokenizer: Tokenizer, parsed: Mapping[str, Any]) -> dict[str, int]:
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
        raise CheckpointError(f"{tokenizer.name}: has {len(ids)} tokens but {len(set(ids.values()))} ids. {_WANTED}")
    return ids


def _type(token: Mapping[str, Any]) -> int:
    """llama.cpp's converter also takes a token that merely looks special (`<|...|>`) for one."""
    text = token["content"]
    return _CONTROL if token.get("special") or (text.startswith("<|") and text.endswith("|>")) else _USER_DEFINED


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(_STRIPPING, False)
    return {"id": index, "content": text, **plain, "normalized": not special, "special": special}


def _tokenizer_json(vocab: Mapping[str, int], merges: Iterable[str], added: Any, normalizer: Any) -> bytes:
    model = {"type": "BPE", **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")), "fuse_unk": False}
    stages = {"normalizer": normalizer, **dict.fromkeys(("pre_tokenizer", "post_processor", "decoder"), _BYTE_LEVEL)}
    model |= {"vocab": vocab, "merges": list(merges)}
    return _pretty({"version": "1.0", "added_tokens": added, **stages, "model": model})


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes in the order of their code points: printable Latin-1, then U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]

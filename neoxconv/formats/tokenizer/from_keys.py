"""A tokenizer made of GGUF's `tokenizer.ggml.*` keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer.byte_level import byte_level
from neoxconv.formats.tokenizer.charsmap import makes_spaces
from neoxconv.formats.tokenizer.files import END, KINDS, SETTINGS, TEMPLATE, Tokenizer
from neoxconv.formats.tokenizer.gguf import KEYS, PREFIX, SPLITTERS, TYPES, differences
from neoxconv.formats.tokenizer.made import added_token, tokenizer_json
from neoxconv.formats.tokenizer.pieces import BPE, UNIGRAM
from neoxconv.formats.tokenizer.pieces_json import bpe_json, unigram_json
from neoxconv.formats.tokenizer.spiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_WANTED = "Give the tokenizer.json of the model with --tokenizer."


@dataclass(frozen=True)
class Keys:
    """The tokenizer's keys of a GGUF file; `where` is what messages name."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        return self.values.get(PREFIX + name)

    def texts(self, name: str) -> list[Any]:
        found = self.get(name)
        return list(found) if isinstance(found, Iterable) and not isinstance(found, str) else []

    @property
    def unsaid(self) -> list[str]:
        """What an old file does not say of its tokenizer, and what is taken instead."""
        notes = []
        if self.get("pre") in (None, "default"):
            notes.append(f"{self.where}: {PREFIX}pre is {self.get('pre') or 'missing'}; words are split as gpt-2's are")
        if not self.texts("token_type"):
            notes.append(
                f"{self.where}: {PREFIX}token_type is missing; tokens that look like <|this|> count as special"
            )
        return notes


def from_gguf(values: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
    """The tokenizer that `tokenizer.*` keys describe: equal ids, without the padding tokens; its settings beside it.

    Raises CheckpointError where the keys are missing, contradictory or not of a tokenizer in a way that we know.
    """
    keys = Keys(values, where)
    if keys.get("model") in (UNIGRAM, BPE):
        return _from_pieces(keys)
    model, pre = keys.get("model"), keys.get("pre")
    splitter = SPLITTERS.get("default" if pre is None else pre) if isinstance(pre, str | None) else None
    if model != "gpt2" or splitter is None:
        known = [*dict.fromkeys(splitter.pre for splitter in SPLITTERS.values())]  # without their other names
        raise CheckpointError(f"{where}: tokenizer {model!r} of kind {pre!r} is not gpt2 of {known}. {_WANTED}")
    tokens, types, merges = (keys.texts(name) for name in ("tokens", "token_type", "merges"))
    if all(isinstance(text, str) for text in tokens) and not types:
        types = [_guessed(text) for text in tokens]
    if not all(isinstance(text, str) for text in tokens) or len(tokens) != len(types) or not {*types} <= {*TYPES}:
        found_types = f"{len(tokens)} tokens need as many types of {TYPES}, {len(types)} found"
        raise CheckpointError(f"{where}: {found_types}. {_WANTED}")
    kept = [(i, text, kind) for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED]
    # Added tokens stand in the vocabulary too: outside it the tokenizers library would number them anew.
    vocab = {text: i for i, text, _ in kept}
    if len(vocab) < len(kept):
        raise CheckpointError(f"{where}: {len(kept) - len(vocab)} of {len(kept)} tokens are there twice. {_WANTED}")
    added = [added_token(i, text, special=kind == CONTROL) for i, text, kind in kept if kind != NORMAL]
    steps = list(splitter.steps)
    cut = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    options = {"ignore_merges": True} if splitter.whole_words else {}
    data = tokenizer_json(vocab, merges, added, splitter.normalizer, cut, **options)
    tokenizer = Tokenizer(data, beside=_settings(keys, tokens))
    byte_level(tokenizer)  # raises for what is no tokenizer
    return tokenizer


def _from_pieces(keys: Keys) -> Tokenizer:
    """A tokenizer of sentencepiece's families, where the library can do what llama.cpp does with it."""
    model, prefix = keys.get("model"), keys.get("add_space_prefix")
    prefix = prefix is True or (prefix is None and model == BPE)  # llama.cpp's defaults
    tokens, types, scores = (keys.texts(name) for name in ("tokens", "token_type", "scores"))
    while types and len(types) <= len(tokens) and types[-1] == UNUSED:
        tokens, types, scores = tokens[: len(types) - 1], types[:-1], scores[: len(types) - 1]
    fits = len(tokens) == len(types) == len(scores) == len({*map(str, tokens)})
    fits = fits and {*types} <= {*TYPES, UNKNOWN, BYTE}
    if not fits or UNUSED in types or not all(isinstance(text, str) for text in tokens):
        raise CheckpointError(f"{keys.where}: tokens, types and scores of its {model} tokenizer do not fit. {_WANTED}")
    charsmap, merged = _bytes(keys.texts("precompiled_charsmap")), keys.get("remove_extra_whitespaces") is True
    whole = prefix and merged and makes_spaces(charsmap)
    if model == UNIGRAM and not whole and (prefix or merged or charsmap):
        what = "treats spaces or characters as no tokenizer.json can"
        raise CheckpointError(f"{keys.where}: its {model} tokenizer {what}. {_WANTED}")
    named = [*enumerate(zip(tokens, types, strict=True))]
    added = [
        added_token(i, text, special=kind != USER_DEFINED) for i, (text, kind) in named if kind not in (NORMAL, BYTE)
    ]
    if any(not token["special"] for token in added):
        added = [{**token, "normalized": False} for token in added]
    unknown = keys.get("unknown_token_id")
    known = type(unknown) is int and 0 <= unknown < len(tokens)
    pairs = [(text, float(score)) for text, score in zip(tokens, scores, strict=True)]
    if model == UNIGRAM:
        data = unigram_json(pairs, unknown if known else None, added, charsmap if whole else None)
    else:
        data = bpe_json(dict(pairs), tokens[unknown] if known else None, added, prefix=prefix)
    tokenizer = Tokenizer(data, beside=_settings(keys, tokens))
    if faults := differences(tokenizer):
        raise CheckpointError(f"{keys.where}: its {model} tokenizer has {faults[0]}. {_WANTED}")
    return tokenizer


def _bytes(values: Sequence[Any]) -> bytes:
    """The bytes of an array of int8 or uint8; none of other arrays."""
    fits = all(type(value) is int and -128 <= value < 256 for value in values)
    return bytes(value & 255 for value in values) if fits else b""


def _guessed(text: str) -> int:
    """The type of a token of a file that does not say it."""
    padding = text.startswith("[PAD") and text.endswith("]")
    return UNUSED if padding else CONTROL if text.startswith("<|") and text.endswith("|>") else NORMAL


def _settings(keys: Keys, tokens: Sequence[str]) -> dict[str, bytes]:
    """tokenizer_config.json and the template, where the keys say more than that END begins and ends a text."""
    numbers = {kind: keys.get(KEYS[kind]) for kind in KINDS}
    named = {
        f"{kind}_token": tokens[number]
        for kind, number in numbers.items()
        if type(number) is int and 0 <= number < len(tokens)
    }
    adds = {f"add_{kind}_token": keys.get(f"add_{kind}_token") for kind in KINDS}
    template = keys.values.get("tokenizer.chat_template")
    usual = {"bos_token": END, "eos_token": END, "unk_token": END}
    if not any(adds.values()) and template is None and named == usual:
        return {}
    settings = {
        **named,
        **{name: value for name, value in adds.items() if isinstance(value, bool)},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {SETTINGS: as_json(settings)}
    return files | ({TEMPLATE: template.encode()} if isinstance(template, str) else {})

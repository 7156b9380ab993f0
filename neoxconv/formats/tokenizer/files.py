"""A tokenizer as people have it: files that belong together, under the names that Hugging Face gives them.

    tokenizer.json                          the whole of it: normalizer, splitter, model, added tokens
    vocab.json and merges.txt               byte-level BPE as GPT-2 has it, from which a tokenizer.json is built
    spiece.model, tokenizer.model, ...      sentencepiece's own
    tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja, ...    beside any of these

They are carried into other folders byte for byte, whatever they hold: only GGUF looks inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import object_in
from neoxconv.formats.tokenizer import spiece
from neoxconv.formats.tokenizer.made import added_token, tokenizer_json
from neoxconv.storage import Place, is_file, open_storage

JSON, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
SENTENCEPIECE = {"spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}
ADDED, TEMPLATE, _TEMPLATES = "added_tokens.json", "chat_template.jinja", "additional_chat_templates"
_CARRIED = (
    JSON, SETTINGS, SPECIAL, ADDED, TEMPLATE, "chat_template.json", VOCAB, MERGES, "vocab.txt",
    *sorted(SENTENCEPIECE),
)  # fmt: skip

END, PADDING = "<|endoftext|>", "<|padding|>"  # gpt-neox looks them up by these texts
_MAX_BYTES = 1 << 28
KINDS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")  # of special tokens, as settings name them


@dataclass(frozen=True)
class Tokenizer:
    """`data` is a tokenizer.json (empty where there is none), `path` the file with the vocabulary (None: made here).

    `beside` are the other files by name. With `built`, `data` was made here of a vocab.json and a merges.txt.
    """

    data: bytes
    path: Place | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    built: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path or "tokenizer")

    @property
    def own_sentencepiece(self) -> bytes:
        """sentencepiece's file where there is no tokenizer.json; else empty."""
        names = [] if self.data else sorted(name for name in self.beside if name.endswith(".model"))
        return self.beside[names[0]] if names else b""

    @cached_property
    def sentencepiece(self) -> spiece.Spiece | None:
        """What that file says; None without one. Raises CheckpointError where it is damaged."""
        data = self.own_sentencepiece
        return spiece.read(data, self.name) if data else None

    @cached_property
    def parsed(self) -> dict[str, Any]:
        """What `data` says. Raises CheckpointError where that is no tokenizer.json."""
        if self.own_sentencepiece:
            raise CheckpointError(f"{self.name}: is sentencepiece's, and there is no {JSON} beside it; make one.")
        try:
            parsed = json.loads(self.data.decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: is not JSON ({error}); give another with --tokenizer.") from error
        if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
            problem = "it has no section `model` (a vocabulary alone is not enough)"
            raise CheckpointError(f"{self.name}: {problem}; give another with --tokenizer.")
        return {**parsed, "added_tokens": parsed.get("added_tokens") or []}

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens, as far as they are objects, as tokenizer.json has them. Raises CheckpointError as `parsed`.

        sentencepiece's are in files beside it.
        """
        found = _added_beside(self) if self.own_sentencepiece else self.parsed["added_tokens"]
        return [token for token in found if isinstance(token, dict)] if isinstance(found, list) else []

    @cached_property
    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json and what special_tokens_map.json, and sentencepiece's file, add to it."""
        special, settings = (object_in(self.beside.get(name, b"{}")) for name in (SPECIAL, SETTINGS))
        try:
            own = self.sentencepiece.special if self.sentencepiece else {}
        except CheckpointError:
            own = {}
        return {**{f"{kind}_token": text for kind, text in own.items()}, **special, **settings}

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every text, as far as the files tell without the library that reads them; empty for others."""
        try:
            if self.sentencepiece:
                own = {piece.text: i for i, piece in enumerate(self.sentencepiece.pieces)}
                return {**{token["content"]: token["id"] for token in self.added}, **own}
            vocab, added = self.parsed["model"].get("vocab"), self.added
        except CheckpointError:
            return {}
        pairs = [*vocab.items()] if isinstance(vocab, dict) else []
        if isinstance(vocab, list):  # Unigram: texts with their scores
            pairs = [(entry[0], i) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry]
        pairs += [(token.get("content"), token.get("id")) for token in added]
        return {text: i for text, i in pairs if isinstance(text, str) and type(i) is int}

    @property
    def special_ids(self) -> set[int]:
        """The ids of the special tokens, as far as a tokenizer.json or sentencepiece's file tells them."""
        kinds = (spiece.CONTROL, spiece.UNKNOWN)
        try:
            pieces = self.sentencepiece.pieces if self.sentencepiece else ()
            added = {token["id"] for token in self.added if token.get("special") and type(token.get("id")) is int}
        except CheckpointError:
            return set()
        return added | {number for number, piece in enumerate(pieces) if piece.type in kinds}

    @property
    def count(self) -> int | None:
        """One more than the largest id; None where the files do not tell."""
        return max(self.ids.values(), default=-1) + 1 or None

    def special(self, kind: str) -> int | None:
        """The id of the token that the settings call `kind`_token; without settings END begins and ends a text."""
        token = self.settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is None and kind in ("bos", "eos") and SETTINGS not in self.beside:
            text = END
        return self.ids.get(text) if isinstance(text, str) else None


def _added_beside(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tokens that added_tokens.json and tokenizer_config.json add to sentencepiece's, in the order of their ids."""
    settings = tokenizer.settings
    further = settings.get("additional_special_tokens")
    named = [settings.get(f"{kind}_token") for kind in KINDS] + (further if isinstance(further, list) else [])
    special = [token.get("content") if isinstance(token, Mapping) else token for token in named]
    table = object_in(tokenizer.beside.get(ADDED, b"{}"))
    found = {i: added_token(i, text, special=text in special) for text, i in table.items() if type(i) is int and i >= 0}
    detailed = settings.get("added_tokens_decoder")
    for number, token in detailed.items() if isinstance(detailed, dict) else ():
        if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            found[int(number)] = {"id": int(number), **token}
    return [found[i] for i in sorted(found)]


def load(path: Place, merges: Place | None = None) -> Tokenizer:
    """The tokenizer in the file `path`: a tokenizer.json, a vocab.json with `merges`, or sentencepiece's.

    Raises CheckpointError where it cannot be read.
    """
    data = read_bytes(path)
    if path.suffix == ".model":
        return Tokenizer(b"", path, {path.name: data})
    if merges and not _has_model(data):
        files = {VOCAB: data, MERGES: read_bytes(merges)}
        return Tokenizer(build(files[VOCAB], files[MERGES], str(path)), path, files, built=True)
    return Tokenizer(data, path)


def load_folder(folder: Place) -> Tokenizer | None:
    """All files of the tokenizer in a Hugging Face folder; None where none of them holds a vocabulary."""
    for name in (JSON, VOCAB, *sorted(SENTENCEPIECE)):
        if is_file(folder / name):
            return _load_all(folder, folder / name)
    return None


def _load_all(folder: Place, main: Place) -> Tokenizer:
    """The tokenizer whose vocabulary is in `main`, with everything of it in the folder."""
    loaded = load(main, folder / MERGES if is_file(folder / MERGES) else None)
    names = [name for name in _CARRIED if name != main.name and is_file(folder / name)]
    beside = {name: read_bytes(folder / name) for name in names}
    if (folder / _TEMPLATES).is_dir():
        paths: list[Place] = sorted((folder / _TEMPLATES).glob("*.jinja"), key=str)
        beside |= {f"{_TEMPLATES}/{path.name}": read_bytes(path) for path in paths}
    return Tokenizer(loaded.data, main, {**loaded.beside, **beside}, loaded.built)


def read_bytes(path: Place) -> bytes:
    """The bytes of a tokenizer's file. Raises CheckpointError for one that is empty, or far too large."""
    file = open_storage(path)
    if file.size > _MAX_BYTES:
        raise CheckpointError(f"{path}: has {file.size} bytes, a tokenizer at most {_MAX_BYTES}; give another file.")
    data = file.text()
    if not data:
        raise CheckpointError(f"{path}: is empty; download it again.")
    return data


def _has_model(data: bytes) -> bool:
    """Whether a JSON file is a tokenizer.json, and not the bare vocabulary of GPT-2."""
    return isinstance(object_in(data).get("model"), dict)


def build(vocab: bytes, merges: bytes, where: str) -> bytes:
    """The tokenizer.json of a vocab.json and a merges.txt, as transformers builds it for GPT-2's tokenizer.

    Raises CheckpointError where they are none.
    """
    try:
        table, lines = json.loads(vocab.decode()), merges.decode().splitlines()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: it and {MERGES} are no vocabulary and its merges ({error}).") from error
    if not isinstance(table, dict) or not all(type(i) is int for i in table.values()):
        raise CheckpointError(f"{where}: is no table of texts and ids; give another file with --tokenizer.")
    pairs = [line for line in lines[lines[:1] != [] and lines[0].startswith("#version") :] if line.strip()]
    added = [added_token(table[text], text, special=True) for text in (END, PADDING) if text in table]
    return tokenizer_json(table, pairs, added, None)

"""What lies beside the weights: whether the target's tokenizer and settings are the source's.

Compared by meaning, not by bytes: other tools write the same tokenizer in other words. Each side is made into a table
of facts. A GGUF file's are its own keys, and the source's those that would be written of its tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.formats.ctranslate2.read import VOCABULARY, read_config, read_vocabulary
from neoxconv.formats.json_text import object_in
from neoxconv.formats.tokenizer import Tokenizer, gguf_keys
from neoxconv.formats.tokenizer.byte_level import merge
from neoxconv.formats.tokenizer.files import KINDS, SETTINGS, TEMPLATE
from neoxconv.formats.tokenizer.gguf import PREFIX, SPLITTERS
from neoxconv.targets.carried import GENERATION, Carried, carried
from neoxconv.targets.ctranslate2 import special_tokens, vocabulary_of
from neoxconv.verify.report import Finding, Report

_Facts = Mapping[str, Any]
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST = 80  # characters of a value in a message
_TOKENS, PRE = PREFIX + "tokens", PREFIX + "pre"
_SPACES = (PREFIX + "add_space_prefix", PREFIX + "remove_extra_whitespaces")
_NEVER_UNLESS_SAID = {PREFIX + f"add_{kind}_token" for kind in KINDS}
_BY_THE_WAY = ("_from_model_config", "transformers_version")  # fields of generation_config.json without an effect


def verify_beside(source: Checkpoint, target: Checkpoint) -> Report | None:
    """Whether the target's tokenizer and settings are the source's; None where there is nothing to compare."""
    if target.index.format == "safetensors":  # a single file has no place for them
        return None
    ours = carried(source)
    if target.index.format == "gguf":
        wanted, found = _gguf_facts(source, ours), target.index.settings
    else:
        theirs = carried(target)
        if ours.tokenizer and not theirs.tokenizer:
            missing = Finding(str(target.index.where), "the tokenizer is missing, and the source has one")
            return Report("tokenizer", "no tokenizer", (missing,))
        wanted, found = _folder_facts(ours, target), _folder_facts(theirs, target)
        if target.index.format == "ctranslate2" and ours.tokenizer:
            wanted, found = wanted | _ctranslate2_facts(ours, ours.tokenizer, source), found | _ctranslate2_says(target)
    findings = tuple(Finding(str(target.index.where), what) for what in differences(wanted, found))
    return Report("tokenizer", f"{len(wanted)} facts of tokenizer and settings", findings) if wanted else None


def differences(wanted: _Facts, found: _Facts) -> Iterator[str]:
    """What of the source's facts the target says otherwise."""
    for name, value in wanted.items():
        if not same(name, value, found.get(name)):
            yield difference(name, value, found.get(name))


def same(name: str, wanted: Any, found: Any) -> bool:
    """Whether a fact is the same; what is never added may be left unsaid."""
    if name in _NEVER_UNLESS_SAID:
        return bool(wanted) == bool(found)
    return bool(wanted == found) or (name == PRE and _split_alike(wanted, found))


def _split_alike(*names: Any) -> bool:
    """Whether names in `pre` mean the same splitter; the default is llama.cpp's own, and no other's."""
    # llama.cpp's converter has given the 20B both of these.
    told = ["olmo" if name == "mpt" else name for name in names if isinstance(name, str) and name != "default"]
    found = {splitter.pre for name in told for splitter in [SPLITTERS.get(name)] if splitter}
    return len(told) == len(names) and len(found) == 1 and all(name in SPLITTERS for name in told)


def difference(name: str, wanted: Any, found: Any) -> str:
    """What differs in a fact; of a list the first item."""
    if found is None:
        return f"{name} is missing; the source's is {_shown(wanted)}"
    if isinstance(wanted, list) and isinstance(found, list):
        pairs = zip(wanted, found, strict=False)
        number = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))
        there, here = (_shown(items[number]) if number < len(items) else "missing" for items in (found, wanted))
        counts = f" ({len(found)} items, the source's {len(wanted)})" if len(found) != len(wanted) else ""
        return f"{name}: item {number} is {there}, the source's {here}{counts}"
    return f"{name} is {_shown(found)}, the source's {_shown(wanted)}"


def _shown(value: Any) -> str:
    """A value for a message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST else text[:_MOST] + "..."


def _gguf_facts(source: Checkpoint, ours: Carried) -> _Facts:
    """The keys of a GGUF file of the source; of a tokenizer that we have no words for, its tokens alone."""
    if source.index.format == "gguf":
        keys = {name: value for name, value in source.index.settings.items() if name.startswith("tokenizer.")}
        idle = _SPACES if keys.get(PREFIX + "model") == "gpt2" else ()  # llama.cpp leaves its spaces alone
        return {name: value for name, value in keys.items() if name not in idle}
    if ours.tokenizer is None:
        return {}
    try:
        return gguf_keys(ours.tokenizer, source.config.rows, ours.ids)
    except CheckpointError:
        return _nearest_facts(source, ours.tokenizer, ours.ids)


def _nearest_facts(source: Checkpoint, tokenizer: Tokenizer, ids: Mapping[str, Any]) -> _Facts:
    """The keys of the nearest that GGUF has to a tokenizer, but for how it splits: a matter of judgement."""
    try:
        keys = gguf_keys(tokenizer, source.config.rows, ids, others=True)
    except CheckpointError:
        return {_TOKENS: _by_id(tokenizer)}
    return {name: value for name, value in keys.items() if name not in (PRE, *_SPACES)}


def _by_id(tokenizer: Tokenizer) -> list[str]:
    """The texts in the order of their ids."""
    return [text for text, _ in sorted(tokenizer.ids.items(), key=lambda item: item[1])]


def _folder_facts(side: Carried, target: Checkpoint) -> dict[str, Any]:
    """What a side says, as far as a folder of the target's format has a place for it."""
    facts = _tokenizer_facts(side.tokenizer) if side.tokenizer else {}
    if target.index.format != "hf":
        return facts
    facts |= {f"config.json's {name}": value for name, value in side.ids.items()}
    facts |= _settings_facts(side.tokenizer) if side.tokenizer and SETTINGS in side.tokenizer.beside else {}
    generation = object_in(side.generation) if side.generation else {}
    return facts | {f"{GENERATION}'s {name}": value for name, value in generation.items() if name not in _BY_THE_WAY}


def _ctranslate2_facts(ours: Carried, tokenizer: Tokenizer, source: Checkpoint) -> dict[str, Any]:
    """The texts of all tokens, and the special ones, as they would be written of the source."""
    texts = vocabulary_of(tokenizer, source.config.rows)
    return {VOCABULARY: texts, **special_tokens(ours, tokenizer, texts)}


def _ctranslate2_says(target: Checkpoint) -> dict[str, Any]:
    """The same as the target has them."""
    return {**read_config(target.index.folder), VOCABULARY: read_vocabulary(target.index.folder)}


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Model, tokens, merges, stages and special tokens; of sentencepiece's files the bytes."""
    name = "the tokenizer's"
    if not tokenizer.data:
        return {f"{name} {file}": data.hex() for file, data in tokenizer.beside.items() if file.endswith(".model")}
    try:
        parsed = tokenizer.parsed
    except CheckpointError:
        return {f"{name} tokenizer.json": tokenizer.data.decode(errors="replace")}
    merges = parsed["model"].get("merges") or []
    special = [str(token.get("content")) for token in tokenizer.added if token.get("special")]
    return {
        f"{name} model": parsed["model"].get("type"),
        f"{name} tokens": [*zip(_by_id(tokenizer), sorted(tokenizer.ids.values()), strict=True)],
        f"{name} merges": [merge(pair) for pair in merges] if isinstance(merges, list) else merges,
        **{f"{name} {stage}": parsed.get(stage) or {} for stage in _STAGES},
        f"{name} special tokens": sorted(special),
    }


def _settings_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer_config.json says of special tokens, of what is added by itself, and of the template."""
    settings, file = tokenizer.settings, tokenizer.beside.get(TEMPLATE)
    special = {f"{kind}_token": tokenizer.special(kind) for kind in KINDS}
    adds = {name: settings.get(name) for kind in KINDS if (name := f"add_{kind}_token") in settings}
    template = settings.get("chat_template") if file is None else file.decode(errors="replace")
    facts = {name: value for name, value in (special | adds | {"chat template": template}).items() if value is not None}
    return {f"{SETTINGS}'s {name}": value for name, value in facts.items()}

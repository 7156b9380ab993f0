"""The keys of a GGUF file beside its tensors: the tokenizer's, and what a GGUF source's file has already said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.errors import PlanError
from neoxconv.formats.tokenizer import differences, gguf_keys
from neoxconv.formats.tokenizer.from_keys import Keys
from neoxconv.formats.tokenizer.gguf import KEYS, PREFIX, told
from neoxconv.targets.carried import GENERATION, Carried
from neoxconv.targets.metadata import Words
from neoxconv.targets.recipe import Recipe

TOKENS = PREFIX + "tokens"
_COMPOSED = ("olmo", "mpt")  # names in `pre` of tokenizers that compose characters first
_NFC = "llama.cpp composes no characters (NFC): decomposed accents and jamo give it other ids than transformers"
_OF_ONE_FILE = ("split.", "quantize.", "neoxconv.", "general.alignment")  # keys of a file, not of its model


def kept_keys(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, bytes]:
    """The keys of a GGUF source that no conversion decides, as it has them; with --tokenizer not its tokenizer's."""
    replaced = ("tokenizer.",) if recipe.tokenizer else ()
    others = (*_OF_ONE_FILE, *replaced)
    return {key: value for key, value in checkpoint.index.typed.items() if not key.startswith(others)}


def tokenizer_keys(checkpoint: Checkpoint, beside: Carried, recipe: Recipe) -> dict[str, Any]:
    """The tokenizer's keys; raises PlanError where there is none."""
    if beside.tokenizer is None:
        raise PlanError(
            f"{checkpoint.index.folder}: GGUF needs a tokenizer and none was found near it; "
            "give its tokenizer.json with --tokenizer FILE."
        )
    return gguf_keys(beside.tokenizer, checkpoint.config.rows, beside.ids, others=recipe.allow_other_tokens)


def unsaid(checkpoint: Checkpoint) -> list[str]:
    """Notes on what an old GGUF source does not say of its tokenizer."""
    return Keys(checkpoint.index.settings, str(checkpoint.index.where)).unsaid


def notes_beside(beside: Carried, keys: Mapping[str, Any], words: Words, recipe: Recipe) -> list[str]:
    """Notes on the tokenizer, on ends that contradict each other, and on what GGUF has no place for."""
    notes = [*beside.notes]
    for name, said in beside.ids.items():
        written = keys.get(PREFIX + KEYS[name.removesuffix("_token_id")])
        if type(said) is int and written not in (None, said):
            notes.append(f"{name} is {said} in the source, {written} by the tokenizer's settings, which GGUF takes")
    if keys.get(PREFIX + "pre") in _COMPOSED:
        notes.append(_NFC)
    notes += told(beside.tokenizer) if beside.tokenizer else []
    faults = differences(beside.tokenizer) if beside.tokenizer and recipe.allow_other_tokens else []  # else refused
    notes += [f"llama.cpp gives some texts other ids than the source's tokenizer: it has no {f}" for f in faults]
    but = f" but for {', '.join(words.sampling)}: the rest is left out" if words.sampling else ": left out"
    return notes + ([f"{GENERATION} has no place in GGUF{but}"] if beside.generation else [])


def is_kept(key: str, keys: Mapping[str, Any], words: Words, checkpoint: Checkpoint) -> bool:
    """Whether a GGUF source's key stays as its file has it: one that nobody decides, or that is said the same."""
    same = key == "general.type" or words.keys.get(key) == checkpoint.index.settings[key]
    return same if key in keys else key not in words.given

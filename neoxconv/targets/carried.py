"""What belongs to a model beside its weights, carried from the source into a target: tokenizer, tokens, settings.

Files are carried as bytes. Of config.json every field is carried that a conversion does not decide; what has no place
in a target is named in a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.formats.json_text import object_in
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.formats.tokenizer.gguf import KEYS, PREFIX
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import Place, is_file, open_storage
from neoxconv.targets.calibrated import SETTING

GENERATION = "generation_config.json"
_LARGEST = 1 << 20  # bytes of a generation_config.json
_KINDS = ("bos", "eos", "pad")  # of the tokens that config.json names
# Fields of config.json that are decided here: by the target's types, or not at all, since they would be untrue.
_DECIDED = ("quantization_config", "quantization", "rope_scaling", "transformers_version", SETTING)


@dataclass(frozen=True)
class Carried:
    """`ids` are bos_token_id, eos_token_id and pad_token_id as config.json has them; `config` its further fields."""

    tokenizer: Tokenizer | None
    ids: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: bytes | None
    notes: tuple[str, ...]

    def left_out(self, kept: Iterable[str]) -> list[str]:
        """A note on the files that a target has no place for; those of the names `kept` it has."""
        beside = self.tokenizer.beside if self.tokenizer else {}
        lost = [name for name in [*beside, *([GENERATION] if self.generation else [])] if name not in kept]
        return [f"the target has no place for {', '.join(lost)}: left out"] if lost else []


def tokenizer_facts(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Which tokenizer was chosen: its file, its number of tokens where the files tell, and the model's rows."""
    if tokenizer is None:
        return {}
    return _facts(checkpoint, tokenizer.path or checkpoint.index.where, tokenizer.count)


def kept_tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a GGUF source whose keys are kept as they are, whatever its tokenizer is."""
    index = checkpoint.index
    return _facts(checkpoint, index.where, len(index.settings[PREFIX + "tokens"]))


def _facts(checkpoint: Checkpoint, where: Place, tokens: int | None) -> dict[str, Any]:
    return {"file": str(where), "tokens": tokens, "rows": checkpoint.config.rows}


def tokenizer_line(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    if not facts:
        return "none"
    count = "tokens not counted" if facts["tokens"] is None else f"{facts['tokens']} tokens"
    return f"{facts['file']}: {count} for {facts['rows']} rows"


def carried(checkpoint: Checkpoint, explicit: Path | None = None) -> Carried:
    """What the source has; `explicit` is a tokenizer to take instead of its own.

    Raises CheckpointError where a file cannot be read.
    """
    tokenizer, unread = _tokenizer(checkpoint, explicit)
    ids, notes = _token_ids(checkpoint, tokenizer)
    rows, count = checkpoint.config.rows, (tokenizer.count if tokenizer else None) or 0
    if tokenizer and tokenizer.data and not tokenizer.ids:
        notes.append(f"{tokenizer.name}: is no tokenizer.json that can be looked into; it is carried as it is")
    notes += [f"the tokenizer has {count} tokens, the model {rows} rows"] if count > rows else []
    if explicit and tokenizer:
        notes += _other_size(checkpoint, tokenizer)
    return Carried(
        tokenizer,
        ids,
        _further_fields(checkpoint),
        generation(checkpoint, ids),
        (*unread, *notes, *_beyond_rows(checkpoint, ids)),
    )


def _tokenizer(checkpoint: Checkpoint, explicit: Path | None) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer; none, and a note, where a GGUF source has one that no files can be made of."""
    try:
        return tokenizer_of(checkpoint, explicit), []
    except CheckpointError as error:
        if explicit or not checkpoint.index.typed:
            raise
        return None, [f"the tokenizer is left out: {error}"]


def _is_hugging_face(checkpoint: Checkpoint) -> bool:
    """Whether the settings are those of a config.json."""
    return "model_type" in checkpoint.index.settings


def _token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[dict[str, Any], list[str]]:
    """The tokens at which text begins and ends, and that fill it: as the source says, else the tokenizer's; notes.

    gpt-neox says nothing of them; where no tokenizer tells them either, they are the architecture's. Of one that the
    tokenizer does not have, that is said, as otherwise transformers would take its default.
    """
    settings, found, notes = checkpoint.index.settings, {}, []
    architecture, theirs = checkpoint.architecture, _is_hugging_face(checkpoint)
    untold = not (tokenizer and tokenizer.ids)
    own = {kind: tokenizer.special(kind) if tokenizer else None for kind in _KINDS}
    for kind in _KINDS:
        name = f"{kind}_token_id"
        said = settings.get(PREFIX + KEYS[kind], settings.get(name))
        unset = _nobodys(said, kind, checkpoint, tokenizer) and own[kind] not in (None, said)
        if unset:
            notes.append(f"{name} is {said}, transformers' default; the tokenizer's own, {own[kind]}, is taken")
        silent = theirs and name in settings  # it says that there is none
        value = own[kind] if unset or (said is None and not silent) else said
        if value is None and untold and not theirs:
            value = architecture.token_ids.get(kind)
        if value is not None or silent or (not theirs and kind in architecture.unset_ids):
            found[name] = value
    return found, notes


def _nobodys(said: Any, kind: str, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> bool:
    """Whether an id is the one that transformers writes where nobody set it, and no special token by the tokenizer."""
    if said is None or said != checkpoint.architecture.unset_ids.get(kind):
        return False
    return tokenizer is None or said not in tokenizer.special_ids


def _further_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of the source's config.json that no conversion decides; of other sources none."""
    if not _is_hugging_face(checkpoint):
        return {}
    ids = {f"{kind}_token_id" for kind in _KINDS}
    return {name: value for name, value in checkpoint.index.settings.items() if name not in {*_DECIDED, *ids}}


def generation(checkpoint: Checkpoint, ids: Mapping[str, Any]) -> bytes | None:
    """The source's generation_config.json; None where it has none, or only repeats an end that nobody set."""
    path = checkpoint.index.folder / GENERATION
    if checkpoint.index.format != "hf" or not is_file(path):
        return None
    file = open_storage(path)
    if file.size > _LARGEST:
        raise CheckpointError(f"{path}: has {file.size} bytes, at most {_LARGEST} are expected; give another file.")
    data = file.text()
    said = object_in(data)
    ends = {key: said.get(f"{key}_token_id") for key in checkpoint.architecture.unset_ids}
    repeats = said.get("_from_model_config") and ends == checkpoint.architecture.unset_ids
    return None if repeats and any(ids.get(f"{key}_token_id") != end for key, end in ends.items()) else data


def _other_size(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    """A note where the tokenizer that was given has not as many tokens as the source's own."""
    try:
        own = tokenizer_of(checkpoint)
        counts = tokenizer.count, own.count if own else None
    except CheckpointError:
        return []
    if None in counts or counts[0] == counts[1]:
        return []
    return [
        f"--tokenizer has {counts[0]} tokens, the source's own {counts[1]}; the model has {checkpoint.config.rows} rows"
    ]


def _beyond_rows(checkpoint: Checkpoint, ids: Mapping[str, Any]) -> Iterable[str]:
    """A note for each token that the model does not have."""
    rows = checkpoint.config.rows
    for name, value in ids.items():
        numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]
        yield from (f"{name} is {number}, but the model has {rows} rows" for number in numbers if number >= rows)

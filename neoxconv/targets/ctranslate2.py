"""The CTranslate2 target: a folder that ctranslate2.Generator loads, its matrices in 8 bits or in plain numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from neoxconv.arch.ctranslate2.names import EMBEDDING, HEAD, Row, rows_of
from neoxconv.arch.ctranslate2.settings import CONTEXT_KEY, EPSILON_KEY, epsilon_setting, scalars_of, unsayable
from neoxconv.arch.joins import stacked
from neoxconv.core.encoding import Encoding, Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, alike, reordered
from neoxconv.errors import PlanError
from neoxconv.formats.ctranslate2 import write
from neoxconv.formats.ctranslate2.read import CONFIG, VOCABULARY
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer import END, Tokenizer, hf_files
from neoxconv.names import CTRANSLATE2_TYPES
from neoxconv.quant import SCALED, decoded
from neoxconv.targets.calibrated import SETTING, Calibration, calibration_for
from neoxconv.targets.carried import GENERATION, Carried, carried, tokenizer_facts
from neoxconv.targets.hf import kept
from neoxconv.targets.recipe import Recipe

_DEFAULT = "INT8"
RECIPES = tuple(Recipe("ctranslate2", type=kind) for kind in CTRANSLATE2_TYPES)  # all that `formats` lists
# What is not in 8 bits is kept as the source has it, or in the type that a type's name ends with.
_PLAIN = {"FLOAT16": "F16", "BFLOAT16": "BF16", "FLOAT32": "F32"}
_EIGHT_BITS = "INT8"


def to_ctranslate2(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The folder, its tensors equal to those that ctranslate2's own converter makes of the Hugging Face conversion.

    With --calibration the codes of a row are its own: chosen together.
    """
    entries = ctranslate2_entries(checkpoint, recipe)
    calibration = _calibration(checkpoint, recipe, entries)
    config, family = _sayable(checkpoint), checkpoint.architecture.name
    beside = carried(checkpoint, recipe.tokenizer)
    if beside.tokenizer is None or not beside.tokenizer.ids:
        raise PlanError(
            f"{checkpoint.index.where}: CTranslate2 needs the texts of all tokens, and no tokenizer that tells them "
            "was found near it; give its tokenizer.json with --tokenizer FILE."
        )
    tied = {HEAD: EMBEDDING} if config.tied else {}
    texts = vocabulary_of(beside.tokenizer, config.rows)
    told = {
        **special_tokens(beside, beside.tokenizer, texts),
        EPSILON_KEY: epsilon_setting(config),
        CONTEXT_KEY: config.context,  # CTranslate2 does not know of it
        "multi_query_attention": True,  # of all models, as its converter has it
        **({SETTING: calibration.digest} if calibration else {}),
    }
    sidecars = {
        CONFIG: as_json(dict(sorted(told.items()))),
        VOCABULARY: json.dumps(texts, indent=2).encode(),
        **hf_files(beside.tokenizer, config.context),
        **({GENERATION: beside.generation} if beside.generation else {}),
    }
    held = calibration.applied(entries) if calibration else entries
    file = write.layout(held, scalars_of(family, config), tied)
    notes = (*beside.notes, *(calibration.notes if calibration else ()))
    return Content((file,), sidecars, notes, tokenizer_facts(checkpoint, beside.tokenizer))


def _calibration(checkpoint: Checkpoint, recipe: Recipe, entries: list[Entry]) -> Calibration | None:
    """What was asked for. Raises PlanError where it does not fit, or no matrix is in 8 bits."""
    if recipe.calibration is None:
        return None
    if not any(isinstance(entry.encoding, Scaled) for entry in entries):
        raise PlanError(f"--calibration is for the types of 8 bits; found {recipe.type}.")
    return calibration_for(checkpoint, recipe.calibration, entries)


def ctranslate2_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor under CTranslate2's name, in its order of rows. Raises PlanError for what it cannot say."""
    kind, config = recipe.type or _DEFAULT, _sayable(checkpoint)
    if kind not in CTRANSLATE2_TYPES:
        raise PlanError(f"ctranslate2 has {', '.join(CTRANSLATE2_TYPES)}; found {kind}.")
    rows = rows_of(checkpoint.architecture.name, config)
    present = [row for row in rows if all(part in checkpoint.tensors for part in row.parts)]
    tensors = [(row, _as_stored(row, checkpoint)) for row in present]
    return [Entry(row.name, row.parts[0], tensor, _encoding(kind, row, tensor)) for row, tensor in tensors]


def _sayable(checkpoint: Checkpoint) -> ModelConfig:
    """The hyperparameters as CTranslate2 has them. Raises PlanError where it cannot run the model."""
    architecture = checkpoint.architecture
    config = architecture.sayable(checkpoint.config)
    if problem := unsayable(architecture.name, config):
        raise PlanError(f"{checkpoint.index.where}: --to ctranslate2: {problem}. Give another target.")
    return config


def _as_stored(row: Row, checkpoint: Checkpoint) -> LazyTensor:
    """A tensor of the file: its weights one below the other, in its order of rows."""
    parts = [checkpoint.tensors[part] for part in row.parts]
    if len(parts) > 1:
        parts = alike([decoded(part) for part in parts])
    tensor = parts[0] if len(parts) == 1 else stacked(parts, checkpoint.config)
    return reordered(tensor, row.order(checkpoint.config)) if row.order else tensor


def _encoding(kind: str, row: Row, tensor: LazyTensor) -> Encoding | Scaled:
    """How a tensor is stored: matrices and the embedding in 8 bits where the type says so, positions never."""
    if kind.startswith(_EIGHT_BITS) and row.name.endswith("/weight"):
        return SCALED["CT2_INT8"]
    return kept(tensor, _PLAIN.get(kind.removeprefix(_EIGHT_BITS).removeprefix("_")))


def vocabulary_of(tokenizer: Tokenizer, rows: int) -> list[str]:
    """The texts of so many ids; for those without one, names that no other has, as its converter makes them."""
    texts = {number: text for text, number in tokenizer.ids.items()}
    unused: Iterator[str] = (name for i in itertools.count() if (name := f"<extra_id_{i}>") not in tokenizer.ids)
    return [texts[number] if number in texts else next(unused) for number in range(rows)]


def special_tokens(beside: Carried, tokenizer: Tokenizer, texts: list[str]) -> dict[str, str]:
    """The texts of the special tokens in config.json; empty where there is none, as null would be an error."""
    unknown = tokenizer.special("unk")
    if unknown is None:  # what transformers' classes for GPT-2 and GPT-NeoX take
        unknown = tokenizer.ids.get(END)
    ids = {"bos": beside.ids.get("bos_token_id"), "eos": beside.ids.get("eos_token_id"), "unk": unknown}
    return {f"{kind}_token": _text_of(found, texts) for kind, found in ids.items()}


def _text_of(found: Any, texts: list[str]) -> str:
    """The text of a token's id, of several the first; empty where there is none."""
    number = found[0] if isinstance(found, list) and found else found
    return texts[number] if type(number) is int and 0 <= number < len(texts) else ""

"""Targets under Hugging Face names: a folder that transformers loads, or one .safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv.core.encoding import Encoding
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor, transposed
from neoxconv.dtypes import TORCH_NAMES
from neoxconv.errors import PlanError
from neoxconv.formats import hf, safetensors
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer import hf_files
from neoxconv.names import DTYPES
from neoxconv.quant import ENCODINGS, decoded
from neoxconv.sources.coverage import PARTIAL
from neoxconv.targets.carried import GENERATION, Carried, carried, tokenizer_facts
from neoxconv.targets.recipe import Recipe

# All that `formats` lists.
RECIPES = tuple(Recipe("hf", dtype=dtype) for dtype in DTYPES)
SAFETENSORS_RECIPES = tuple(Recipe("safetensors", dtype=dtype) for dtype in DTYPES)

LIBRARY = "transformers"  # that a folder is for, if nothing else is said
_FORMATS = {LIBRARY: "pt", "mlx": "mlx"}  # what safetensors' metadata calls each library's tensors

# Fields of config.json for which we have defaults only: training and use, not the function.
_UNDECIDED = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "embed_dropout", "hidden_dropout", "initializer_range",
    "resid_dropout", "resid_pdrop", "use_cache",
)  # fmt: skip


def kept(tensor: LazyTensor, dtype: str | None) -> Encoding:
    """The plain encoding for `dtype`, by default the type that the source holds (float64 becomes float32)."""
    name = dtype or tensor.native.name
    return ENCODINGS[name if name in ENCODINGS else "F32"]


def unified_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor under its unified name, or those that the recipe wants. Raises PlanError where it wants none."""
    try:
        wanted = [re.compile(pattern) for pattern in recipe.only] or [re.compile("")]
    except re.error as error:
        raise PlanError(f"--only {' '.join(recipe.only)}: is not a regular expression ({error}).") from error
    tensors = {name: t for name, t in checkpoint.tensors.items() if any(pattern.search(name) for pattern in wanted)}
    if not tensors:
        raise PlanError(f"--only {' '.join(recipe.only)}: no tensor's name holds it; `inspect --tensors` lists them.")
    across = {weight.unified for _, weight in checkpoint.architecture.names(checkpoint.config) if weight.transposed}
    files = {name: transposed(decoded(t)) if name in across else t for name, t in tensors.items()}
    return [Entry(name, name, tensor, kept(tensor, recipe.dtype)) for name, tensor in files.items()]


def _partly(checkpoint: Checkpoint, recipe: Recipe, entries: Sequence[Entry]) -> tuple[str, ...]:
    """A note on a target that holds a part of the model."""
    if not recipe.only:
        return ()
    count = f"{len(entries)} of {len(checkpoint.tensors)} tensors"
    return (f"{count}, whose names hold {' or '.join(recipe.only)}; the target is a part of the model",)


def to_hf(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A Hugging Face folder that transformers loads."""
    return hf_folder(checkpoint, recipe, unified_entries(checkpoint, recipe))


def hf_folder(
    checkpoint: Checkpoint,
    recipe: Recipe,
    entries: Sequence[Entry],
    settings: Mapping[str, Any] | None = None,
    *,
    library: str = LIBRARY,
) -> Content:
    """A folder with sharded safetensors for `library`, configuration (with `settings` added), tokenizer."""
    files = hf.layout(entries, recipe.shard_size, {"format": _FORMATS[library]})
    beside = carried(checkpoint, recipe.tokenizer)
    tokenizer = beside.tokenizer
    config = _configuration(checkpoint, beside, main_dtype(entries))
    config |= {**(settings or {}), **({PARTIAL: list(recipe.only)} if recipe.only else {})}
    part = _partly(checkpoint, recipe, entries)
    sidecars = {
        "config.json": as_json(config),
        GENERATION: beside.generation or hf.generation_config(config),
        **({"model.safetensors.index.json": hf.weight_index(files)} if len(files) > 1 else {}),
        **(hf_files(tokenizer, checkpoint.config.context) if tokenizer else {}),
    }
    none = () if tokenizer else ("no tokenizer found; give one with --tokenizer to have it included",)
    chosen = tokenizer_facts(checkpoint, tokenizer)
    return Content(files, sidecars, (*part, *beside.notes, *none), chosen)


def _configuration(checkpoint: Checkpoint, beside: Carried, dtype: str) -> dict[str, Any]:
    """config.json: what is decided here, and of the source's own what is not."""
    made = checkpoint.architecture.to_hf(checkpoint.config, dtype)
    silent = {name for name in ("bos_token_id", "eos_token_id") if name not in beside.ids}
    further = {name: value for name, value in beside.config.items() if name not in made or name in _UNDECIDED}
    return {**{name: value for name, value in made.items() if name not in silent}, **further, **beside.ids}


def to_safetensors(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """One .safetensors file, which holds the configuration in its metadata."""
    entries = unified_entries(checkpoint, recipe)
    beside = carried(checkpoint, recipe.tokenizer)
    facts = _configuration(checkpoint, beside, main_dtype(entries))
    facts |= {PARTIAL: list(recipe.only)} if recipe.only else {}
    metadata = {"format": "pt", "config": json.dumps(facts, separators=(",", ":"))}
    files = (safetensors.layout("model.safetensors", entries, metadata),)
    return Content(files, {}, (*_partly(checkpoint, recipe, entries), *beside.notes, *beside.left_out(())))


def main_dtype(entries: Sequence[Entry]) -> str:
    """torch's name of the type that most bytes have."""
    sizes = {name: sum(e.nbytes for e in entries if e.encoding.name == name) for name in TORCH_NAMES}
    return TORCH_NAMES[max(sizes, key=lambda name: sizes[name])]

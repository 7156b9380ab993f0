"""Targets under Hugging Face names: a folder that transformers loads, or one .safetensors file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv import tokenizer
from neoxconv.checkpoint import tokenizer_of
from neoxconv.dtypes import TORCH_NAMES
from neoxconv.formats import hf, safetensors
from neoxconv.model import Checkpoint, Content, Encoding, Entry
from neoxconv.quant import ENCODINGS
from neoxconv.recipe import Recipe
from neoxconv.targets.about import provenance, title, token_ids
from neoxconv.tensor import LazyTensor


def kept(tensor: LazyTensor, dtype: str | None) -> Encoding:
    """The plain encoding for `dtype`, by default the type that the source holds (float64 becomes float32)."""
    name = dtype or tensor.native.name
    return ENCODINGS[name if name in ENCODINGS else "F32"]


def unified_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor under its unified name."""
    return [Entry(name, name, tensor, kept(tensor, recipe.dtype)) for name, tensor in checkpoint.tensors.items()]


def to_hf(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A Hugging Face folder that transformers loads."""
    return hf_folder(checkpoint, recipe, unified_entries(checkpoint, recipe))


def hf_folder(
    checkpoint: Checkpoint, recipe: Recipe, entries: Sequence[Entry], settings: Mapping[str, Any] | None = None
) -> Content:
    """A folder with sharded safetensors, configuration (with `settings` added), tokenizer, model card."""
    files = hf.layout(entries, recipe.shard_size)
    words = tokenizer_of(checkpoint, recipe.tokenizer)
    config = checkpoint.architecture.to_hf(checkpoint.config, main_dtype(entries)) | token_ids(checkpoint, words)
    config |= settings or {}
    sidecars = {
        "config.json": as_json(config),
        "generation_config.json": hf.generation_config(config),
        "README.md": hf.model_card(title(checkpoint), [*provenance(checkpoint), ("Tensors", held(entries))]),
        **({"model.safetensors.index.json": hf.weight_index(files)} if len(files) > 1 else {}),
        **(tokenizer.hf_files(words, checkpoint.config.context) if words else {}),
    }
    return Content(
        files, sidecars, () if words else ("no tokenizer found; give one with --tokenizer to have it included",)
    )


def held(entries: Sequence[Entry]) -> str:
    """How many tensors have each type."""
    return ", ".join(f"{count} {name}" for name, count in Counter(entry.encoding.name for entry in entries).items())


def to_safetensors(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """One .safetensors file, which holds the configuration in its metadata."""
    entries = unified_entries(checkpoint, recipe)
    facts = checkpoint.architecture.to_hf(checkpoint.config, main_dtype(entries))
    config = json.dumps(facts | token_ids(checkpoint, None), separators=(",", ":"))
    return Content((safetensors.layout("model.safetensors", entries, {"format": "pt", "config": config}),), {})


def main_dtype(entries: Sequence[Entry]) -> str:
    """torch's name of the type that most bytes have."""
    sizes = {name: sum(e.nbytes for e in entries if e.encoding.name == name) for name in TORCH_NAMES}
    return TORCH_NAMES[max(sizes, key=lambda name: sizes[name])]


def as_json(value: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

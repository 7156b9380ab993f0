"""The targets: how a checkpoint becomes the files of each format. One row each in TARGETS."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neoxconv import __version__, slim, tokenizer, tokenizer_find
from neoxconv.checkpoint import parameters
from neoxconv.errors import PlanError
from neoxconv.formats import gguf_layout, hf, safetensors
from neoxconv.model import Checkpoint, Content, Encoding, Entry, Weight
from neoxconv.quant import ENCODINGS
from neoxconv.quant.mixes import MIXES, Choice, Place, choose, wanted
from neoxconv.recipe import Recipe
from neoxconv.tensor import LazyTensor, reordered
from neoxconv.terminal import plural

GGUF_ALIASES = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # what a tied model's head is


@dataclass(frozen=True)
class Target:
    """A format that can be written; `single` where the target is a file and not a folder."""

    name: str
    single: bool
    make: Callable[[Checkpoint, Recipe], Content]


def kept(tensor: LazyTensor, dtype: str | None) -> Encoding:
    """The plain encoding for `dtype`, by default the type that the source holds (float64 becomes float32)."""
    name = dtype or tensor.native.name
    return ENCODINGS[name if name in ENCODINGS else "F32"]


def unified_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor under its unified name."""
    return [Entry(name, name, tensor, kept(tensor, recipe.dtype)) for name, tensor in checkpoint.tensors.items()]


TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def main_dtype(entries: Sequence[Entry]) -> str:
    """torch's name of the type that most bytes have."""
    sizes = {name: sum(e.nbytes for e in entries if e.encoding.name == name) for name in TORCH_NAMES}
    return TORCH_NAMES[max(sizes, key=lambda name: sizes[name])]


def as_json(value: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def find_tokenizer(checkpoint: Checkpoint, recipe: Recipe) -> tokenizer.Tokenizer | None:
    """The one that was asked for, else the one in or near the source."""
    index = checkpoint.index
    places = [path.parent for path in index.configs]
    path = tokenizer_find.find(recipe.tokenizer, index.folder, index.settings, places)
    if path:
        return tokenizer.load(path)
    return tokenizer.from_gguf(index.settings) if "tokenizer.ggml.tokens" in index.settings else None


def to_hf(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A Hugging Face folder: sharded safetensors, configuration, tokenizer, model card."""
    entries = unified_entries(checkpoint, recipe)
    files = hf.layout(entries, recipe.shard_size)
    words = find_tokenizer(checkpoint, recipe)
    config = checkpoint.architecture.to_hf(checkpoint.config, main_dtype(entries)) | token_ids(checkpoint, words)
    sidecars = {
        "config.json": as_json(config),
        "generation_config.json": hf.generation_config(config),
        "README.md": hf.model_card(title(checkpoint), provenance(checkpoint)),
        **({"model.safetensors.index.json": hf.weight_index(files)} if len(files) > 1 else {}),
        **(tokenizer.hf_files(words, checkpoint.config.context) if words else {}),
    }
    return Content(
        files, sidecars, () if words else ("no tokenizer found; give one with --tokenizer to have it included",)
    )


def token_ids(checkpoint: Checkpoint, words: tokenizer.Tokenizer | None) -> dict[str, int]:
    """The tokens at which text begins and ends: as the source says, else the tokenizer's, else 0."""
    end = tokenizer.check_rows(words, checkpoint.config.rows)[tokenizer.END] if words else 0
    settings = checkpoint.index.settings
    names = ("bos_token_id", "eos_token_id")
    found = {name: settings.get(name, settings.get(f"tokenizer.ggml.{name}")) for name in names}
    return {name: value if type(value) is int else end for name, value in found.items()}


def to_safetensors(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """One .safetensors file, which holds the configuration in its metadata."""
    entries = unified_entries(checkpoint, recipe)
    facts = checkpoint.architecture.to_hf(checkpoint.config, main_dtype(entries))
    config = json.dumps(facts | token_ids(checkpoint, None), separators=(",", ":"))
    return Content((safetensors.layout("model.safetensors", entries, {"format": "pt", "config": config}),), {})


def to_gguf(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """A GGUF file (or several, with --split-size), with the tokenizer that llama.cpp needs."""
    choice = choice_of(checkpoint, recipe)
    words = find_tokenizer(checkpoint, recipe)
    if words is None:
        raise PlanError(
            f"{checkpoint.index.folder}: GGUF needs a tokenizer and none was found near it; "
            "give its tokenizer.json with --tokenizer FILE."
        )
    entries = gguf_entries(checkpoint, choice)
    keys = {
        "general.architecture": "gptneox",
        "general.type": "model",
        "general.name": title(checkpoint),
        "general.size_label": size_label(parameters(checkpoint)),
        **checkpoint.architecture.to_gguf(checkpoint.config),
        "general.file_type": MIXES[choice.mix].file_type,
        "general.quantization_version": 2,
        **tokenizer.gguf_keys(words, checkpoint.config.rows),
        **{f"tokenizer.ggml.{name}": value for name, value in token_ids(checkpoint, words).items()},
    }
    return Content(
        gguf_layout.layout("model", keys, entries, recipe.split_size),
        {},
        tuple(gguf_notes(checkpoint, choice, entries)),
    )


def choice_of(checkpoint: Checkpoint, recipe: Recipe) -> Choice:
    """The mix that the recipe asks for, with its overrides; by default BF16 for a bf16 source, else F16."""
    native = [tensor.native.name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    mix = recipe.type or ("BF16" if native.count("BF16") * 2 > len(native) else "F16")
    classic = recipe.mix == "classic"
    return Choice(mix, classic, recipe.pure, recipe.output_type, recipe.embedding_type, recipe.tensor_type)


def gguf_places(checkpoint: Checkpoint) -> list[tuple[Place, Weight]]:
    """Every tensor of a GGUF file, as a mix sees it and as the table has it; a head always, as llama.cpp wants one."""
    config = replace(checkpoint.config, tied=False)
    rows = checkpoint.architecture.names(config)
    columns = [math.prod(config.sizes[size] for size in weight.shape[1:]) for _, weight in rows]
    return [
        (Place(weight.gguf, weight.role, -1 if layer is None else layer, config.layers, width), weight)
        for (layer, weight), width in zip(rows, columns, strict=True)
    ]


def gguf_entries(checkpoint: Checkpoint, choice: Choice) -> list[Entry]:
    """Every tensor under its GGUF name, in GGUF's order of rows, with the encoding that the mix gives it."""
    entries = []
    for place, weight in gguf_places(checkpoint):
        unified = weight.unified
        tensor = checkpoint.tensors[unified if unified in checkpoint.tensors else GGUF_ALIASES[unified]]
        if weight.gguf_order:
            tensor = reordered(tensor, weight.gguf_order(checkpoint.config))
        entries.append(Entry(weight.gguf, unified, tensor, choose(choice, place)))
    return entries


def gguf_notes(checkpoint: Checkpoint, choice: Choice, entries: Sequence[Entry]) -> list[str]:
    """What differs from what the mix's name promises, and what llama.cpp will compute differently."""
    notes = []
    odd: dict[tuple[str, str], list[str]] = {}
    for entry, (place, weight) in zip(entries, gguf_places(checkpoint), strict=True):
        if len(weight.shape) == 2 and (name := wanted(choice, place)) != entry.encoding.name:
            odd.setdefault((name, entry.encoding.name), []).append(entry.name)
    for (name, instead), tensors in odd.items():
        shown = ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        block = ENCODINGS[name].dtype.block
        notes.append(f"{plural(len(tensors), 'tensor')} as {instead}: no rows of {name}'s {block} weights: {shown}")
    if checkpoint.config.activation == "gelu":
        notes.append("the model uses the erf GELU; llama.cpp computes the tanh form, so logits differ slightly")
    return notes


def title(checkpoint: Checkpoint) -> str:
    """A name that depends on the model alone."""
    return f"GPT-NeoX {size_label(parameters(checkpoint))}"


def size_label(count: int) -> str:
    """A count of parameters as llama.cpp rounds it: 20554567680 -> 21B, 10500000 -> 10M, 1400000000 -> 1.4B."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count > scale or suffix == "K":
            value = count / scale
            return f"{value:.{max(0, 2 - len(str(round(value)).lstrip('0')))}f}{suffix}"
    raise AssertionError(count)


def provenance(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Where a model comes from, in lines for its card."""
    index, config = checkpoint.index, checkpoint.config
    lines = [
        ("Source", f"{index.format} checkpoint, {len(index.files)} files, tensor parallelism {len(index.ranks)}"),
        ("Parameters", f"{parameters(checkpoint):,}"),
        (
            "Shape",
            f"{config.layers} layers, hidden {config.hidden}, {config.heads} heads, {config.rows} vocabulary rows",
        ),
        ("Norms of the ranks", checkpoint.norms if len(index.ranks) > 1 else "one rank"),
        ("Converted by", f"neoxconv {__version__}"),
    ]
    return lines + [("Note", note) for note in checkpoint.notes]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        #      name           one file  content
        Target("hf",          False,    to_hf),
        Target("safetensors", True,     to_safetensors),
        Target("slim",        False,    slim.content),
        Target("gguf",        True,     to_gguf),
    )
}  # fmt: skip

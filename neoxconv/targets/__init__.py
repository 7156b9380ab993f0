"""The targets: how a checkpoint becomes the files of each format. One row each in TARGETS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.targets import bnb, compressed_tensors, ctranslate2, float8, gguf, hf, loading, mlx, slim
from neoxconv.targets.card import Loading, card, kind_of
from neoxconv.targets.metadata import file_stem, words_of
from neoxconv.targets.recipe import Recipe
from neoxconv.targets.source_card import CARD


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format that can be written: what makes it, and what may be asked of it."""

    name: str
    single: bool  # a file and not a folder
    make: Callable[[Checkpoint, Recipe], Content]
    entries: Callable[[Checkpoint, Recipe], Sequence[Entry]]  # its tensors alone
    recipes: tuple[Recipe, ...]  # one for everything that a weight can become in it, as `formats` lists them
    options: tuple[str, ...]  # those of `convert` that not every target takes
    programs: str  # that run it (November 2026)
    loading: Loading  # how, as its card says
    only_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # option -> the types that it is for

    @property
    def types(self) -> tuple[str, ...]:
        """What --type can be; empty where the target takes none."""
        return tuple(dict.fromkeys(recipe.type for recipe in self.recipes if recipe.type))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What --dtype can be; empty where the target takes none."""
        return tuple(dict.fromkeys(recipe.dtype for recipe in self.recipes if recipe.dtype))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="hf",
            single=False,
            make=hf.to_hf,
            entries=hf.unified_entries,
            recipes=hf.RECIPES,
            programs="transformers, vLLM, SGLang, mlx-lm",
            loading=loading.HF,
            options=("dtype", "only", "shard_size", "metadata", "set", "allow_nonfinite"),
        ),
        Target(
            name="safetensors",
            single=True,
            make=hf.to_safetensors,
            entries=hf.unified_entries,
            recipes=hf.SAFETENSORS_RECIPES,
            programs="one file for keeping; neoxconv reads it",
            loading=loading.SAFETENSORS,
            options=("dtype", "only", "metadata", "set", "card", "allow_nonfinite"),
        ),
        Target(
            name="slim",
            single=False,
            make=slim.to_slim,
            entries=slim.slim_entries,
            recipes=slim.RECIPES,
            programs="gpt-neox, to train on",
            loading=loading.SLIM,
            options=("dtype", "tp", "pp", "current_names", "as_family", "metadata", "set", "allow_nonfinite"),
        ),
        Target(
            name="gguf",
            single=True,
            make=gguf.to_gguf,
            entries=gguf.gguf_entries,
            recipes=gguf.RECIPES,
            programs="llama.cpp, ollama, LM Studio, KoboldCpp",
            loading=loading.GGUF,
            options=("type", "split_size", "as_family", *gguf.OPTIONS, "metadata", "set", "card", "allow_nonfinite"),
        ),
        Target(
            name="bnb",
            single=False,
            make=bnb.to_bnb,
            entries=bnb.bnb_entries,
            recipes=bnb.RECIPES,
            programs="transformers with bitsandbytes (vLLM no longer reads it)",
            loading=loading.BNB,
            options=("type", "shard_size", "double_quant", "compute_dtype", "calibration", "metadata", "set"),
            only_of={"double_quant": bnb.FOUR_BIT, "compute_dtype": bnb.FOUR_BIT},
        ),
        Target(
            name="float8",
            single=False,
            make=float8.to_float8,
            entries=float8.float8_entries,
            recipes=float8.RECIPES,
            programs="transformers with compressed-tensors; vLLM on a GPU",
            loading=loading.FLOAT8,
            options=("type", "shard_size", "scale", "calibration", "metadata", "set"),
        ),
        Target(
            name="compressed-tensors",
            single=False,
            make=compressed_tensors.to_compressed_tensors,
            entries=compressed_tensors.compressed_entries,
            recipes=compressed_tensors.RECIPES,
            programs="vLLM, transformers with compressed-tensors",
            loading=loading.COMPRESSED,
            options=("type", "shard_size", "group", "asymmetric", "calibration", "metadata", "set"),
            only_of={"group": compressed_tensors.PACKED, "asymmetric": compressed_tensors.PACKED},
        ),
        Target(
            name="mlx",
            single=False,
            make=mlx.to_mlx,
            entries=mlx.mlx_entries,
            recipes=mlx.RECIPES,
            programs="mlx-lm",
            loading=loading.MLX,
            options=("type", "group", "shard_size", "calibration", "metadata", "set"),
            only_of={"group": mlx.AFFINE},
        ),
        Target(
            name="ctranslate2",
            single=False,
            make=ctranslate2.to_ctranslate2,
            entries=ctranslate2.ctranslate2_entries,
            recipes=ctranslate2.RECIPES,
            programs="CTranslate2",
            loading=loading.CTRANSLATE2,
            options=("type", "calibration", "metadata", "set"),
        ),
    )
}

TAKEN_BY: dict[str, tuple[str, ...]] = {
    option: tuple(target.name for target in TARGETS.values() if option in target.options)
    for option in dict.fromkeys(option for target in TARGETS.values() for option in target.options)
}


def content_of(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """What the recipe's target will hold, with its default name and its card, which a folder has in it."""
    target = TARGETS[recipe.format]
    content, words = target.make(checkpoint, recipe), words_of(checkpoint, recipe)
    kind, single = kind_of(content, recipe), target.single and not recipe.split_size
    page = card(words, checkpoint, content, recipe, loading=target.loading)
    named = file_stem(words.keys, kind) if target.single else f"{file_stem(words.keys)}-{target.name}-{kind}"
    return replace(
        content,
        kind=kind,
        name=content.files[0].name if single else named,
        card=page,
        sidecars=content.sidecars if single else {**content.sidecars, CARD: page},
        notes=tuple(dict.fromkeys((*content.notes, *words.notes))),
    )

"""The MLX target: a folder that mlx_lm loads and runs, its matrices quantized as MLX does.

    config.json         Hugging Face's, with "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}
    model.safetensors   or shards; the layers' matrices, the embedding and the head quantized, the rest as it was
    and the tokenizer, generation_config.json, README.md

Names are those of mlx_lm's modules (models/gpt_neox.py, `sanitize`). A matrix whose columns are no multiple of the
group stays as it is, as mlx_lm leaves it (utils.py, quantize_model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from neoxconv.core.encoding import Scaled
from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.errors import PlanError, raise_all
from neoxconv.names import MLX_TYPES
from neoxconv.quant.scaled.mlx import GROUPS, MLX
from neoxconv.targets.hf import unified_entries
from neoxconv.targets.linear import quantized_folder
from neoxconv.targets.recipe import Recipe

_DEFAULT, _GROUP = "4bit", "64"
AFFINE = tuple(kind for kind in MLX_TYPES if kind.endswith("bit"))
RECIPES = (  # all that `formats` lists
    *(Recipe("mlx", type=kind, group=str(group)) for kind in AFFINE for group in GROUPS),
    *(Recipe("mlx", type=kind) for kind in MLX_TYPES if kind not in AFFINE),
)
# What mlx_lm 0.32 computes otherwise, by family: whether a model is so, and what is to be said.
_OTHERWISE: Mapping[str, tuple[tuple[Callable[[ModelConfig], bool], str], ...]] = {
    "gpt_neox": (
        (lambda c: c.activation != "gelu_tanh", "the model's GELU is the exact one (erf), mlx_lm has the tanh form"),
        (lambda c: c.ff != 4 * c.hidden, "the model's MLP is not 4 times as wide as its hidden size, as in mlx_lm"),
        (lambda c: c.tied, "the model's head is its embedding (tied), mlx_lm wants a head"),
    ),
    "mistral": ((lambda c: bool(c.window and c.window < c.context), "mlx_lm has no window of attention"),),
}


def to_mlx(checkpoint: Checkpoint, recipe: Recipe) -> Content:
    """The folder. Its tensors are those of `mlx_lm.convert` on a CPU, byte by byte."""
    entries = mlx_entries(checkpoint, recipe)
    mode, bits, group = _kind_of(recipe)
    told = {"group_size": group, "bits": bits, "mode": mode}
    content = quantized_folder(
        checkpoint, recipe, entries, {"quantization": told, "quantization_config": told}, library="mlx"
    )
    plain = [e.unified for e in entries if len(e.tensor.shape) == 2 and not isinstance(e.encoding, Scaled)]
    return replace(content, notes=(*content.notes, *_kept(plain, group)))


def _kept(names: list[str], group: int) -> list[str]:
    """A note on the matrices that are not quantized."""
    if not names:
        return []
    return [f"not quantized, as {group} does not divide their columns, and MLX leaves them: {', '.join(names)}"]


def mlx_entries(checkpoint: Checkpoint, recipe: Recipe) -> list[Entry]:
    """Every tensor, the matrices in the encoding that the recipe asks for.

    Raises PlanError for a model that mlx_lm does not run, or runs as another function.
    """
    _refuse(checkpoint)
    encoding, architecture = MLX[_kind_of(recipe)], checkpoint.architecture
    matrices = {w.unified for _, w in architecture.names(checkpoint.config) if len(w.shape) == 2}

    def entry(plain: Entry) -> Entry:
        name = architecture.mlx_name(plain.name)
        if plain.name not in matrices or plain.tensor.columns % encoding.multiple:
            return replace(plain, name=name)
        tensor = replace(checkpoint.tensors[plain.name], native=plain.encoding.dtype)
        return replace(plain, name=name, tensor=tensor, encoding=encoding)

    return list(map(entry, unified_entries(checkpoint, recipe)))


def _kind_of(recipe: Recipe) -> tuple[str, int, int]:
    """The mode, bits and group that a recipe asks for. Raises PlanError where there is no such type."""
    kind = recipe.type or _DEFAULT
    group = recipe.group or _GROUP
    wanted = ("affine", kind[0], group) if kind in AFFINE else None
    found = next(
        (each for each in MLX if tuple(map(str, each)) == wanted or (wanted is None and each[0] == kind)), None
    )
    if found is None:
        raise PlanError(
            f"mlx has {', '.join(MLX_TYPES)}, those of bits in groups of {', '.join(map(str, GROUPS))}; "
            f"found {kind} in groups of {group}."
        )
    return found


def _refuse(checkpoint: Checkpoint) -> None:
    """Raise PlanError for a model that mlx_lm does not run as what it is."""
    architecture = checkpoint.architecture
    if not architecture.mlx:
        raise PlanError(
            f"--to mlx: {architecture.title} is not written for MLX; give --to hf, which transformers runs, or gguf."
        )
    raise_all(PlanError, (
        f"--to mlx: {what}; give --to hf, which transformers runs."
        for is_so, what in _OTHERWISE.get(architecture.name, ()) if is_so(checkpoint.config)
    ))  # fmt: skip

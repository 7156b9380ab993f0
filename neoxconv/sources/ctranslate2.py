"""A folder of CTranslate2's as a Hugging Face one: the names, the order of rows and the settings of its family.

Tensors that are fused there are taken apart, and matrices of 8 bits joined with their scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from neoxconv.arch import ARCHITECTURES
from neoxconv.arch.ctranslate2.names import EMBEDDING, HEAD, rows_of
from neoxconv.arch.ctranslate2.settings import Said, config_of, family_of
from neoxconv.core.model import Architecture, Index, SourceFile
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, band, reordered, transposed
from neoxconv.dtypes import F16, F32, FLOATS, I8, PLAIN, TORCH_NAMES, DType
from neoxconv.errors import CheckpointError
from neoxconv.formats.ctranslate2.read import MODEL, Model, read_config, read_model, read_vocabulary
from neoxconv.quant import SCALED
from neoxconv.quant.scaled.ctranslate2 import CODES, SCALE
from neoxconv.storage import Place

_INT8 = SCALED["CT2_INT8"]
_OURS = "neoxconv_"  # what we say of how codes were chosen
_ENDS = ("bos", "eos")  # the tokens that config.json names by their texts, and Hugging Face's by their ids
_TIED = (HEAD, EMBEDDING)


def index(folder: Place) -> Index:
    """Index the folder. Raises CheckpointError for what is damaged, and for what makes another function than ours."""
    model, settings = read_model(folder / MODEL), read_config(folder)
    tensors, native = _joined(model)
    tied = model.aliases.get(HEAD) == EMBEDDING
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    said = Said(str(model.file.path), model.scalars, settings, shapes, tied)
    architecture = _architecture(family_of(said))
    config = config_of(said, architecture.name)
    told = architecture.to_hf(config, TORCH_NAMES[native.name])
    for kind in _ENDS:
        told.pop(f"{kind}_token_id", None)
    return Index(
        format="ctranslate2",
        folder=folder,
        files=(SourceFile(model.file, model.checksum),),
        ranks=(_unified(model, tensors, architecture, config),),
        settings=told | _ids(folder, settings) | {name: settings[name] for name in settings if name.startswith(_OURS)},
    )


def _architecture(family: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == family)


def _joined(model: Model) -> tuple[dict[str, LazyTensor], DType]:
    """Every tensor by its name and by those that stand for it, scales joined with their codes; the type of most others.

    The head of a tied model is left out. Raises CheckpointError where a matrix of 8 bits has no scales that fit.
    """
    scales = {name for name in model.tensors if name.endswith(f"/{SCALE}")}
    sizes: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        if tensor.dtype.name in FLOATS and name not in scales:
            sizes[tensor.dtype.name] += tensor.nbytes
    native = PLAIN[max(sizes, key=lambda name: sizes[name])] if sizes else F16
    found = {
        name: _with_scale(model, name, native) if tensor.dtype is I8 else tensor
        for name, tensor in model.tensors.items()
        if name not in scales
    }
    found |= {alias: found[name] for alias, name in model.aliases.items() if name in found}
    return {name: t for name, t in found.items() if (name, model.aliases.get(name)) != _TIED}, native


def _with_scale(model: Model, name: str, native: DType) -> LazyTensor:
    """The numbers that a matrix of 8 bits stands for."""
    codes, scale = model.tensors[name], model.tensors.get(name.removesuffix(CODES) + SCALE)
    if len(codes.shape) != 2 or scale is None or scale.dtype is not F32 or scale.shape != codes.shape[:1]:
        found = f"{scale.dtype.name} {list(scale.shape)}" if scale else "missing"
        raise CheckpointError(
            f"{model.file.path}: {name} is I8 {list(codes.shape)} and {name}_scale {found}; expected a matrix and "
            f"F32 of one number a row. Download it again."
        )
    read = _INT8.decode({CODES: codes, SCALE: scale}, codes.shape)
    return LazyTensor(codes.shape, _INT8.dtype, read, native)


def _unified(
    model: Model, tensors: Mapping[str, LazyTensor], architecture: Architecture, config: ModelConfig
) -> dict[str, LazyTensor]:
    """The tensors by Hugging Face's names and as its files have them; those that no family has under their own names.

    Raises CheckpointError where one has not as many rows as the weights in it.
    """
    weights = {weight.unified: weight for _, weight in architecture.names(config)}
    left, found = dict(tensors), {}
    for row in rows_of(architecture.name, config):
        if row.name not in left or any(part not in weights for part in row.parts):
            continue
        tensor, sizes = left.pop(row.name), [config.sizes[weights[part].shape[0]] for part in row.parts]
        if tensor.rows != sum(sizes):
            raise CheckpointError(
                f"{model.file.path}: {row.name} is {list(tensor.shape)}; expected {sum(sizes)} rows of a model with "
                f"{config.heads} heads, {config.key_heads} of keys and values. Download it again."
            )
        if row.order:
            tensor = reordered(tensor, np.argsort(row.order(config)))
        ends = np.cumsum(sizes).tolist()
        for part, size, end in zip(row.parts, sizes, ends, strict=True):
            single = band(tensor, end - size, end) if len(sizes) > 1 else tensor
            found[part] = transposed(single) if weights[part].transposed and not single.dtype.quantized else single
    return {**found, **left}


def _ids(folder: Place, settings: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokens that begin and end a text, where vocabulary.json has them."""
    texts = read_vocabulary(folder)
    told = {kind: settings.get(f"{kind}_token") for kind in _ENDS}
    return {f"{kind}_token_id": texts.index(text) for kind, text in told.items() if text in texts}

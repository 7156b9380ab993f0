"""Whether attention and MLP read one norm's output: gpt-neox's `gpt_j_tied`, with a parallel residual.

The files have post_attention_layernorm all the same: unused, it stays as it began, exactly 1 and 0. Code of December
2022 (from 0accac61 on the 6th to f607953d on the 27th) tested the setting the wrong way around, so of a checkpoint from
then the norm itself tells which it was. TransformerEngine's MLP has a norm of its own whatever the setting is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from neoxconv.arch.settings import Settings
from neoxconv.core.model import Index
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import FLOATS
from neoxconv.storage import together

_KEY = "gpt_j_tied"
_FIRST, _SECOND = "input_layernorm.weight", "post_attention_layernorm.weight"
_OF_ITS_OWN = "mlp.layer_norm_weight"
_LARGEST = 1 << 20  # numbers of a norm, far above any model's
_UNUSED = (
    "post_attention_layernorm is 1 and 0 in every layer, as it began: gpt-neox never used it, so attention and MLP "
    f"share a norm. ({_KEY} was read the wrong way around in December 2022; a YAML with {_KEY}: false, given with "
    "--config FILE, overrules this.)"
)


def shared_norm(index: Index, read: Settings, *, asked: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether the model was trained with one norm in a layer, and a note where its tensors and not its YAML tell.

    `asked`: the YAML was given by the user, and so it decides where it has the setting.
    """
    if not read.truth("gpt_j_residual", False) or any(name.endswith(_OF_ITS_OWN) for name in index.ranks[0]):
        return False, ()
    if read.truth(_KEY, False):
        return True, ()
    if asked and _KEY in read.values:
        return False, ()
    return (True, (_UNUSED,)) if _never_used(index) else (False, ())


def trained_in_vain(index: Index, config: ModelConfig) -> Iterator[tuple[int, str, str]]:
    """The second norm of the first layer, where it was trained although the configuration leaves it unused."""
    name = _named(index, _SECOND)[:1]
    if config.shared_norm and name and not (_as_it_began(index, name[0]) or _copied(index, name[0])):
        yield 0, name[0], f"was trained, but {_KEY} is true, with which gpt-neox uses input_layernorm in its place"


def _never_used(index: Index) -> bool:
    """Whether the second norm of every layer is as it began, and the first is not. Most often one tensor tells."""
    seconds, firsts = _named(index, _SECOND), _named(index, _FIRST)
    if not seconds or not firsts or not _as_it_began(index, seconds[0]) or _as_it_began(index, firsts[0]):
        return False
    return all(together(lambda name: _as_it_began(index, name), seconds[1:], index.folder))


def _named(index: Index, ending: str) -> list[str]:
    """The tensors of rank 0 whose names end so."""
    return [name for name in index.ranks[0] if name.endswith(f".{ending}")]


def _as_it_began(index: Index, name: str) -> bool:
    """Whether a norm's gain is 1 and its bias 0 throughout."""
    tensors = index.ranks[0]
    bias = tensors.get(name.removesuffix("weight") + "bias")
    return _is_all(tensors[name], 1.0) and (bias is None or _is_all(bias, 0.0))


def _copied(index: Index, name: str) -> bool:
    """Whether a layer's second norm is its first once more, as neoxconv writes it for other numbers of ranks."""
    first = index.ranks[0].get(name.replace(_SECOND, _FIRST))
    second = index.ranks[0][name]
    if first is None or not _is_readable(first) or not _is_readable(second) or first.shape != second.shape:
        return False
    return bool(np.array_equal(first.floats(0, first.rows), second.floats(0, second.rows)))


def _is_readable(tensor: LazyTensor) -> bool:
    return tensor.dtype.name in FLOATS and len(tensor.shape) == 1 and 0 < tensor.rows <= _LARGEST


def _is_all(tensor: LazyTensor, value: float) -> bool:
    """Whether a vector has this value everywhere."""
    return _is_readable(tensor) and bool((tensor.floats(0, tensor.rows) == value).all())

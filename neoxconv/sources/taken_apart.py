"""The fused tensors of a gpt-neox checkpoint taken apart, in the layout that its files or the user tell."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from neoxconv.arch.fused import apart
from neoxconv.core.model import Architecture, Index, Opening
from neoxconv.core.table import Fused, ModelConfig, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError, PlanError, UntoldError, raise_all
from neoxconv.formats.neox.numbers import FIRST_LAYER
from neoxconv.sources.naming import home


def fused_tensors(
    index: Index, named: RankTensors, architecture: Architecture, config: ModelConfig, opening: Opening
) -> tuple[Fused, ...]:
    """The fused tensors that a source holds, each in the layout that it has there.

    Raises UntoldError where neither the files nor --qkv-layout tell which of several it is, PlanError for a layout
    that is none of them.
    """
    there = [fused for fused in architecture.fused if any(fused.name_at(0) in rank for rank in named)]
    layouts = list(dict.fromkeys(fused.layout for fused in there if fused.layout))
    if opening.qkv_layout and opening.qkv_layout not in layouts:
        expected = f"expected {' or '.join(layouts)}" if layouts else f"{index.where} has one only; leave it out"
        raise PlanError(f"--qkv-layout {opening.qkv_layout}: {expected}.")
    if not layouts:
        return tuple(there)
    layout = opening.qkv_layout or architecture.layout_of(index, config)
    if layout is None:
        name = next(fused.source for fused in there if fused.layout)
        raise UntoldError(
            f"{index.where}: nothing in the files tells the order of rows in {name}, which gpt-neox changed on "
            f"2024-11-14. Give --qkv-layout {' or '.join(layouts)} (docs/formats.md); `inspect --try TEXT` shows "
            "with which one it is a language model.",
            "qkv_layout",
            tuple(layouts),
        )
    return tuple(fused for fused in there if fused.layout in (None, layout))


def taken_apart(
    index: Index, named: RankTensors, fused: Sequence[Fused], architecture: Architecture, config: ModelConfig
) -> RankTensors:
    """Each rank's tensors by unified name, the parts of fused ones in their place.

    Raises CheckpointError where one has not the shape that the configuration gives it, or a part is there twice.
    """
    weights = {weight.unified: weight for weight in architecture.weights if weight.when(config)}
    problems: list[str] = []
    result = [dict(tensors) for tensors in named]
    for rank, tensors in enumerate(result):
        for each, layer in itertools.product(fused, range(len(named[rank]))):
            tensor = tensors.pop(each.name_at(layer), None)
            if tensor is None:
                continue
            names = each.parts_at(layer)
            known = [weights[part] for part in each.parts if part in weights]
            if problem := _problem(each, tensor, known, names, tensors, len(named), config):
                problems.append(f"{home(index, rank, f'{layer + FIRST_LAYER}.{each.source}')}: {each.source} {problem}")
            else:
                tensors |= zip(names, apart(each, known, tensor, len(named), config), strict=True)
    raise_all(CheckpointError, problems)
    return result


def _problem(
    fused: Fused,
    tensor: LazyTensor,
    weights: Sequence[Weight],
    names: Sequence[str],
    others: Mapping[str, LazyTensor],
    degree: int,
    config: ModelConfig,
) -> str | None:
    """Why a rank's tensor cannot be taken apart; None where it can."""
    if len(weights) < len(names):
        return "does not belong to a model of this configuration; give the right one with --config."
    if twice := [name for name in names if name in others]:
        return f"gives {twice[0]} a second time; remove one of them."
    whole = [config.sizes[weight.shape[0]] for weight in weights]
    if tensor.rows * degree != sum(whole) or any(rows % degree for rows in whole) or config.key_heads % degree:
        heads = f"{config.heads} heads, {config.key_heads} of keys and values"
        return (
            f"is {list(tensor.shape)}, but the configuration ({heads}) makes {sum(whole)} rows of {degree} equal "
            "ranks; give the right one with --config or --preset."
        )
    return None

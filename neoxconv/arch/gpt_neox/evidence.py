"""What a source stores besides its weights and a configuration can contradict: the rotary frequencies of its layers.

gpt-neox stored them until 2024, and read them back in place of what its YAML says; so did transformers until 4.31.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from neoxconv.arch.gpt_neox.training import inverse_frequencies
from neoxconv.core.model import Index
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import BF16, F16, F32, FLOATS, Floats, narrow, widen
from neoxconv.storage import is_far

_FREQUENCIES = "attention.rotary_emb.inv_freq"
_MOST = 1 << 12  # frequencies of a head, far above any model's
# How far a frequency may be from the exact one: relative, absolute. The first type that holds all values is the one
# that they were rounded to, whatever they are stored as: models trained in fp16 were released in fp32.
_ROUNDED = ((BF16, 2**-7, 2**-24), (F16, 2**-10, 2**-24), (F32, 2**-18, 0.0))


def contradictions(index: Index, config: ModelConfig) -> Iterator[tuple[int, str, str]]:
    """Stored frequencies that are not the configuration's: their rank, the source's name of them, both values in words.

    Of alike ones the first is told. Far away only one tensor is read, with one request: all layers should be alike.
    """
    found = [
        (rank, name, tensor)
        for rank, tensors in enumerate(index.ranks)
        for name, tensor in tensors.items()
        if name.endswith(_FREQUENCIES) and _is_readable(tensor)
    ]
    told: dict[str, tuple[int, str]] = {}
    for rank, name, tensor in found[:1] if is_far(index.folder) else found:
        stored = tensor.floats(0, tensor.rows)
        if stored.any() and not _alike(stored, config):  # zeros are no frequencies of any base: a file of holes
            told.setdefault(f"holds rotary frequencies of {_described(stored)}, but {_told(config)}", (rank, name))
    yield from ((rank, name, both) for both, (rank, name) in told.items())


def _is_readable(tensor: LazyTensor) -> bool:
    """Whether a tensor can be frequencies."""
    return tensor.dtype.name in FLOATS and len(tensor.shape) == 1 and 0 < tensor.rows <= _MOST


def _alike(stored: Floats, config: ModelConfig) -> bool:
    """Whether frequencies are those of a configuration, as far as the type that they were rounded to can tell."""
    expected = inverse_frequencies(config)
    if stored.shape != expected.shape:
        return False
    relative, absolute = next(
        (
            (relative, absolute)
            for dtype, relative, absolute in _ROUNDED
            if np.array_equal(widen(narrow(stored, dtype), dtype), stored)
        ),
        _ROUNDED[-1][1:],
    )
    return bool(np.all(np.abs(stored - expected) <= relative * expected + absolute))


def _described(stored: Floats) -> str:
    """The rotary dimensions and the base that frequencies tell: entry i is base ^ (-2i / dimensions)."""
    dims, last = 2 * stored.size, float(stored[-1])
    told = f"{dims} dimensions"
    if stored.size < 2 or not 0 < last < np.inf:
        return told
    base = _base_of(last, stored.size)
    return f"base {base:.4g} and {told}" if base < 1e4 else f"base {float(f'{base:.4g}'):.0f} and {told}"


def _base_of(last: float, count: int) -> float:
    """The base of which the last of `count` frequencies is that one; infinite where no number is so large."""
    try:
        return float(last ** (-count / (count - 1)))
    except OverflowError:
        return float("inf")


def _told(config: ModelConfig) -> str:
    """The configuration's rotary settings, in its words."""
    base, dims = config.rotary_base, config.rotary_dims
    return f"rotary_emb_base {base:.15g} and rotary_pct {config.rotary_pct:g} ({dims} dimensions) are configured"

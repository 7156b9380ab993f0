"""How tensor-parallel ranks' parts become one tensor, and how one tensor is split again.

Joins that only move bytes keep the ranks' number type. Those that compute (a mean, a sum) give float32 that nobody has
rounded yet, so that a writer rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from neoxconv.core.table import Join, ModelConfig, Ranks
from neoxconv.core.tensor import LazyTensor, band, computed
from neoxconv.dtypes import Array, Floats, narrow


def stacked(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The ranks' rows one below the other: column- and vocab-parallel weights, and biases of the former."""
    ends = np.cumsum([rank.rows for rank in ranks]).tolist()
    starts = [0, *ends[:-1]]

    def read(start: int, stop: int) -> Array:
        bands = [
            rank.read(max(start, a) - a, min(stop, b) - a)
            for rank, a, b in zip(ranks, starts, ends, strict=True)
            if start < b and stop > a
        ]
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    return replace(ranks[0], shape=(ends[-1], *ranks[0].shape[1:]), read=read)


def abreast(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The ranks' columns side by side: row-parallel weights."""
    columns = sum(rank.columns for rank in ranks)

    def read(start: int, stop: int) -> Array:
        return np.concatenate([rank.read(start, stop) for rank in ranks], axis=1)

    return replace(ranks[0], shape=(ranks[0].rows, columns), read=read)


def head_join(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The head, which gpt-neox splits by rows or (`output_layer_parallelism: row`) by columns: the shape tells."""
    return (stacked if ranks[0].columns == config.hidden else abreast)(ranks, config)


def _total(ranks: Ranks, start: int, stop: int) -> Floats:
    """The ranks' sum in float32, added in the order of the ranks."""
    result = ranks[0].floats(start, stop).copy()
    for rank in ranks[1:]:
        result += rank.floats(start, stop)
    return result


def summed(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The ranks' sum."""
    return computed(ranks[0], lambda start, stop: _total(ranks, start, stop))


def averaged(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The ranks' mean; equal copies stay as they are, which (x + x + x) / 3 does not."""

    def read(start: int, stop: int) -> Floats:
        mean = _total(ranks, start, stop) / np.float32(len(ranks))
        parts = [rank.floats(start, stop) for rank in ranks]
        return np.where(np.all([part == parts[0] for part in parts], axis=0), parts[0], mean)

    return computed(ranks[0], read)


def first(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """What rank 0 holds."""
    return ranks[0]


def _row_bias_join(ranks: Ranks, config: ModelConfig) -> LazyTensor:
    """The bias of a row-parallel layer.

    With a parallel residual every rank adds its own before the one all-reduce, so their sum acts. With a serial one it
    is added once, after the all-reduce: the ranks hold replicas, and the mean is taken of what drifted.
    """
    return (summed if config.parallel_residual else averaged)(ranks, config)


def by_rows(tensor: LazyTensor, ranks: int, config: ModelConfig) -> list[LazyTensor]:
    """Equal bands of rows."""
    part = tensor.rows // ranks
    return [band(tensor, rank * part, (rank + 1) * part) for rank in range(ranks)]


def by_columns(tensor: LazyTensor, ranks: int, config: ModelConfig) -> list[LazyTensor]:
    """Equal bands of columns."""
    if ranks == 1:
        return [tensor]
    part = tensor.columns // ranks

    def columns(rank: int) -> LazyTensor:
        def read(start: int, stop: int) -> Array:
            step = max(1, (stop - start) // ranks)  # so that no more is read at once than is asked for
            bands = (tensor.read(a, min(a + step, stop)) for a in range(start, stop, step))
            return np.concatenate([rows[:, rank * part : (rank + 1) * part].copy() for rows in bands])

        return replace(tensor, shape=(tensor.rows, part), read=read)

    return [columns(rank) for rank in range(ranks)]


def copies(tensor: LazyTensor, ranks: int, config: ModelConfig) -> list[LazyTensor]:
    """The whole tensor for every rank."""
    return [tensor] * ranks


def _row_bias_split(tensor: LazyTensor, ranks: int, config: ModelConfig) -> list[LazyTensor]:
    """Whole for rank 0 and zero for the others where the ranks' biases are summed, else copies.

    The zero is -0, which leaves every number as it is when added, -0 included.
    """
    if not config.parallel_residual:
        return [tensor] * ranks
    zeros = replace(tensor, read=lambda start, stop: narrow(np.full(stop - start, -0.0, np.float32), tensor.dtype))
    return [tensor, *[zeros] * (ranks - 1)]


column_parallel = Join("column-parallel", stacked, by_rows)
row_parallel = Join("row-parallel", abreast, by_columns)
vocab_parallel = Join("vocab-parallel", stacked, by_rows)
head_parallel = Join("vocab-parallel head", head_join, by_rows)
replica = Join("replica", averaged, copies)
row_bias = Join("row-parallel bias", _row_bias_join, _row_bias_split)
norm_mean = Join("replicated norm", averaged, copies)

NORMS = {
    "mean": norm_mean,
    "rank0": Join("replicated norm", first, copies),
    "fold": norm_mean,  # by then the ranks agree: fold.py has moved their differences into the next weights
}


def join(how: Join, ranks: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
    """The tensor that the ranks hold together; a single rank's is taken as it is."""
    return how.join(ranks, config) if len(ranks) > 1 else ranks[0]

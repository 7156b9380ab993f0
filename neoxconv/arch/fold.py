"""The exact merge: move the ranks' different norms into the weights that follow, so that one norm serves all ranks.

With x the normalised stream (the same on every rank), rank r computes W_r (g_r x + b_r) + c_r. For any common g and b

    W'_r = W_r diag(g_r / g),    c'_r = c_r + W_r (b_r - (g_r / g) b)

computes the same. RMSNorm has no b, so its second half is nothing. LayerNorm has one, and the head no bias c_r to take
it; but x sums to zero, so adding u 1^T diag(1 / g) to the head's weight changes nothing of its product with g x and
adds u sum(b / g) to its product with b:

    E'_r = E_r diag(g_r / g) + u_r 1^T diag(1 / g),    u_r = E_r (b_r - (g_r / g) b) / sum(b / g)

g and b are ours to choose: the ranks' mean, kept away from zero, and rounded to the stored type so that what is written
is what was folded with. A head split by columns needs none of this: there each rank sees only its part of the norm,
and the common norm is those parts side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neoxconv.core.model import Architecture
from neoxconv.core.table import ModelConfig, RankTensors, Weight
from neoxconv.core.tensor import LazyTensor, computed
from neoxconv.dtypes import Doubles, Floats, narrow, widen
from neoxconv.errors import PlanError

_TINY = 1e-3  # a gain that is divided by is kept at least this far from zero
_SHIFT = 0.05  # mean of b / g that the head's fold divides by; 0.01 to 1 do equally well


@dataclass(frozen=True)
class _Norm:
    """A norm as one rank has it (gain, bias) beside the common one, all [hidden] float64."""

    gain: Doubles
    bias: Doubles
    common_gain: Doubles
    common_bias: Doubles

    @property
    def ratio(self) -> Doubles:
        return self.gain / self.common_gain

    @property
    def offset(self) -> Doubles:
        """What the common bias leaves to add to this rank's."""
        return self.bias - self.ratio * self.common_bias


def folded(named: RankTensors, architecture: Architecture, config: ModelConfig) -> RankTensors:
    """The ranks' tensors with one common norm each; raises PlanError where the function cannot be kept."""
    if config.tied:
        raise PlanError(
            "--norms fold: the head is the embedding, so the final norm cannot be folded into it; use --norms mean."
        )
    result: RankTensors = [dict(rank) for rank in named]
    for _, weight in architecture.names(config):
        if weight.norm is None:
            continue
        unified, norm = weight.unified, weight.norm
        norms = _rank_norms(named, norm, weight, config)
        for rank, tensors in enumerate(named):
            result[rank][unified] = _fold_one(tensors, unified, weight, norms[rank])
            common = {norm + ".weight": norms[0].common_gain, norm + ".bias": norms[0].common_bias}
            result[rank] |= {name: known(tensors[name], values) for name, values in common.items() if name in tensors}
    return result


def _rank_norms(named: RankTensors, norm: str, weight: Weight, config: ModelConfig) -> list[_Norm]:
    """The norm on every rank, each with the common one; the biases of one that has none are zero."""
    gains = [rank[norm + ".weight"].floats(0, config.hidden).astype(np.float64) for rank in named]
    found = [rank.get(norm + ".bias") for rank in named]
    biases = [bias.floats(0, config.hidden).astype(np.float64) if bias else np.zeros(config.hidden) for bias in found]
    like = named[0][norm + ".weight"]
    if weight.role == "head" and named[0][weight.unified].columns != config.hidden:
        part = config.hidden // len(named)  # `output_layer_parallelism: row`: the head's ranks hold bands of columns
        gain, bias = (
            np.concatenate([v[r * part : (r + 1) * part] for r, v in enumerate(vs)]) for vs in (gains, biases)
        )
        return [_Norm(gain, bias, gain, bias)] * len(named)
    gain = as_stored(away_from_zero(sum(gains) / len(gains)), like)  # type: ignore[arg-type]
    bias = sum(biases) / len(biases)  # type: ignore[assignment]
    if weight.role == "head" and all(found):
        bias = bias + gain * (_SHIFT - row_sums((bias / gain)[None])[0] / len(gain))
    return [_Norm(g, b, gain, as_stored(bias, like)) for g, b in zip(gains, biases, strict=True)]


def away_from_zero(gain: Doubles) -> Doubles:
    """`gain` with a magnitude of at least TINY and its sign kept."""
    return np.where(np.abs(gain) < _TINY, np.copysign(_TINY, gain), gain)


def as_stored(values: Doubles, like: LazyTensor) -> Doubles:
    """`values` rounded to the type in which `like` is stored."""
    return widen(narrow(values.astype(np.float32), like.native), like.native).astype(np.float64)


def known(like: LazyTensor, values: Doubles) -> LazyTensor:
    """A vector known already, in the place of `like`."""
    floats = values.astype(np.float32)
    return computed(like, lambda start, stop: floats[start:stop])


def _fold_one(tensors: dict[str, LazyTensor], unified: str, weight: Weight, norm: _Norm) -> LazyTensor:
    """One rank's weight or bias, changed so that it follows the common norm."""
    tensor = tensors[unified]
    if weight.role == "bias":
        return _fold_bias(tensor, tensors[unified.removesuffix("bias") + "weight"], norm)
    if tensor.columns != len(norm.gain):  # a head by columns, whose ranks see their own norm
        return tensor
    if norm.offset.any() and weight.role == "head":
        return _fold_head(tensor, norm)

    def read(start: int, stop: int) -> Floats:
        return (tensor.floats(start, stop) * norm.ratio).astype(np.float32)

    return computed(tensor, read)


def _fold_bias(bias: LazyTensor, weight: LazyTensor, norm: _Norm) -> LazyTensor:
    """The bias plus what the norms' biases contribute through the weight, whose rows are read a band at a time."""
    if not norm.offset.any():
        return bias

    def read(start: int, stop: int) -> Floats:
        step = max(1, (1 << 20) // weight.columns)
        sums = [row_sums(weight.floats(a, min(a + step, stop)) * norm.offset) for a in range(start, stop, step)]
        return (bias.floats(start, stop) + np.concatenate(sums)).astype(np.float32)

    return computed(bias, read)


def _fold_head(head: LazyTensor, norm: _Norm) -> LazyTensor:
    """The head's weight with the norms' biases spread over its columns."""
    lever = row_sums((norm.common_bias / norm.common_gain)[None])[0]

    def read(start: int, stop: int) -> Floats:
        rows = head.floats(start, stop)
        u = row_sums(rows * norm.offset) / lever
        folded_rows: Doubles = rows * norm.ratio + u[:, None] / norm.common_gain
        return folded_rows.astype(np.float32)

    return computed(head, read)


def row_sums(products: Doubles) -> Doubles:
    """The sum of each row, [rows, n] -> [rows], by halving: the same order on every machine and for every slab."""
    while products.shape[1] > 1:
        half = products.shape[1] // 2
        folded_half = products[:, :half] + products[:, half : 2 * half]
        products = np.concatenate([folded_half, products[:, 2 * half :]], axis=1)
    return products[:, 0]

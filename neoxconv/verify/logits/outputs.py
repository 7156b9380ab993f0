"""Second moments E[g g^T] of gradients at what matrices put out, no larger than another half of the tokens bears out.

Few directions have most of a gradient, and estimates of the others overfit: codes chosen by E[g g^T] as it was seen
lose on a real model what they gain on the fixture (docs/calibration.md). So the sequences make two halves, A and B.
What both agree on is signal, S = the sum over i != j of A_ij B_ij; what is left of A_ij^2 and B_ij^2 is noise, N for
each half. The mean of both halves has half of it: the diagonal is damped by N / 2S of its mean, and by a little more.
Where there is no signal nothing but the diagonal is left, by which rows are independent of each other.

The first token of each sequence is left out, and no other has more than 16 times the mean |g|^2: of some matrices a few
tokens have most of it (docs/calibration.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from neoxconv.dtypes import Floats

_DAMPING = 0.1  # of the mean diagonal, where there is no noise
_MOST = 16  # times the mean |g|^2 of the tokens that are run together
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Halves:
    """The sums of g g^T [rows, rows] of the even and of the odd sequences, by the name of a matrix."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)  # sequences

    def add(self, name: str, gradients: Tensor) -> None:
        """Add the gradients [sequences, time, rows] of more sequences at what a matrix puts out."""
        rows, first = gradients.shape[-1], self.seen.get(name, 0)
        self.seen[name] = first + len(gradients)
        if name not in self.sums:
            even, odd = (torch.zeros(rows, rows, device=gradients.device) for _ in range(2))
            self.sums[name] = even, odd
        capped = _capped(gradients[:, 1:])
        for half, total in enumerate(self.sums[name]):
            flat = capped[(half + first) % 2 :: 2].flatten(0, 1)
            total.addmm_(flat.T, flat)

    def take(self, name: str) -> Floats:
        """The second moments [rows, rows] of a matrix, of mean diagonal 1 before they are damped; they are not kept."""
        even, odd = self.sums.pop(name)
        damping = _DAMPING + _noise(even, odd)
        total = even.add_(odd)
        diagonal = total.diagonal().clone()
        mean = diagonal.mean().clamp(min=_TINY)
        total /= mean
        if damping == float("inf"):
            total.zero_()
            total.diagonal().copy_(diagonal / mean)
        else:
            total.diagonal().add_(damping)
        return total.cpu().numpy()


def _capped(gradients: Tensor) -> Tensor:
    """Gradients [sequences, time, rows], the longest of them made shorter."""
    squares = gradients.square().sum(-1, keepdim=True)
    most = (_MOST * squares.mean()).clamp(min=_TINY)
    return gradients * (most / squares.clamp(min=most)).sqrt()


def _noise(even: Tensor, odd: Tensor) -> float:
    """Noise over twice the signal off the diagonals of two sums; infinite where there is no signal."""

    def shared(a: Tensor, b: Tensor) -> float:
        return float(torch.dot(a.flatten(), b.flatten()) - torch.dot(a.diagonal(), b.diagonal()))

    signal = shared(even, odd)
    if not signal > 0:
        return float("inf")
    return max(0.0, (shared(even, even) + shared(odd, odd)) / 2 - signal) / (2 * signal)

"""How far apart two models' predictions are, from their logits, a band of the vocabulary at a time.

Nothing of the size [tokens, vocabulary] is kept: sums of exponentials run along with their largest exponent, so that
two heads can be multiplied side by side, once. The figures are defined as llama.cpp's perplexity tool defines them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neoxconv.dtypes import Doubles, Numbers

_TOP = 5


class Softmax:
    """One side's logits over the words seen so far, for each position: all that their softmax needs, in float64.

    `right` [positions] is the next token, -1 for none.
    """

    def __init__(self, right: Tensor) -> None:
        self.right = right
        self.peak = torch.full_like(right, -torch.inf, dtype=torch.float64)
        self.total = torch.zeros_like(self.peak)
        self.chosen = torch.full_like(self.peak, torch.nan)  # the logit of the right word
        self.values = self.peak[:, None].repeat(1, _TOP)  # the largest logits, and their words
        self.words = torch.full_like(self.values, -1, dtype=torch.int64)

    def add(self, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take words from `start` on; returns the factor by which earlier sums shrink, and exp(logits - peak)."""
        best = logits.topk(min(_TOP, logits.shape[1]))
        peak = torch.maximum(self.peak, best.values[:, 0])
        shrink, powers = torch.exp(self.peak - peak), torch.exp(logits - peak[:, None])
        self.total, self.peak = self.total * shrink + powers.sum(1), peak
        column = self.right - start
        inside = (column >= 0) & (column < logits.shape[1])
        self.chosen[inside] = logits[inside, column[inside]]
        top = torch.cat([self.values, best.values], 1).topk(_TOP)
        self.values = top.values
        self.words = torch.cat([self.words, best.indices + start], 1).gather(1, top.indices)
        return shrink, powers

    @property
    def normaliser(self) -> Tensor:
        """log of the sum of exponentials."""
        return self.peak + self.total.log()

    @property
    def log_probability(self) -> Tensor:
        """Of the right word; NaN where there is none."""
        return self.chosen - self.normaliser


class Comparison:
    """Two models' logits at the same positions, the words given in order; `right` is the next token, -1 for none."""

    def __init__(self, right: Numbers, device: str = "cpu") -> None:
        following = torch.from_numpy(right).to(device)
        self.reference, self.candidate = Softmax(following), Softmax(following)
        self.difference = torch.zeros_like(self.reference.peak)  # sum of exp(r) * (r - c)
        self.largest = 0.0

    def add(self, start: int, reference: Tensor, candidate: Tensor) -> None:
        """Take the logits [positions, words] of the words from `start` on."""
        r, c = reference.double(), candidate.to(reference.device).double()
        gap = r - c
        shrink, powers = self.reference.add(start, r)
        self.candidate.add(start, c)
        self.difference = self.difference * shrink + (powers * gap).sum(1)
        self.largest = max(self.largest, float(gap.abs().max()))

    @property
    def divergence(self) -> Doubles:
        """The KL divergence of every position, in nats: of the candidate's predictions from the reference's."""
        mean_gap = self.difference / self.reference.total
        return as_array(mean_gap - self.reference.normaliser + self.candidate.normaliser)


def as_array(values: Tensor) -> Doubles:
    """A tensor as numpy."""
    return np.asarray(values.cpu().numpy())


@dataclass(frozen=True)
class _Perplexity:
    """exp of the mean negative log-probability of the right words, of both; their ratio and its standard error."""

    reference: float
    candidate: float
    ratio: float
    ratio_error: float


@dataclass(frozen=True)
class Figures:
    """What the predictions at all positions come to. KL in nats; shares and probabilities from 0 to 1.

    `mean_error` is the standard error of the mean KL. `unigram` is the perplexity of the right words to somebody who
    knows how often each of them comes up, and nothing else.
    """

    positions: int
    mean: float
    mean_error: float
    median: float
    p99: float
    largest: float
    top1: float
    top5: float
    largest_difference: float
    perplexity: _Perplexity
    rms_probability: float
    unigram: float


def figures(comparison: Comparison) -> Figures:
    """The figures of a comparison whose words have all been given."""
    ours, theirs = comparison.reference, comparison.candidate
    divergence = comparison.divergence
    p, q = as_array(ours.log_probability), as_array(theirs.log_probability)
    known = ~np.isnan(p)
    p, q = p[known], q[known]
    return Figures(
        len(divergence),
        float(divergence.mean()),
        float(divergence.std(ddof=1) / np.sqrt(len(divergence))) if len(divergence) > 1 else math.nan,
        float(np.median(divergence)),
        float(np.percentile(divergence, 99)),
        float(divergence.max()),
        float((ours.words[:, 0] == theirs.words[:, 0]).double().mean()),
        float((ours.words[:, :, None] == theirs.words[:, None, :]).any(2).double().mean()),
        comparison.largest,
        perplexity(p, q),
        float(np.sqrt(np.square(np.exp(p) - np.exp(q)).mean())) if p.size else 0.0,
        _unigram(ours.right.cpu().numpy()[known]),
    )


def _unigram(words: Numbers) -> float:
    """exp of the entropy of the words' own shares."""
    shares = np.unique(words, return_counts=True)[1] / max(1, len(words))
    return float(np.exp(-(shares * np.log(shares)).sum()))


def perplexity(reference: Doubles, candidate: Doubles) -> _Perplexity:
    """From the log-probabilities of the right words; the error is that of a mean of paired differences."""
    if not reference.size:
        return _Perplexity(1.0, 1.0, 1.0, 0.0)
    change = reference - candidate
    ratio = float(np.exp(change.mean()))
    error = float(change.std() / np.sqrt(max(1, change.size - 1)))
    return _Perplexity(float(np.exp(-reference.mean())), float(np.exp(-candidate.mean())), ratio, ratio * error)

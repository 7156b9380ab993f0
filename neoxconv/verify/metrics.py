"""How far apart two models' predictions are, from their logits, a band of the vocabulary at a time.

Nothing of the size [tokens, vocabulary] is kept: sums of exponentials run along with their largest exponent, so that
two heads can be multiplied side by side, once. The figures are defined as llama.cpp's perplexity tool defines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
TOP = 5


class Running:
    """One side's logits over the words seen so far, for each of `count` positions: all a softmax needs."""

    def __init__(self, right: Numbers) -> None:
        count = len(right)
        self.right, self.peak, self.total = right, np.full(count, -np.inf), np.zeros(count)
        self.chosen = np.full(count, np.nan)  # the logit of the right word
        self.top = np.full((count, TOP), -np.inf), np.full((count, TOP), -1)

    def add(self, start: int, logits: Doubles) -> Doubles:
        """Take words from `start` on, logits [count, words]; returns the factor by which earlier sums shrink."""
        peak = np.maximum(self.peak, logits.max(axis=1))
        shrink: Doubles = np.exp(self.peak - peak)
        self.total = self.total * shrink + np.exp(logits - peak[:, None]).sum(axis=1)
        self.peak = peak
        inside = (self.right >= start) & (self.right < start + logits.shape[1])
        self.chosen[inside] = logits[inside, self.right[inside] - start]
        self.keep_top(start, logits)
        return shrink

    def keep_top(self, start: int, logits: Doubles) -> None:
        """The five largest logits so far and their words."""
        size = min(TOP, logits.shape[1])
        words = np.argpartition(-logits, size - 1, axis=1)[:, :size]
        values = np.concatenate([self.top[0], np.take_along_axis(logits, words, axis=1)], axis=1)
        words = np.concatenate([self.top[1], words + start], axis=1)
        order = np.lexsort((words, -values))[:, :TOP]
        self.top = np.take_along_axis(values, order, axis=1), np.take_along_axis(words, order, axis=1)

    @property
    def normaliser(self) -> Doubles:
        """log of the sum of exponentials."""
        return np.asarray(self.peak + np.log(self.total))

    @property
    def log_probability(self) -> Doubles:
        """Of the right word; NaN where there is none."""
        return self.chosen - self.normaliser


class Comparison:
    """Two models' logits at the same positions, the words given in order; `right` is the next token, -1 for none."""

    def __init__(self, right: Numbers) -> None:
        self.reference, self.candidate = Running(right), Running(right)
        self.difference = np.zeros(len(right))  # sum of exp(r) * (r - c)
        self.largest = 0.0

    def add(self, start: int, reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> None:
        """Take the logits [positions, words] of the words from `start` on."""
        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        gap = r - c
        shrink = self.reference.add(start, r)
        self.candidate.add(start, c)
        weights = np.exp(r - self.reference.peak[:, None])
        self.difference = self.difference * shrink + (weights * gap).sum(axis=1)
        self.largest = max(self.largest, float(np.abs(gap).max(initial=0)))

    @property
    def divergence(self) -> Doubles:
        """The KL divergence of every position, in nats: of the candidate's predictions from the reference's."""
        mean_gap = self.difference / self.reference.total
        return np.asarray(mean_gap - self.reference.normaliser + self.candidate.normaliser)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability of the right words, of both; their ratio and its standard error."""

    reference: float
    candidate: float
    ratio: float
    ratio_error: float


@dataclass(frozen=True)
class Figures:
    """What the predictions at all positions come to. KL in nats; shares and probabilities from 0 to 1."""

    positions: int
    mean: float
    median: float
    p99: float
    largest: float
    top1: float
    top5: float
    largest_difference: float
    perplexity: Perplexity
    rms_probability: float


def figures(comparison: Comparison) -> Figures:
    """The figures of a comparison whose words have all been given."""
    ours, theirs = comparison.reference, comparison.candidate
    divergence = comparison.divergence
    known = ~np.isnan(ours.chosen)
    p, q = ours.log_probability[known], theirs.log_probability[known]
    return Figures(
        len(divergence),
        float(divergence.mean()),
        float(np.median(divergence)),
        float(np.percentile(divergence, 99)),
        float(divergence.max()),
        float((ours.top[1][:, 0] == theirs.top[1][:, 0]).mean()),
        float(overlap(ours.top[1], theirs.top[1]).mean()),
        comparison.largest,
        perplexity(p, q),
        float(np.sqrt(np.square(np.exp(p) - np.exp(q)).mean())) if p.size else 0.0,
    )


def overlap(a: Numbers, b: Numbers) -> Doubles:
    """The share of each row of `a` that is in the same row of `b`, in any order."""
    return np.asarray((a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1))


def perplexity(reference: Doubles, candidate: Doubles) -> Perplexity:
    """From the log-probabilities of the right words; the error is that of a mean of paired differences."""
    if not reference.size:
        return Perplexity(1.0, 1.0, 1.0, 0.0)
    change = reference - candidate
    ratio = float(np.exp(change.mean()))
    error = float(change.std() / np.sqrt(max(1, change.size - 1)))
    return Perplexity(float(np.exp(-reference.mean())), float(np.exp(-candidate.mean())), ratio, ratio * error)

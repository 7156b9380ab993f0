"""The figures of a comparison, against their definitions on whole logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neoxconv.verify.logits.compare import first_broken
from neoxconv.verify.logits.metrics import Comparison, figures

RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.standard_normal((200, 97)) * 5
CANDIDATE = REFERENCE + RANDOM.standard_normal((200, 97)) * 0.3
RIGHT = np.where(np.arange(200) % 10 == 9, -1, RANDOM.integers(0, 97, 200))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("band", [97, 1, 3, 40])
@pytest.mark.parametrize("shift", [0.0, 500.0, -700.0])
def test_figures_are_their_definitions(band: int, shift: float) -> None:
    comparison = Comparison(RIGHT)
    for start in range(0, 97, band):
        words = slice(start, start + band)
        comparison.add(start, *(torch.from_numpy(side[:, words] + shift) for side in (REFERENCE, CANDIDATE)))
    found = figures(comparison)
    p, q = softmax(REFERENCE), softmax(CANDIDATE)
    divergence = (p * np.log(p / q)).sum(axis=1)
    assert np.allclose(comparison.divergence, divergence, atol=1e-12)
    assert np.allclose(
        [found.mean, found.median, found.largest], [divergence.mean(), np.median(divergence), divergence.max()]
    )
    assert np.isclose(found.p99, np.percentile(divergence, 99))
    assert found.top1 == (p.argmax(1) == q.argmax(1)).mean()
    five = [len(set(a) & set(b)) / 5 for a, b in zip(np.argsort(-p)[:, :5], np.argsort(-q)[:, :5], strict=True)]
    assert np.isclose(found.top5, np.mean(five))
    assert np.isclose(found.largest_difference, np.abs(REFERENCE - CANDIDATE).max())
    rows = np.flatnonzero(RIGHT >= 0)
    a, b = p[rows, RIGHT[rows]], q[rows, RIGHT[rows]]
    assert np.isclose(found.rms_probability, np.sqrt(np.mean((a - b) ** 2)))
    assert np.isclose(found.perplexity.reference, np.exp(-np.log(a).mean()))
    assert np.isclose(found.perplexity.candidate, np.exp(-np.log(b).mean()))
    assert np.isclose(found.perplexity.ratio, found.perplexity.candidate / found.perplexity.reference)
    change = np.log(a) - np.log(b)
    assert np.isclose(found.perplexity.ratio_error, found.perplexity.ratio * change.std() / np.sqrt(len(rows) - 1))


def test_equal_logits_differ_by_nothing() -> None:
    comparison = Comparison(RIGHT)
    comparison.add(0, torch.from_numpy(REFERENCE), torch.from_numpy(REFERENCE))
    found = figures(comparison)
    assert found.largest == found.largest_difference == found.rms_probability == 0
    assert found.top1 == found.top5 == found.perplexity.ratio == 1


@pytest.mark.parametrize(
    ("errors", "broken"),
    [
        ([], None),
        ([1e-7] * 9, None),
        ([1e-3, 1.1e-3, 1.2e-3, 1.3e-3], None),  # rounding that adds up
        ([1e-3, 1.1e-3, 1.2e-3, 0.5, 0.6], 2),
        ([1e-3, 0.5, 0.5, 0.5, 0.5], 0),
        ([0.5, 0.5, 0.5, 0.5], -1),
        ([0.0, 0.0, 9e-5, 9e-5], None),  # too small to speak of
        ([0.0, 0.0, 2e-4, 2e-4], 1),
        ([0.1, 0.2, float("nan"), 0.3], 1),
    ],
)
def test_the_layer_whose_own_error_stands_out_is_named(errors: list[float], broken: int | None) -> None:
    found = first_broken(np.array(errors))
    assert (None if found is None else found - 1) == broken

"""What codes chosen together cost and bring, beside the GPTQ of its paper in torch, on one thread each.

    python -m benchmarks.feedback [COLUMNS [ROWS]]          default: 6144 512, the 20B model's hidden size

Weights are normal, inputs go together as a model's do (a few directions have most of them). GPTQ has the same moments,
the same damping and Q4_0's grid (steps of 32 columns found on what it asks for, by the largest weight), in blocks of
128 columns as its authors have it; it does no descent. Printed are times over GPTQ's in the same run, and tr(E H E^T)
over that of our encoder with the importance matrix alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from neoxconv.core.encoding import Context, Moments
from neoxconv.dtypes import Array, Floats
from neoxconv.quant import ENCODINGS
from neoxconv.quant.feedback import encode as feedback

NAMES = ("Q6_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
BLOCK, GROUP = 128, 32


def case(columns: int, rows: int) -> tuple[Floats, Moments]:
    """Weights [rows, columns], and the moments of their inputs."""
    rng = np.random.default_rng(3)
    basis = rng.standard_normal((columns, columns // 8), np.float32) / columns**0.5
    inputs = rng.standard_normal((2 * columns, columns // 8), np.float32) @ basis.T
    inputs += 0.3 / columns**0.25 * rng.standard_normal(inputs.shape, np.float32)
    square = inputs.T @ inputs
    weights = 0.05 * rng.standard_normal((rows, columns), np.float32)
    return weights, Moments(columns, "", lambda: square.copy())


def seconds(task: Callable[[], object]) -> tuple[float, object]:
    """The processor's time for a task, and what it gives."""
    start = time.process_time()
    result = task()
    return time.process_time() - start, result


def gptq_factor(moments: Floats) -> torch.Tensor:
    """The upper Cholesky factor of the inverse."""
    square = torch.from_numpy(moments).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq(weights: Floats, factor: torch.Tensor) -> Floats:
    """Weights as 4-bit codes stand for them."""
    left, found = torch.from_numpy(weights.copy()), torch.empty(weights.shape)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        for j in range(start, stop):
            if j % GROUP == 0:
                group = left[:, j : j + GROUP]
                extreme = group.gather(1, group.abs().argmax(1, keepdim=True))[:, 0]
                step = (extreme / -8).half().float()
            found[:, j] = step * (left[:, j] / step).round().clamp(-8, 7)
            errors[:, j - start] = (left[:, j] - found[:, j]) / factor[j, j]
            left[:, j:stop] -= errors[:, j - start, None] * factor[j, j:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return found.numpy()


def loss(moments: Floats, weights: Floats, stored: Floats) -> float:
    """tr(E H E^T)."""
    errors = weights - stored
    return float(np.sum((errors @ moments) * errors, dtype=np.float64))


def main() -> None:
    torch.set_num_threads(1)
    columns, rows = (int(word) for word in (*sys.argv[1:], "6144", "512")[:2])
    weights, moments = case(columns, rows)
    feedback.encode(ENCODINGS["Q4_0"].grid, *_small())  # type: ignore[arg-type]  # compiles
    factoring, factors = seconds(lambda: feedback.factors_of(moments, "it"))
    assert isinstance(factors, feedback.Factors)
    theirs_factoring, factor = seconds(lambda: gptq_factor(factors.moments))
    assert isinstance(factor, torch.Tensor)
    theirs, plain = seconds(lambda: gptq(weights, factor))
    print(f"{columns} columns: factors in {factoring / theirs_factoring:.2f} of GPTQ's time")
    print("type    time / GPTQ's   million weights a CPU second   error / with the matrix alone")
    for name in NAMES:
        row = ENCODINGS[name]
        assert row.grid and row.search
        feedback.encode(row.grid, *_small())
        alone: Array = row.search(weights, Context(factors.importance, True))
        taken, stored = seconds(lambda grid=row.grid: feedback.encode(grid, weights, factors))  # type: ignore[misc]
        before = loss(factors.moments, weights, row.decode(alone))
        after = loss(factors.moments, weights, row.decode(np.asarray(stored)))
        print(f"{name:8}{taken / theirs:13.2f}{weights.size / taken / 1e6:26.2f}{after / before:30.3f}")
    before = loss(factors.moments, weights, ENCODINGS["Q4_0"].decode(ENCODINGS["Q4_0"].encode(weights)))
    ratio = loss(factors.moments, weights, np.asarray(plain)) / before
    print(f"GPTQ    {1:13.2f}{weights.size / theirs / 1e6:26.2f}{ratio:30.3f} (over Q4_0 without a matrix)")


def _small() -> tuple[Floats, feedback.Factors]:
    """A case in which nothing takes time but compiling."""
    weights, moments = case(256, 2)
    return weights, feedback.factors_of(moments, "it")


if __name__ == "__main__":
    main()

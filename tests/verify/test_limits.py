"""Limits by type: those of a small model, and those of a released one, both as they were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neoxconv import open_checkpoint
from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import PLAIN
from neoxconv.verify.logits.limits import _default_divergence
from tests.toy import toy

# Mean KL of SmolLM2-135M-Instruct's files: natively, and in llama.cpp (docs/verification.md).
MEASURED = {"F32": (0, 4.7e-7), "F16": (2.4e-6, 4.8e-6), "BF16": (5.9e-5, 1.6e-4), "Q8_0": (1.4e-3, 4.7e-3),
            "Q6_K": (6.1e-3, 1.1e-2)}  # fmt: skip


def of_size(source: Checkpoint, rows: int, dtype: str) -> Checkpoint:
    """The checkpoint with one more tensor, of a type."""
    from neoxconv.quant import ENCODINGS

    kind = PLAIN.get(dtype) or ENCODINGS[dtype].dtype
    more = LazyTensor((rows, 1024), kind, lambda start, stop: None, kind)  # type: ignore[arg-type, return-value]
    return replace(source, tensors={**source.tensors, "more": more})


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(toy(tmp_path, tp=1, dtype="F32"))


@pytest.mark.parametrize("dtype", MEASURED)
def test_a_released_model_passes_with_room_and_no_more(dtype: str, source: Checkpoint) -> None:
    large, candidate = of_size(source, 60_000, "F32"), of_size(source, 60_000, dtype)
    for engine, measured in zip(("native", "llama.cpp"), MEASURED[dtype], strict=True):
        limit = _default_divergence(large, candidate, engine)
        assert measured < limit <= 10 * measured + 1e-5


@pytest.mark.parametrize("dtype", MEASURED)
def test_a_small_model_has_its_own(dtype: str, source: Checkpoint) -> None:
    small = _default_divergence(of_size(source, 1000, "F32"), of_size(source, 1000, dtype))
    large = _default_divergence(of_size(source, 60_000, "F32"), of_size(source, 60_000, dtype))
    assert small < large == pytest.approx(60 * small)

"""Joins and splits: laws over random ranks, and torch's own concatenation as the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoxconv.arch.gpt_neox.config import PRESETS
from neoxconv.arch.gpt_neox.weights import WEIGHTS
from neoxconv.arch.joins import NORMS, abreast, averaged, by_columns, head_join, join, row_bias, stacked, summed
from neoxconv.core.tensor import LazyTensor, reordered, slabs
from neoxconv.dtypes import BF16, F16, F32, Array, DType, narrow, widen

CONFIG = replace(PRESETS["pythia-14m"], hidden=8, heads=2, ff=32, rows=16)


def lazy(values: Array, dtype: DType = F16) -> LazyTensor:
    stored = narrow(values.astype(np.float32), dtype)
    return LazyTensor(values.shape, dtype, lambda a, b: stored[a:b], dtype)


def whole(tensor: LazyTensor) -> Array:
    return tensor.floats(0, tensor.rows)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(st.integers(0, 12), st.integers(0, 12), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_stacked_rows_are_read_from_any_band(start: int, length: int, heights: list[int]) -> None:
    parts = [lazy(noise(height, 3, seed=i)) for i, height in enumerate(heights)]
    tensor = stacked(parts, CONFIG)
    start = min(start, tensor.rows - 1)
    stop = min(tensor.rows, start + length + 1)
    expected = np.concatenate([whole(part) for part in parts])
    assert np.array_equal(tensor.floats(start, stop), expected[start:stop])


def test_columns_side_by_side() -> None:
    parts = [lazy(noise(6, 4, seed=i)) for i in range(3)]
    assert np.array_equal(abreast(parts, CONFIG).floats(2, 5), np.concatenate([whole(p)[2:5] for p in parts], axis=1))


@given(st.integers(0, 6), st.integers(1, 7), st.integers(1, 4))
def test_columns_apart_are_read_from_any_band(start: int, length: int, ranks: int) -> None:
    values = noise(13, 3 * ranks)
    parts = [part.floats(start, start + length) for part in by_columns(lazy(values), ranks, CONFIG)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole(lazy(values))[start : start + length])


def test_the_head_joins_by_its_shape() -> None:
    by_rows = [lazy(noise(8, 8, seed=i)) for i in range(2)]
    by_columns = [lazy(noise(16, 4, seed=i)) for i in range(2)]
    assert head_join(by_rows, CONFIG).shape == head_join(by_columns, CONFIG).shape == (16, 8)


@pytest.mark.parametrize("parallel", [True, False])
def test_row_biases_are_summed_only_with_a_parallel_residual(parallel: bool) -> None:
    parts = [lazy(noise(8, seed=i)) for i in range(2)]
    joined = whole(row_bias.join(parts, replace(CONFIG, parallel_residual=parallel)))
    total = whole(parts[0]) + whole(parts[1])
    assert np.array_equal(joined, total if parallel else total / 2)


def test_a_mean_is_rounded_once_and_is_the_published_one_at_two_ranks() -> None:
    torch = pytest.importorskip("torch")
    parts = [lazy(1 + noise(4096, seed=i) / 100) for i in range(2)]
    published = sum(torch.from_numpy(part.read(0, 4096).copy()) for part in parts) / 2
    mean = averaged(parts, CONFIG)
    assert mean.dtype is F32 and mean.native is F16
    assert np.array_equal(narrow(whole(mean), F16), published.numpy())


def test_one_rank_is_taken_as_it_is() -> None:
    tensor = lazy(noise(5))
    assert all(join(how, [tensor], CONFIG) is tensor for how in (*NORMS.values(), row_bias))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: weight.unified)
def test_split_then_joined_is_the_identity(weight, ranks: int) -> None:  # type: ignore[no-untyped-def]
    tensor = lazy(noise(*(CONFIG.sizes[size] for size in weight.shape)))
    parts = weight.join.split(tensor, ranks, CONFIG)
    assert len(parts) == ranks
    assert np.array_equal(whole(join(weight.join, parts, CONFIG)), whole(tensor))


def test_sums_add_in_the_order_of_the_ranks() -> None:
    parts = [lazy(np.array([value]), F32) for value in (1e8, 1.0, -1e8)]
    assert whole(summed(parts, CONFIG)) == np.float32(np.float32(1e8) + np.float32(1)) - np.float32(1e8)


@given(st.permutations(range(12)), st.integers(0, 11), st.integers(1, 12))
def test_reordered_rows_are_read_from_any_band(order: list[int], start: int, length: int) -> None:
    tensor, stop = lazy(noise(12, 3)), min(12, start + length)
    assert np.array_equal(
        reordered(tensor, np.array(order)).floats(start, stop), whole(tensor)[np.array(order)[start:stop]]
    )


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 1000))
def test_slabs_cover_every_row_once_within_their_size(rows: int, columns: int, slab: int) -> None:
    borders = list(slabs(lazy(np.zeros((rows, columns))), slab))
    assert [row for start, stop in borders for row in range(start, stop)] == list(range(rows))
    assert all((stop - start) * columns * 4 <= slab or stop - start == 1 for start, stop in borders)


@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    torch = pytest.importorskip("torch")
    rows = np.array(values, np.float32)
    expected = torch.from_numpy(rows).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(widen(narrow(rows, BF16), BF16), expected, equal_nan=True)

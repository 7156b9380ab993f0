"""Codes chosen together: against GPTQ as its paper has it, in numpy; no single change makes the result better."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from neoxconv.core.encoding import Context, Encoding, Moments, Scaled
from neoxconv.dtypes import F16, F32, Doubles, Floats
from neoxconv.errors import CheckpointError
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.quant.feedback import encode as feedback
from neoxconv.quant.feedback.encode import DAMPING, Factors, factors_of
from neoxconv.quant.feedback.kernels import add_product, ahead_of, factor
from neoxconv.quant.feedback.rows import encode_matrix
from neoxconv.quant.feedback.verdict import Stored, not_the_best, taken_apart, too_far
from tests.helpers import few
from tests.machines import printed
from tests.twins import ROWS, nearest, wide

GRIDS = [row for row in ENCODINGS.values() if row.grid]
COLUMNS = 512
scaled = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def moments_of(inputs: Floats) -> Moments:
    square = (inputs.T @ inputs / np.float32(len(inputs))).astype(np.float32)
    return Moments(len(square), "", lambda: square.copy())


@cache
def case() -> tuple[Floats, Moments, Factors]:
    """Weights [96, columns], and moments of inputs that go together as a model's do: a few directions have most."""
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((COLUMNS, COLUMNS)) * np.exp(-np.arange(COLUMNS) / 60)[:, None]
    inputs = rng.standard_normal((4 * COLUMNS, COLUMNS)) @ mixing / 8 + 0.3 * rng.standard_normal((2048, COLUMNS))
    weights = (rng.standard_normal((96, COLUMNS)) * 0.05).astype(np.float32)
    moments = moments_of(inputs.astype(np.float32))
    return weights, moments, factors_of(moments, "a")


def loss(moments: Floats, weights: Floats, stored: Floats) -> Doubles:
    """e H e^T of each row, in float64."""
    errors = (weights - stored).astype(np.float64)
    return np.asarray(((errors @ moments) * errors).sum(1))


@pytest.mark.parametrize(
    "row", few(GRIDS, *map(ENCODINGS.get, ("Q4_0", "Q4_K", "Q3_K", "IQ4_XS"))), ids=lambda row: row.name
)
def test_the_error_of_products_falls_by_half_at_the_same_bytes(row: Encoding) -> None:
    weights, moments, factors = case()
    assert row.grid and row.search
    alone = row.search(weights, Context(factors.importance, True))
    together = feedback.encode(row.grid, weights, factors)
    assert together.shape == alone.shape and together.dtype == alone.dtype
    before, after = (loss(moments.read(), weights, row.decode(rows)) for rows in (alone, together))
    assert after.sum() < 0.6 * before.sum()
    assert (after < before).all()


def gptq(table: Floats, weights: Floats, scale: Floats, moments: Floats) -> Doubles:
    """What GPTQ (arXiv 2210.17323, algorithm 1) makes of weights whose scales [rows, columns] are known, in float64."""
    inverse = np.linalg.inv(moments.astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    left, found = weights.astype(np.float64), np.empty(weights.shape)
    for j in range(weights.shape[1]):
        found[:, j] = scale[:, j] * table[np.abs(left[:, j] / scale[:, j] - table[:, None]).argmin(0)]
        error = (left[:, j] - found[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return found


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL", "Q6_K"])
def test_feedback_is_gptq(name: str) -> None:
    weights, _, factors = case()
    grid = ENCODINGS[name].grid
    assert grid
    codes, numbers = feedback.fed(grid, weights, factors)
    scale, least = feedback.scales(numbers)
    expected = gptq(grid.table, weights, np.repeat(scale, grid.block, 1), factors.moments)
    found = feedback.values_of(grid.table, codes, scale, least)
    same = np.isclose(found, expected, atol=1e-3 * np.abs(scale).max())
    first = np.where(same.all(1), same.shape[1], (~same).argmax(1))  # a tie in float32 changes all that follows
    assert (first == same.shape[1]).mean() > 0.8
    assert np.median(first) == same.shape[1]


@pytest.mark.parametrize("row", GRIDS, ids=lambda row: row.name)
def test_no_single_code_can_be_better_and_planted_faults_are_seen(row: Encoding) -> None:
    weights, _, factors = case()
    grid = row.grid
    assert grid
    stored = feedback.encode(grid, weights, factors)
    assert not not_the_best(taken_apart(grid, stored), weights, factors.moments).any()
    assert not too_far(taken_apart(grid, stored), weights).any()
    exchanged = stored.copy()
    exchanged[[3, 7]] = exchanged[[7, 3]]
    assert not_the_best(taken_apart(grid, exchanged), weights, factors.moments)[[3, 7]].any(1).all()
    assert too_far(taken_apart(grid, exchanged), weights)[[3, 7]].any(1).all()
    codes, scale, least = grid.unpack(stored)
    moved = codes.copy()
    moved[5, 40] += 1 if moved[5, 40] < len(grid.table) - 1 else -1
    values = feedback.values_of(grid.table, codes, scale, least)
    assert np.array_equal(values, row.decode(stored))
    numbers = np.stack([scale, least, np.ones_like(scale), np.ones_like(scale)], -1)
    if grid.group == grid.block:  # the others' integers and steps cannot be told apart from their products
        planted = grid.pack(moved, numbers)
        assert not_the_best(taken_apart(grid, planted), weights, factors.moments)[5, 40]
        doubled = numbers.copy()
        doubled[9, 2, :2] *= 2
        assert not_the_best(taken_apart(grid, grid.pack(codes, doubled)), weights, factors.moments)[9].any()


@pytest.mark.parametrize("row", GRIDS, ids=lambda row: row.name)
def test_bands_of_rows_change_nothing(row: Encoding) -> None:
    weights, _, factors = case()
    assert row.grid
    whole = feedback.encode(row.grid, weights, factors)
    parts = [feedback.encode(row.grid, weights[a:b], factors) for a, b in ((0, 1), (1, 40), (40, 96))]
    assert np.array_equal(whole, np.concatenate(parts))


# --- types with scales beside them ------------------------------------------------------------------------------------


def known(row: Scaled, weights: Floats, factors: Factors) -> tuple[Floats, Floats]:
    """Scale and least of every weight as they are read back."""
    return wide(
        row.groups, row.scales(row.sizes(weights, feedback.matters(factors.moments)), F16).decoded, weights.shape
    )


@scaled
def test_codes_for_scales_that_are_known_are_no_worse_for_any_single_change(row: Scaled) -> None:
    weights, moments, factors = case()
    scale, least = known(row, weights, factors)
    codes = feedback.choose(row.table, weights, (scale, least), factors)
    values = row.table[codes] * scale - least
    plain = row.scales(row.sizes(weights), F16)
    (encoded, low), (decoded, lowest) = (
        wide(row.groups, each, weights.shape) for each in (plain.encoded, plain.decoded)
    )
    alone = nearest(row, (weights + low) / encoded) * decoded - lowest
    assert loss(moments.read(), weights, values).sum() < 0.4 * loss(moments.read(), weights, alone).sum()
    stored = Stored(row.table, codes, values, scale, least, 64, np.zeros_like(scale))
    assert not not_the_best(stored, weights, factors.moments).any() and not too_far(stored, weights).any()
    moved = codes.copy()
    moved[5, 40] += 1 if moved[5, 40] < len(row.table) - 1 else -1
    planted = replace(stored, codes=moved, values=row.table[moved] * scale - least)
    assert not_the_best(planted, weights, factors.moments)[5, 40]


@scaled
def test_codes_are_packed_as_they_are_encoded(row: Scaled) -> None:
    """What codes stand for, with the largest in every group, is encoded as these codes."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, len(row.table), (6, 128)).astype(np.uint8)
    codes[:, ::64] = len(row.table) - 1
    sizes = row.sizes(rng.standard_normal((6, 128)).astype(np.float32))
    scale, least = wide(row.groups, row.scales(sizes, F32).encoded, codes.shape)
    rows = row.table[codes] * scale - least
    assert row.pack(codes).tobytes() == row.encode(rows, sizes, F32).tobytes()
    if row.multiple == 1:
        assert row.pack(codes[:1, :7]).tobytes() == row.encode(rows[:1, :7], sizes[:1], F32).tobytes()


@pytest.mark.parametrize("name", ["NF4", "FP4"])
def test_a_scale_suits_all_weights_of_its_block(name: str) -> None:
    weights, row = case()[0], SCALED[name]
    assert row.suited
    matters = np.exp(np.linspace(-3, 3, COLUMNS)).astype(np.float32)
    blocks, found, largest = weights.reshape(-1, 64), row.suited(weights, matters), row.sizes(weights)
    tried = np.linspace(0.7, 1.1, 17)

    def wrong(sizes: Floats) -> Doubles:
        shares = blocks / sizes[:, None]
        nearest = row.table[np.abs(shares[..., None] - row.table).argmin(-1)]
        squares = np.square((blocks - nearest * sizes[:, None]) / largest[:, None], dtype=np.float64)
        return (squares.reshape(-1, COLUMNS) * matters).reshape(-1, 64).sum(1)

    best = np.min([wrong((largest * share).astype(np.float32)) for share in tried], axis=0)
    assert np.allclose(wrong(found), best, rtol=1e-4)
    assert np.isclose(found[:, None], largest[:, None] * tried, rtol=1e-5).any(1).all()
    odd = np.array([[0.0] * 64, [np.nan] + [1.0] * 63, [np.inf] + [1.0] * 63, [1e-30] * 64], np.float32)
    sizes = row.suited(odd, matters[:64])
    assert sizes[0] == 0 and np.isnan(sizes[1]) and np.isinf(sizes[2]) and 0 < sizes[3] < 2e-30


def test_a_scale_is_not_cut_where_the_largest_weight_is_what_matters() -> None:
    """As in a layer whose inputs are nearly all in one column: found in a real model, where the row was lost."""
    row, rng = SCALED["NF4"], np.random.default_rng(4)
    weights = np.clip(rng.standard_normal((8, 64)), -2, 2).astype(np.float32)
    weights[:, 5] = 3
    matters = np.ones(64, np.float32)
    assert row.suited
    assert (row.suited(weights, matters) < 3).all()
    matters[5] = 300
    assert np.allclose(row.suited(weights, matters), 3)


def test_products_are_numpys_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    for m, k, g in ((1, 1, 1), (3, 7, 5), (4, 8, 16), (5, 19, 33), (2, 0, 4)):
        left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, g)))
        result = np.ones((m, g), np.float32)
        add_product(result, left, right)
        assert np.allclose(result, 1 + left.astype(float) @ right, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 128, 300, 544])
def test_the_factor_is_numpys_and_ahead_is_made_of_it(n: int) -> None:
    inputs = np.random.default_rng(n).standard_normal((2 * n, n))
    square = (inputs.T @ inputs / n).astype(np.float32)
    matrix = square.copy()
    assert factor(matrix) == n
    lower = np.tril(matrix).astype(np.float64)
    assert np.allclose(lower.T @ lower, square, atol=2e-5)
    right = np.linalg.cholesky(square[::-1, ::-1].astype(np.float64))[
        ::-1, ::-1
    ]  # upper, and right @ right.T is square
    ahead_of(matrix)
    assert np.allclose(np.triu(matrix, 1), np.triu(right / np.diag(right), 1), atol=1e-4)
    assert np.array_equal(np.tril(matrix), lower)


def test_a_matrix_that_is_not_positive_has_no_factor() -> None:
    square = np.eye(300, dtype=np.float32)
    square[170, 170] = -1
    assert factor(square) == 300 - 171


def test_inputs_that_do_not_go_together_change_almost_nothing() -> None:
    weights, _, _ = case()
    factors = factors_of(Moments(COLUMNS, "", lambda: np.eye(COLUMNS, dtype=np.float32)), "a")
    row = ENCODINGS["Q4_0"]
    assert row.grid and row.search
    together = feedback.encode(row.grid, weights, factors)
    alone = np.abs(weights - row.decode(row.search(weights, Context(np.ones(COLUMNS, np.float32), True))))
    assert np.abs(weights - row.decode(together)).sum() <= 1.001 * alone.sum()


@pytest.mark.parametrize("rows", [np.zeros((2, COLUMNS)), np.full((2, COLUMNS), 1e-30), np.full((1, COLUMNS), np.nan)])
@pytest.mark.parametrize("row", GRIDS, ids=lambda row: row.name)
def test_rows_without_anything_in_them_are_stored(row: Encoding, rows: Floats) -> None:
    _, _, factors = case()
    assert row.grid
    values = row.decode(feedback.encode(row.grid, rows.astype(np.float32), factors))
    assert np.isfinite(values).all() and np.abs(values).max() <= 1e-6


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_moments_that_are_none_are_refused(value: float) -> None:
    square = np.eye(64, dtype=np.float32) * np.float32(value)
    with pytest.raises(CheckpointError, match=r"blk\.0"):
        factors_of(Moments(64, "", lambda: square), "blk.0")


def test_damping_is_a_part_of_the_mean_diagonal() -> None:
    _, moments, factors = case()
    square = moments.read().astype(np.float64)
    square = square / np.diag(square).mean() + DAMPING * np.eye(COLUMNS)
    assert np.allclose(factors.moments, square, atol=1e-6)
    triangle = np.triu(factors.ahead.astype(np.float64), 1) + np.eye(COLUMNS)
    inverse = np.linalg.inv(triangle)
    diagonal = inverse @ square @ inverse.T
    assert np.allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-4)


def case_of_whole_numbers() -> tuple[Floats, Moments, Factors]:
    """Weights and moments that every processor's numpy makes alike: no product of its own is rounded."""
    numbers = (np.arange(16 * 256) * 2654435761 % 4093 - 2046).reshape(16, 256)
    inputs = (np.arange(640 * 256) * 40503 % 251 - 125).reshape(640, 256)
    inputs[:, 1::2] += inputs[:, ::2]
    square = (inputs.T @ inputs).astype(np.float32)
    moments = Moments(256, "", lambda: square.copy())
    return (numbers / 16384).astype(np.float32), moments, factors_of(moments, "a")


def digest_of_whole_numbers() -> str:
    """The SHA-256 of what both ways of choosing codes together make of that case, with and without least weights."""
    weights, moments, inputs = case_of_whole_numbers()
    outputs = factors_of(Moments(16, "", lambda: moments.read()[:16, :16].copy()), "a")
    digest = hashlib.sha256()
    for name in ("Q4_K", "IQ4_NL"):
        grid = ENCODINGS[name].grid
        assert grid
        digest.update(feedback.encode(grid, weights, inputs).tobytes())
        digest.update(encode_matrix(grid, weights, inputs, outputs).tobytes())
    for row in ROWS:
        digest.update(feedback.choose(row.table, weights, known(row, weights, inputs), inputs).tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_the_bytes_are_the_same_on_a_plain_processor() -> None:
    script = "from tests.quant import test_feedback as t; print(t.digest_of_whole_numbers())"
    assert printed(script) == digest_of_whole_numbers()

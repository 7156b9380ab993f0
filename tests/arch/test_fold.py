"""The exact merge: with the common norm and the folded weights, every rank computes what it computed with its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoxconv.arch.fold import folded, row_sums
from neoxconv.arch.gpt_neox.config import PRESETS
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.joins import by_columns, by_rows
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, F32, Array, narrow
from neoxconv.errors import PlanError

CONFIG = replace(PRESETS["pythia-14m"], layers=1, hidden=96, heads=4, ff=384, rows=64)
FOLLOWERS = {
    "gpt_neox.layers.0.attention.query_key_value": "gpt_neox.layers.0.input_layernorm",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "gpt_neox.layers.0.post_attention_layernorm",
}
Named = list[dict[str, LazyTensor]]


def lazy(values: Array) -> LazyTensor:
    stored = narrow(values.astype(np.float32), F16)
    return LazyTensor(values.shape, F16, lambda a, b: stored[a:b], F16)


def model(ranks: int, head: str = "rows", seed: int = 0) -> Named:
    """Every rank's tensors: norms near each other, with a gain of zero in one place."""
    rng = np.random.default_rng(seed)
    named: Named = [{} for _ in range(ranks)]
    for layer, weight in GPT_NEOX.names(CONFIG):
        shape = tuple(CONFIG.sizes[size] for size in weight.shape)
        values = rng.standard_normal(shape) * 0.1 + (weight.role == "norm" and weight.unified.endswith("weight"))
        if weight.role == "norm":
            values[3] = 0
        split = weight.join.split if weight.role != "head" else {"rows": by_rows, "columns": by_columns}[head]
        for rank, part in enumerate(split(lazy(values), ranks, CONFIG)):
            noise = rng.standard_normal(part.shape) * 0.01 if weight.role == "norm" else 0
            named[rank][weight.unified.replace("{i}", str(layer))] = lazy(whole(part) + noise)
    return named


def whole(tensor: LazyTensor) -> Array:
    return tensor.floats(0, tensor.rows).astype(np.float64)


def normalised(seed: int) -> Array:
    x = np.random.default_rng(seed).standard_normal((5, CONFIG.hidden))
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


def linear(tensors: dict[str, LazyTensor], name: str, norm: str, x: Array) -> Array:
    inside = x * whole(tensors[norm + ".weight"]) + whole(tensors[norm + ".bias"])
    bias = whole(tensors[name + ".bias"]) if name + ".bias" in tensors else 0
    return inside @ whole(tensors[name + ".weight"]).T + bias


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_every_rank_computes_what_it_did(name: str, ranks: int) -> None:
    before, x = model(ranks), normalised(1)
    after = folded(before, GPT_NEOX, CONFIG)
    for rank in range(ranks):
        expected = linear(before[rank], name, FOLLOWERS[name], x)
        assert np.allclose(linear(after[rank], name, FOLLOWERS[name], x), expected, rtol=0, atol=2e-6)
        for part in (".weight", ".bias"):
            assert np.array_equal(whole(after[rank][FOLLOWERS[name] + part]), whole(after[0][FOLLOWERS[name] + part]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_head_has_no_bias_and_is_exact_all_the_same(ranks: int) -> None:
    before, x, norm = model(ranks), normalised(2), "gpt_neox.final_layer_norm"
    after = folded(before, GPT_NEOX, CONFIG)
    for rank in range(ranks):
        expected = linear(before[rank], "embed_out", norm, x)
        assert np.allclose(linear(after[rank], "embed_out", norm, x), expected, rtol=0, atol=1e-5)


def test_a_head_split_by_columns_is_exact_without_a_change() -> None:
    before, x, norm = model(2, head="columns"), normalised(3), "gpt_neox.final_layer_norm"
    after = folded(before, GPT_NEOX, CONFIG)
    half = CONFIG.hidden // 2
    inside = [x * whole(rank[norm + ".weight"]) + whole(rank[norm + ".bias"]) for rank in before]
    heads = [whole(rank["embed_out.weight"]) for rank in before]
    expected = inside[0][:, :half] @ heads[0].T + inside[1][:, half:] @ heads[1].T
    common = x * whole(after[0][norm + ".weight"]) + whole(after[0][norm + ".bias"])
    assert np.allclose(common @ np.concatenate(heads, axis=1).T, expected, rtol=0, atol=1e-9)
    assert all(after[rank]["embed_out.weight"] is before[rank]["embed_out.weight"] for rank in (0, 1))


def test_what_is_written_for_a_norm_is_what_was_folded_with() -> None:
    after = folded(model(2), GPT_NEOX, CONFIG)[0]
    for name in ("gpt_neox.layers.0.input_layernorm.weight", "gpt_neox.final_layer_norm.bias"):
        values = after[name].floats(0, CONFIG.hidden)
        assert np.array_equal(values, values.astype(np.float16).astype(np.float32))


@given(st.integers(0, 288), st.integers(0, 288))
def test_folding_never_sees_slab_borders(start: int, stop: int) -> None:
    after = folded(model(2), GPT_NEOX, CONFIG)[1]
    for name in ("gpt_neox.layers.0.mlp.dense_h_to_4h.bias", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"):
        tensor = after[name]
        start, stop = min(start, tensor.rows - 1), min(stop, tensor.rows)
        if start < stop:
            assert np.array_equal(tensor.floats(start, stop), tensor.floats(0, tensor.rows)[start:stop])


@given(st.integers(1, 70), st.integers(1, 5))
def test_row_sums_add_every_number_once(columns: int, rows: int) -> None:
    values = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
    assert np.array_equal(row_sums(values), values.sum(axis=1))


def test_a_tied_head_cannot_be_folded() -> None:
    tied: ModelConfig = replace(CONFIG, tied=True)
    with pytest.raises(PlanError, match="use --norms mean"):
        folded(model(2), GPT_NEOX, tied)


def test_float32_norms_keep_their_precision() -> None:
    ranks = [{k: replace(t, dtype=F32, native=F32, read=t.floats) for k, t in rank.items()} for rank in model(2)]
    gain = folded(ranks, GPT_NEOX, CONFIG)[0]["gpt_neox.final_layer_norm.weight"].floats(0, CONFIG.hidden)
    assert not np.array_equal(gain, gain.astype(np.float16).astype(np.float32))

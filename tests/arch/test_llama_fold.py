"""The exact merge of RMSNorms: no bias and no lever, the head included; and of biased linears after them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neoxconv.arch.fold import folded
from neoxconv.arch.llama.weights import HEAD, LLAMA, NORM, NORM1, NORM2
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, in_memory
from neoxconv.errors import PlanError
from tests.arch.llama_config import CONFIG

FOLLOWERS = {
    **{f"model.layers.0.self_attn.{name}_proj": NORM1.format(i=0) for name in "qkv"},
    **{f"model.layers.0.mlp.{name}_proj": NORM2.format(i=0) for name in ("gate", "up")},
    HEAD: NORM,
}
Named = list[dict[str, LazyTensor]]


def model(ranks: int, config: ModelConfig) -> Named:
    """Every rank's tensors: norms near each other, with a gain of zero in one place."""
    rng = np.random.default_rng(0)
    named: Named = [{} for _ in range(ranks)]
    for _, weight in LLAMA.names(config):
        values = rng.standard_normal([config.sizes[size] for size in weight.shape]).astype(np.float32)
        values = values * np.float32(0.1) + np.float32(weight.role == "norm")
        for rank, part in enumerate(weight.join.split(in_memory(values), ranks, config)):
            own = part.floats(0, part.rows).copy()
            if weight.role == "norm":
                own += rng.standard_normal(own.shape).astype(np.float32) * np.float32(0.01)
                own[3] = 0
            named[rank][weight.unified] = in_memory(own)
    return named


def whole(tensor: LazyTensor) -> np.ndarray:
    return tensor.floats(0, tensor.rows).astype(np.float64)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_every_rank_computes_what_it_did(name: str, ranks: int, biased: bool) -> None:
    config = replace(CONFIG, attention_bias=biased, mlp_bias=biased, kv_heads=None if ranks == 4 else 2)
    before, norm = model(ranks, config), FOLLOWERS[name] + ".weight"
    after = folded(before, LLAMA, config)
    x = np.random.default_rng(1).standard_normal((5, config.hidden))
    assert not np.array_equal(whole(before[0][norm]), whole(before[1][norm]))
    for rank in range(ranks):
        expected, found = (
            (x * whole(side[rank][norm])) @ whole(side[rank][name + ".weight"]).T for side in (before, after)
        )
        assert np.abs(found - expected).max() < 2e-6
        assert np.array_equal(whole(after[rank][norm]), whole(after[0][norm]))
        if name + ".bias" in before[rank]:
            assert np.array_equal(whole(after[rank][name + ".bias"]), whole(before[rank][name + ".bias"]))


def test_a_tied_head_cannot_be_folded() -> None:
    with pytest.raises(PlanError, match="use --norms mean"):
        folded(model(2, CONFIG), LLAMA, replace(CONFIG, tied=True))

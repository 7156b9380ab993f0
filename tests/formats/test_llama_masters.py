"""`--weights master` where stored tensors hold several weights: each is taken apart after it is put together."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.errors import CheckpointError
from tests.llama_shards import Era, layers_of, llama, write
from tests.oracles import causal_logits, program

_DP = 2
TOKENS = np.random.default_rng(3).integers(0, 280, (2, 40))


def add_masters(folder: Path, model: Any, era: Era) -> None:
    """Put DeepSpeed's ZeRO-1 files beside the weights: a group with weight decay, one without, halves for two ranks."""
    step = folder / "global_step7"
    whole = replace(era, dtype="float32")
    stages = max(1, era.pp)
    for mp in range(era.tp * stages):
        stage, rank = divmod(mp, era.tp)
        prefix = "" if era.pp else "sequential."
        layers = list(layers_of(model, whole, rank))
        share = -(-len(layers) // stages)
        held = {
            f"{prefix}{number}.{name}": values
            for number, layer in layers[stage * share : (stage + 1) * share]
            for name, values in layer.items()
        }
        groups = [{n: v for n, v in held.items() if (v.ndim == 1) is spared} for spared in (False, True)]
        shapes = [OrderedDict((name, values.shape) for name, values in group.items()) for group in groups]
        path = step / f"mp_rank_{mp:02d}_model_states.pt"
        torch.save(torch.load(path, weights_only=False) | {"param_shapes": shapes}, path)
        parts = [halved(torch.cat([values.reshape(-1) for values in group.values()])) for group in groups]
        for dp in range(_DP):
            state = {
                "single_partition_of_fp32_groups": [halves[dp].clone() for halves, _ in parts],
                "partition_count": [_DP, _DP],
                "group_paddings": [padding if dp == _DP - 1 else 0 for _, padding in parts],
            }
            torch.save(
                {"optimizer_state_dict": state}, step / f"bf16_zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"
            )


def halved(flat: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Numbers in equal parts of an even length, and how many were added for it."""
    padding = -len(flat) % (2 * _DP)
    return torch.nn.functional.pad(flat, (0, padding)).chunk(_DP), padding


@pytest.mark.parametrize(("era", "groups"), [
    (Era(inside=True, pp=2, dtype="bfloat16"), 2),
    (Era(inside=True, tp=4), 4),
    (Era("w", "per-head", pp=0), 2),
    (Era("te", "te", te_norms=True, pp=2), 2),
], ids=str)  # fmt: skip
def test_masters_are_the_model_that_was_trained(era: Era, groups: int, tmp_path: Path) -> None:
    program("transformers")
    te = era.names == "te"
    model = llama(groups, dtype="float32", rms_norm_eps=1e-8, attention_bias=te, mlp_bias=te)
    folder = write(tmp_path / "run", model, era)
    add_masters(folder, model, era)
    asked: dict[str, Any] = {"qkv_layout": "blocks"} if era.names == "linear" and groups < 4 else {}
    source = open_checkpoint(folder, weights="master", **asked)
    for name, values in model.state_dict().items():
        assert np.array_equal(source.tensors[name].floats(0, len(values)), values.numpy()), name
    made = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    with torch.inference_mode():
        assert np.array_equal(causal_logits(made, TOKENS, "float32"), model(torch.from_numpy(TOKENS)).logits.numpy())
    slim = run(make_plan(source, Recipe("slim", tp=1)), tmp_path / "slim")
    assert verify_weights(source, open_checkpoint(slim, **asked)).passed
    wrong = next((folder / "global_step7").glob("*zero_pp_rank_0*"))
    state = torch.load(wrong, weights_only=False)
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] *= 1.01
    torch.save(state, wrong)
    with pytest.raises(CheckpointError, match="not their masters rounded"):
        open_checkpoint(folder, weights="master", **asked)

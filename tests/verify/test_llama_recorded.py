"""Llamas that gpt-neox's own code trained and saved: what we read gives the logits that it then had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import BF16, narrow
from neoxconv.errors import CheckpointError
from tests.fixtures import fixture, real
from tests.oracles import Logits, Tokens, transformers_logits
from tests.streamed import logits_of

TODAY, BEFORE = "llama_2026_bf16_tp2_pp2", "llama_2024_bf16_tp2_pp2"
# What each one's files leave open; the names w1, w2 and w3 of the older one tell its date.
TOLD: dict[str, dict[str, Any]] = {TODAY: {"qkv_layout": "blocks", "rmsnorm": "inside"}, BEFORE: {}}


def opened(name: str, **settings: Any) -> Checkpoint:
    return open_checkpoint(real(name) / "checkpoints", **{**TOLD[name], **settings})


def recorded(name: str, file: str) -> tuple[Tokens, Logits]:
    folder = real(name) / "reference"
    logits = np.load(folder / f"{file}.npy")
    return np.load(folder / "tokens.npy")[: len(logits)], logits


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize(("file", "merged"), [("logits_fp32_replicas_as_is", False), ("logits_fp32", True)])
def test_logits_are_those_that_gpt_neox_had(name: str, file: str, merged: bool) -> None:
    tokens, expected = recorded(name, file)
    assert np.abs(logits_of(opened(name), tokens, merged) - expected).max() <= 1e-5 * expected.std()


# transformers has no x / (rms + eps): with an epsilon of 1e-12 instead of 1e-5 outside the logits are near, not equal.
@pytest.mark.parametrize(("name", "limit"), [(TODAY, 1e-5), (BEFORE, 2e-3)])
def test_transformers_computes_what_gpt_neox_did(name: str, limit: float, tmp_path: Path) -> None:
    tokens, expected = recorded(name, "logits_fp32")
    folder = run(make_plan(opened(name), Recipe("hf", dtype="F32")), tmp_path / "hf")
    assert np.abs(transformers_logits(folder, tokens) - expected).max() <= limit * expected.std()


def test_folded_norms_are_those_of_every_rank() -> None:
    """Exact where no row-parallel bias makes the ranks' streams differ, as in the older one."""
    tokens, expected = recorded(BEFORE, "logits_fp32_replicas_as_is")
    folded = logits_of(opened(BEFORE, norms="fold"), tokens, merged=True)
    assert np.abs(folded - expected).max() <= 1e-5 * expected.std()
    averaged = logits_of(opened(BEFORE), tokens, merged=True)
    assert np.abs(averaged - expected).max() > 1e-2 * expected.std()


@pytest.mark.parametrize("wrong", [{"qkv_layout": "per-head"}, {"rmsnorm": "outside"}])
def test_another_reading_gives_other_logits(wrong: dict[str, str]) -> None:
    tokens, expected = recorded(TODAY, "logits_fp32_replicas_as_is")
    assert np.abs(logits_of(opened(TODAY, **wrong), tokens) - expected).max() > 1e-4 * expected.std()


def test_what_the_files_leave_open_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"--(qkv-layout|rmsnorm)"):
        open_checkpoint(real(TODAY) / "checkpoints")


def test_masters_round_to_what_is_stored() -> None:
    fixture(f"{TODAY}/checkpoints", "*/*optim_states.pt")
    stored, masters = opened(TODAY), opened(TODAY, weights="master")
    matrices = {name: tensor for name, tensor in stored.tensors.items() if len(tensor.shape) == 2}  # of vectors: means
    for name, tensor in matrices.items():
        exact = masters.tensors[name].read(0, tensor.rows)
        assert np.array_equal(narrow(exact, BF16), tensor.read(0, tensor.rows)), name
    assert len(matrices) == 2 + 7 * stored.config.layers

"""The reference forward pass gives the logits that were recorded inside the training code, and never merges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.verify.logits import stream
from tests.fixtures import fixture, real
from tests.oracles import transformers_logits
from tests.streamed import logits_of
from tests.toy import toy

RECORDED = (
    #  fixture                     logits                                   ranks joined
    ("neox_2022_tp2_pp4",          "logits_fp32_replicas_as_is",            False),
    ("neox_2022_sequential_tp2",   "logits_fp32_replicas_as_is",            False),
    ("neox_2026_bf16_tp2_pp2",     "logits_fp32_replicas_as_is",            False),
    ("trained_tp2_pp4",            "logits_fp32_replicas_as_is_first2x64",  False),
    ("neox_2022_tp2_pp4",          "logits_fp32",                           True),
    ("neox_2022_sequential_tp2",   "logits_fp32",                           True),
    ("neox_2026_bf16_tp2_pp2",     "logits_fp32",                           True),
)  # fmt: skip


@pytest.mark.parametrize(("name", "file", "merged"), RECORDED, ids=lambda value: str(value))
def test_logits_are_those_recorded_in_training(name: str, file: str, merged: bool) -> None:
    folder = real(name)
    expected = np.load(folder / "reference" / f"{file}.npy")
    tokens = np.load(folder / "reference" / "tokens.npy")[: expected.shape[0], : expected.shape[1]]
    found = logits_of(open_checkpoint(folder / "checkpoints"), tokens, merged)
    assert np.abs(found - expected).max() <= 1e-5 * expected.std()


def test_the_perplexity_of_the_trained_model_is_the_one_recorded() -> None:
    folder = real("trained_tp2_pp4")
    tokens = np.load(folder / "reference" / "tokens.npy")[:4]
    logits = torch.from_numpy(logits_of(open_checkpoint(folder / "checkpoints"), tokens)).double()
    found = logits.log_softmax(-1)[:, :-1].gather(-1, torch.from_numpy(tokens[:, 1:, None]))[..., 0]
    assert np.abs(found.numpy() - np.load(folder / "reference" / "logprob_of_next.npy")[:4]).max() < 1e-4


def test_the_reference_does_not_join_ranks() -> None:
    checkpoint = open_checkpoint(fixture("neox_2022_tp2_pp4/checkpoints"))
    tokens = np.arange(12, dtype=np.int64).reshape(2, 6)
    unjoined = replace(checkpoint, tensors=dict.fromkeys(checkpoint.tensors))  # joined tensors that nobody can read
    assert np.array_equal(logits_of(unjoined, tokens), logits_of(checkpoint, tokens))


def test_logits_are_the_same_for_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SLAB", 4 * 64 * 5)  # bytes: a few rows, so that all threads have work
    checkpoint, found = open_checkpoint(toy(tmp_path)), []
    tokens = np.arange(48, dtype=np.int64).reshape(2, 24)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(logits_of(checkpoint, tokens))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_multiplying_leaves_the_threads_of_torch_to_others(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    logits_of(open_checkpoint(toy(tmp_path)), np.arange(8, dtype=np.int64)[None])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("changes", [{}, {"head_by_columns": True}, {"tp": 4}, {"tanh_gelu": False, "rotary_pct": 1.0}])
def test_a_synthetic_model_is_what_transformers_computes(changes: dict[str, object], tmp_path: Path) -> None:
    source = toy(tmp_path, norm_noise=0.0, **changes)
    checkpoint = open_checkpoint(source)
    tokens = np.arange(48, dtype=np.int64).reshape(2, 24) * 7 % 512
    folder = run(make_plan(checkpoint, Recipe("hf", dtype="F32")), tmp_path / "hf")
    expected = transformers_logits(folder, tokens)
    assert np.abs(logits_of(checkpoint, tokens) - expected).max() < 1e-5
    assert np.abs(logits_of(open_checkpoint(folder), tokens) - expected).max() < 1e-5


def test_groups_of_sequences_and_slabs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(toy(tmp_path, parallel_residual=False))
    tokens = np.arange(60, dtype=np.int64).reshape(5, 12)
    whole = logits_of(checkpoint, tokens)
    monkeypatch.setattr(stream, "INSIDE", 1)
    monkeypatch.setattr(stream, "SLAB", 5000)
    assert np.abs(logits_of(checkpoint, tokens) - whole).max() < 1e-5

"""Verification of Llama and Mistral: what each format can say of them is compared, and what it cannot is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.cli.main import main
from tests.little_llamas import little_llama
from tests.oracles import llama_logits, program, transformers_logits


def made(source: Path, target: Path, recipe: Recipe, **opening: Any) -> Path:
    return run(make_plan(open_checkpoint(source, **opening), recipe), target)


def set_in_config(folder: Path, **settings: Any) -> None:
    """Change settings of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def set_in_gguf(path: Path, key: str, value: float) -> None:
    """Change a number in place."""
    gguf = program("gguf")
    field = gguf.GGUFReader(path, "r+").fields[key]
    field.parts[field.data[0]][0] = value


PLANTED: dict[str, tuple[Recipe, Callable[[Path], None], str]] = {
    "epsilon": (Recipe("hf"), lambda p: set_in_config(p, rms_norm_eps=1e-4), "norm_eps is 0.0001"),
    "base": (
        Recipe("hf"),
        lambda p: set_in_config(p, rope_theta=5e4, rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
        "rotary_base is 50000.0",
    ),
    "window": (Recipe("hf"), lambda p: set_in_config(p, sliding_window=16), "window is 16"),
    "epsilon of gguf": (
        Recipe("gguf"),
        lambda p: set_in_gguf(p, "llama.attention.layer_norm_rms_epsilon", 1e-4),
        "norm_eps is 0.0001",
    ),
    "base of gguf": (Recipe("gguf"), lambda p: set_in_gguf(p, "llama.rope.freq_base", 5e4), "rotary_base is 50000.0"),
    "keys of gguf": (Recipe("gguf"), lambda p: set_in_gguf(p, "llama.attention.head_count_kv", 4), "v_proj"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_another_setting_is_found(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, plant, expected = PLANTED[fault]
    source = little_llama(tmp_path / "source", mistral=True, sliding_window=32)
    target = made(source, tmp_path / "target", recipe)
    for manifest in tmp_path.rglob("*manifest.json"):
        manifest.unlink()  # it would tell by a digest
    assert main(["verify", str(source), str(target)]) == 0
    plant(target)
    capsys.readouterr()
    assert main(["verify", str(source), str(target)]) in (1, 3)  # 1: it cannot even be opened
    assert expected in "".join(capsys.readouterr())


@pytest.mark.oracle
def test_logits_are_compared_as_far_as_a_window_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistral's window is 16 tokens, itself included; llama.cpp's `llama` has none."""
    source = little_llama(tmp_path / "source", mistral=True, sliding_window=16)
    target = tmp_path / "x.gguf"
    plan = make_plan(open_checkpoint(source), Recipe("gguf", type="F16"))
    assert [note for note in plan.notes if "window" in note] == [
        "llama.cpp has no window for such a model: it computes the same up to 16 tokens only"
    ]
    run(plan, target)
    tokens = np.random.default_rng(0).integers(0, 512, (1, 64))
    difference = np.abs(llama_logits(target, tokens) - transformers_logits(source, tokens)).max(-1)[0]
    assert difference[:16].max() < 0.02 < difference[16:].max()  # the note is true
    words = ["verify", str(source), str(target), "--level", "logits"]
    assert main(words) == 0
    assert "2 x 16 tokens" in capsys.readouterr().out
    np.save(tmp_path / "ids.npy", tokens)
    assert main([*words, "--tokens", str(tmp_path / "ids.npy")]) == 1
    assert "equal up to 16 tokens only" in capsys.readouterr().err


def test_a_norm_that_no_other_program_has_is_told_and_verified(tmp_path: Path) -> None:
    """gpt-neox added RMSNorm's epsilon outside of the root until 2025-05."""
    source = little_llama(tmp_path / "source", rms_norm_eps=1e-3)
    shards = made(source, tmp_path / "shards", Recipe("slim", tp=2))
    old = open_checkpoint(shards, rmsnorm="outside", qkv_layout="blocks")
    for name, recipe in (("hf", Recipe("hf")), ("x.gguf", Recipe("gguf", tokenizer=source))):
        plan = make_plan(old, recipe)
        assert any("x / (rms + 0.001)" in note and "get 1e-12" in note for note in plan.notes)
        target = open_checkpoint(run(plan, tmp_path / name))
        assert target.config.norm_eps == 1e-12 and verify_weights(old, target).passed
    new = open_checkpoint(shards, rmsnorm="inside", qkv_layout="blocks")
    assert any("norm_eps is 1e-12" in finding.what for finding in verify_weights(new, target).findings)

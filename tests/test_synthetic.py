"""The generator makes what gpt-neox writes, of any size, and the full-size 20B set has the published sizes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.cli.main import main
from neoxconv.synthetic import Synthetic, write_checkpoint
from neoxconv.targets.training import RANDOM_STATES
from tests.oracles import transformers_logits

MODEL = Synthetic()
LARGE = Synthetic(layers=44, hidden=6144, heads=64, rows=50432, tp=2, pp=4, context=2048)
PUBLISHED_SLIM, PUBLISHED_FULL = 41_112_854_242, 308_033_580_802
KINDS = {
    "legacy": MODEL,
    "new names": replace(MODEL, generation=1),
    "TransformerEngine": replace(MODEL, generation=2),
    "sequential": replace(MODEL, sequential=True),
    "bf16": replace(MODEL, dtype="BF16"),
    "f32": replace(MODEL, dtype="F32"),
    "serial": replace(MODEL, parallel_residual=False, tanh_gelu=False),
    "head by columns": replace(MODEL, head_by_columns=True),
    "TP 1": replace(MODEL, tp=1),
    "TP 4, PP 2": replace(MODEL, tp=4, pp=2),
    "odd width": replace(MODEL, hidden=56, rotary_pct=1.0),
}

SPELLINGS = (  # the table of names by generation in gpt-neox's own converter, apart from the first norm
    "attention.query_key_value.weight attention.query_key_value.bias attention.dense.weight attention.dense.bias "
    "post_attention_layernorm.weight post_attention_layernorm.bias mlp.dense_h_to_4h.weight mlp.dense_h_to_4h.bias "
    "mlp.dense_4h_to_h.weight mlp.dense_4h_to_h.bias",
    "attention.query_key_value.weight attention.query_key_value.bias attention.dense.weight attention.dense.bias "
    "post_attention_layernorm.weight post_attention_layernorm.bias mlp.linear1.weight mlp.linear1.bias "
    "mlp.linear2.weight mlp.linear2.bias",
    "attention.qkv.weight attention.qkv.bias attention.proj.weight attention.proj.bias "
    "mlp.layer_norm_weight mlp.layer_norm_bias mlp.fc1_weight mlp.fc1_bias mlp.fc2_weight mlp.fc2_bias",
)


def pt_digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.pt")}


def test_layer_files_hold_what_the_2022_software_wrote(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "x", MODEL)
    state = torch.load(step / "layer_02-model_01-model_states.pt", weights_only=True)
    assert type(state) is dict and list(state)[3:6] == [
        "attention.query_key_value.bias",
        "attention.rotary_emb.inv_freq",
        "attention.dense.weight",
    ]
    assert state["attention.dense.weight"].shape == (64, 32)
    assert state["mlp.dense_h_to_4h.weight"].shape == (128, 64)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    states = torch.load(step / "mp_rank_00_model_states.pt", weights_only=True)
    assert states["args"]["model_parallel_size"] == 2 and set(RANDOM_STATES) < set(states)


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_every_generation_spells_its_weights_as_gpt_neox_did(generation: int, tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "x", replace(MODEL, generation=generation))
    state = torch.load(step / "layer_02-model_00-model_states.pt", weights_only=True)
    kept = {"input_layernorm.weight", "input_layernorm.bias"} | (
        {"attention.rotary_emb.inv_freq"} if generation == 0 else set()
    )
    assert set(state) == kept | set(SPELLINGS[generation].split())


def test_optimizer_files_share_out_their_bytes_and_are_never_opened(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "x", replace(MODEL, pp=2), optimizer_bytes=1001)
    files = sorted(step.glob("*optim_states.pt"))
    assert len(files) == 48 and sum(path.stat().st_size for path in files) == 1001
    assert set(open_checkpoint(step).index.set_aside) == {path.name for path in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", MODEL)
    write_checkpoint(tmp_path / "b", MODEL)
    write_checkpoint(tmp_path / "c", replace(MODEL, seed=1))
    assert pt_digests(tmp_path / "a") == pt_digests(tmp_path / "b") != pt_digests(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_converts_to_every_target(kind: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", KINDS[kind])
    checkpoint = open_checkpoint(source)
    assert checkpoint.config == KINDS[kind].config
    recipes = (Recipe("hf"), Recipe("safetensors"), Recipe("slim", tp=1), Recipe("gguf"), Recipe("gguf", type="Q4_0"))
    for number, recipe in enumerate(recipes + ((Recipe("slim"),) if kind != "f32" else ())):
        target = run(make_plan(checkpoint, recipe), tmp_path / str(number))
        findings = verify_weights(checkpoint, open_checkpoint(target)).findings
        assert not findings, (recipe, findings[:3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["legacy", "serial", "head by columns", "TP 4, PP 2"])
def test_exact_merge_gives_the_logits_of_the_averaged_one_but_for_the_ranks_noise(kind: str, tmp_path: Path) -> None:
    source, tokens, logits = write_checkpoint(tmp_path / "source", KINDS[kind]), np.arange(64).reshape(2, 32), {}
    for norms in ("mean", "fold", "rank0"):
        plan = make_plan(open_checkpoint(source, norms=norms), Recipe("hf", dtype="F32"))
        logits[norms] = transformers_logits(run(plan, tmp_path / norms), tokens)
    assert np.isfinite(logits["mean"]).all() and logits["mean"].std() > 0.01
    for norms in ("fold", "rank0"):
        assert 0 < np.abs(logits[norms] - logits["mean"]).max() < 0.1 * logits["mean"].std()


def test_a_full_size_20b_set_opens_in_seconds_with_the_published_sizes(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    step = write_checkpoint(tmp_path / "20B", LARGE, sparse=True)
    files = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert abs(files - PUBLISHED_SLIM) < 1e-4 * PUBLISHED_SLIM
    for number in range(96):
        with open(step / f"zero_pp_rank_{number % 12}_mp_rank_{number // 12:02d}_optim_states.pt", "wb") as file:
            file.truncate((PUBLISHED_FULL - files) // 96)
    checkpoint = open_checkpoint(tmp_path / "20B")
    assert checkpoint.parameters == 20_554_567_680 and len(checkpoint.index.set_aside) == 96
    assert main(["convert", str(tmp_path / "20B"), str(tmp_path / "slim"), "--to", "slim", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert abs(plan["bytes_total"] - PUBLISHED_SLIM) < 1e-4 * PUBLISHED_SLIM
    assert plan["bytes_total"] == sum(file["bytes"] for file in plan["files"])
    assert main(["inspect", str(tmp_path / "20B"), "--json"]) == 0
    kinds = {kind["kind"]: kind for kind in json.loads(capsys.readouterr().out)["files"]}
    assert kinds["optimizer states"]["count"] == 96
    assert abs(sum(kind["bytes"] for kind in kinds.values()) - PUBLISHED_FULL) < 1e-4 * PUBLISHED_FULL


def test_without_a_yaml_a_released_model_is_recognised_and_said_so(tmp_path: Path) -> None:
    step = write_checkpoint(
        tmp_path / "x", replace(LARGE, layers=6, hidden=512, heads=8, rows=50304, tp=1), sparse=True
    )
    (step / "configs" / "model.yml").unlink()
    checkpoint = open_checkpoint(tmp_path / "x")
    assert checkpoint.config.heads == 8 and "pythia-70m" in checkpoint.notes[0]


LLAMA_70B = Synthetic(llama=True, layers=80, hidden=8192, heads=64, kv_heads=8, ff=28672, rows=32000, tp=8, pp=4)


@pytest.mark.slow
def test_a_llama_of_70b_opens_in_seconds_and_its_parameters_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "70B", LLAMA_70B, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "70B")
    assert checkpoint.architecture.name == "llama" and checkpoint.parameters == 68_976_648_192
    assert checkpoint.config == LLAMA_70B.config


def test_a_small_llama_is_the_same_at_every_degree_and_loads_in_transformers(tmp_path: Path) -> None:
    small = replace(MODEL, llama=True, kv_heads=2, ff=96, norm_noise=0.0)
    made = {tp: write_checkpoint(tmp_path / f"{tp}", replace(small, tp=tp, sequential=tp == 2)) for tp in (1, 2)}
    sources = {tp: open_checkpoint(folder) for tp, folder in made.items()}
    assert verify_weights(sources[1], sources[2]).passed
    tokens = np.arange(64).reshape(2, 32)
    logits = transformers_logits(run(make_plan(sources[2], Recipe("hf")), tmp_path / "hf"), tokens)
    assert np.isfinite(logits).all() and logits.std() > 0.01

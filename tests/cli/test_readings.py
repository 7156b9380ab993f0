"""What gpt-neox's files leave open: asked for, told by the loss on a text, remembered by manifests and plans."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine.cluster import origin_of
from neoxconv.errors import CheckpointError, PlanError, UntoldError
from neoxconv.sources.checkpoint import reopen
from neoxconv.synthetic import tiny
from neoxconv.verify.logits.alone import loss_of, off_stored
from neoxconv.verify.logits.tokens import encode
from tests.helpers import cli
from tests.llama_shards import Era, llama, write
from tests.oracles import program
from tests.toy import toy

TEXT = "the cat and the rat sat on the mat, and then the hat and the bat sat on the cat in the rain. " * 12


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    program("transformers")


@cache
def trained() -> Any:
    """A model that has learnt TEXT."""
    model = llama(2, seed=1, dtype="float32", initializer_range=0.02).train()
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(torch.ones_like(values) if "norm" in name else torch.randn_like(values) * 0.05)
    ids = torch.from_numpy(encode(tiny(), TEXT))
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1
    return model.eval()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("layout", ["blocks", "per-head"])
def test_trying_shows_which_order_is_a_language_model(
    layout: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", trained(), Era(qkv=layout, dtype="float32", inside=True))
    assert cli("inspect", folder) == 1
    assert "--qkv-layout blocks or per-head" in capsys.readouterr().err
    assert cli("inspect", folder, "--try", text, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    best, other = facts["readings"]
    assert best["options"] == f"--qkv-layout {layout}"
    assert best["loss"] < 1 < best["loss"] + 1 < other["loss"]
    assert cli("inspect", folder, "--try", text) == 0
    assert f"--qkv-layout {layout}: predicts the text best." in capsys.readouterr().out


def test_the_loss_is_that_of_transformers(text: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", trained(), Era(dtype="float32", inside=True))
    ids = torch.from_numpy(encode(tiny(), TEXT))[:60].reshape(2, 30)
    source = open_checkpoint(folder, qkv_layout="blocks")
    with torch.inference_mode():
        expected = trained()(ids, labels=ids).loss.item()
    assert loss_of(source, ids.numpy()) == pytest.approx(expected, abs=1e-5)


def test_both_questions_may_be_open(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", trained(), Era(dtype="float32"))
    assert cli("inspect", folder, "--try", text, "--json") == 0
    readings = json.loads(capsys.readouterr().out)["readings"]
    assert {one["options"] for one in readings} == {
        f"--qkv-layout {layout} --rmsnorm {form}" for layout in ("blocks", "per-head") for form in ("inside", "outside")
    }
    assert "--qkv-layout blocks" in readings[0]["options"]


def test_a_model_that_has_learnt_nothing_is_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", llama(4), Era(inside=True))
    assert cli("inspect", folder, "--try", text) == 0
    out = capsys.readouterr().out
    assert "as the files tell" in out
    assert "None is a language model of this text" in out


def test_logits_that_gpt_neox_stored_are_compared(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", trained(), Era(dtype="float32", pp=2, inside=True))
    with torch.inference_mode():
        logits = trained()(torch.arange(20)[None]).logits[0]
    for rank, part in enumerate(logits.chunk(2, dim=-1)):
        path = folder / f"global_step7/mp_rank_{2 + rank:02d}_model_states.pt"  # the last stage's
        state = torch.load(path, weights_only=False)
        torch.save(state | {"checkpoint_validation_logits": part.clone()}, path)
    assert cli("inspect", folder, "--try", text, "--json") == 0
    best, other = json.loads(capsys.readouterr().out)["readings"]
    assert best["options"] == "--qkv-layout blocks"
    assert best["off"] < 1e-4 < 1 < other["off"]
    assert (
        off_stored(open_checkpoint(write(tmp_path / "bare", trained(), Era(inside=True)), qkv_layout="blocks")) is None
    )


def outside(model: Any) -> Any:
    """The model with RMSNorm as gpt-neox had it until 2025-05-09."""

    def forward(norm: Any, x: Any) -> Any:
        return norm.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + norm.variance_epsilon))

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = forward.__get__(module)
    return model


@pytest.mark.parametrize("era", [Era("w", "per-head"), Era()], ids=["told by names", "by an option"])
def test_an_epsilon_outside_of_the_root_is_computed_so(era: Era, tmp_path: Path) -> None:
    model = outside(llama(2, rms_norm_eps=0.02))
    asked = {} if era.names == "w" else {"rmsnorm": "outside", "qkv_layout": "blocks"}
    source = open_checkpoint(write(tmp_path / "run", model, era), **asked)
    ids = np.arange(60).reshape(2, 30)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.item()
    assert loss_of(source, ids) == pytest.approx(expected, abs=1e-5)
    assert any("x / (rms + 0.02)" in note for note in source.notes)
    if asked:
        inside = open_checkpoint(tmp_path / "run", rmsnorm="inside", qkv_layout="blocks")
        assert abs(loss_of(inside, ids) - expected) > 1e-4


@pytest.mark.parametrize(("settings", "asked_for"), [
    ({}, ("qkv_layout", "rmsnorm")),
    ({"moe_expert_interval": 1}, ()),
    ({"te_mha": False}, ("rmsnorm",)),
    ({"detect_nvlink_pairs": False}, ("qkv_layout",)),
    ({"norm": "rmsnorm", "rmsnorm_fusion": True}, ("qkv_layout",)),
    ({"rms_norm_epsilon": 1e-8}, ("qkv_layout",)),
    ({"num_kv_heads": 4}, ("rmsnorm",)),
], ids=str)  # fmt: skip
def test_keys_of_the_yaml_date_the_code(settings: dict[str, Any], asked_for: tuple[str, ...], tmp_path: Path) -> None:
    folder = write(tmp_path / "run", llama(settings.get("num_kv_heads", 2)), Era(), **settings)
    answers = {"qkv_layout": "blocks", "rmsnorm": "inside"}
    given: dict[str, Any] = {}
    asked = []
    while True:
        try:
            source = open_checkpoint(folder, **given)
            break
        except UntoldError as error:
            asked.append(error.option)
            given[error.option] = answers[error.option]
    assert sorted(asked) == sorted(asked_for)
    assert (source.config.norm, source.unusual.get("qkv_layout", "blocks")) == (
        "rmsnorm_outside" if "detect_nvlink_pairs" in settings else "rmsnorm", "blocks"
    )  # fmt: skip


def test_manifests_plans_and_workers_know_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, options = write(tmp_path / "run", llama(2), Era()), ("--qkv-layout", "blocks", "--rmsnorm", "inside")
    assert cli("convert", folder, tmp_path / "hf", "--to", "hf", *options) == 0
    assert " ".join(options) in capsys.readouterr().out
    manifest = json.loads((tmp_path / "hf/manifest.json").read_text())
    assert (manifest["qkv_layout"], manifest["rmsnorm"]) == ("blocks", "inside")
    assert cli("verify", folder, tmp_path / "hf", "--level", "logits") == 0
    assert cli("verify", folder, tmp_path / "hf", "--qkv-layout", "per-head") == 3
    plans = [
        make_plan(open_checkpoint(folder, qkv_layout=layout, rmsnorm="inside"), Recipe("hf"))
        for layout in ("blocks", "per-head")
    ]
    assert plans[0].fingerprint != plans[1].fingerprint
    opening = origin_of(plans[1]).opening
    assert make_plan(reopen(opening), Recipe("hf")).fingerprint == plans[1].fingerprint


@pytest.mark.parametrize(("options", "told"), [
    ({"qkv_layout": "rows"}, "--qkv-layout rows: expected blocks or per-head"),
    ({"qkv_layout": "blocks", "rmsnorm": "beside"}, "--rmsnorm beside: expected outside or inside"),
], ids=str)  # fmt: skip
def test_other_words_are_refused(options: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=told):
        open_checkpoint(write(tmp_path / "run", llama(2, rms_norm_eps=1e-8), Era()), **options)


@pytest.mark.parametrize("options", [{"qkv_layout": "blocks"}, {"rmsnorm": "inside"}], ids=str)
def test_where_there_is_no_choice_the_options_say_so(options: dict[str, str], tmp_path: Path) -> None:
    folder = write(tmp_path / "run", llama(4, rms_norm_eps=1e-8), Era())
    hf = run(make_plan(open_checkpoint(folder), Recipe("hf")), tmp_path / "hf")
    for source in (hf, toy(tmp_path)):
        with pytest.raises(PlanError, match="leave it out"):
            open_checkpoint(source, **options)


@pytest.mark.parametrize(("settings", "told"), [
    ({"use_bias_in_mlp": True}, r"use_bias_in_mlp is True, but the layer files have no mlp.linear1.bias"),
    ({"use_bias_in_mlp": None}, r"use_bias_in_mlp is True, which gpt-neox takes where its YAML does not say"),
    ({"use_bias_in_attn_linear": True}, r"have no attention.query_key_value.bias"),
    ({"num_kv_heads": 1}, r"layer_02-model_00.*query_key_value.weight is \[32, 32\], but the configuration \(4 heads"),
    ({"num_kv_heads": 3}, r"num_kv_heads is '3'; expected a number that divides the 4 heads"),
    ({"gpt_j_residual": True, "use_bias_in_mlp": False}, r"leaves out what attention gives"),
    ({"attention_config": [[["mamba"], 3]]}, r"attention_config: mamba is not supported"),
    ({"attention_config": [[["rwkv"], 3]]}, r"attention_config: rwkv is not supported"),
    ({"moe_num_experts": 8}, r"moe_num_experts: 8 is not supported"),
    ({"activation": "geglu"}, r"activation: geglu is not supported, only swiglu"),
], ids=str)  # fmt: skip
def test_what_the_yaml_and_the_files_contradict_is_named(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", llama(2), Era(inside=True), **settings)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(folder, qkv_layout="blocks")


def test_settings_that_gpt_neox_reads_nowhere_refuse_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", llama(4), Era(inside=True), use_bias_in_norms=False)
    open_checkpoint(folder)
    path = next((toy(tmp_path) / "global_step10/configs").iterdir())
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"use_bias_in_norms": False}))
    open_checkpoint(tmp_path / "toy")


def test_the_epsilon_of_transformer_engines_mlp_is_its_own(tmp_path: Path) -> None:
    model = llama(2, attention_bias=True, mlp_bias=True)
    folder = write(tmp_path / "run", model, Era("te", "te", te_norms=True))
    with pytest.raises(
        CheckpointError, match=r"mlp\.layer_norm_weight belongs to TransformerEngine's MLP, whose epsilon"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(("settings", "dropped", "told"), [
    ({"attention_bias": False}, (), "attention_bias is false, but the files hold q_proj.bias"),
    ({}, ("o_proj.bias",), "o_proj.bias is missing"),
])  # fmt: skip
def test_biases_that_only_some_have_are_named(
    settings: dict[str, Any], dropped: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    llama(2, attention_bias=True).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(dropped or "none")}, path, {"format": "pt"})
    config = tmp_path / "hf/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path / "hf")

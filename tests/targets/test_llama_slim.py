"""Slim checkpoints of Llama: at any degree what gpt-neox's ranks would have, and a YAML with which it trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch.llama.config import TINY
from neoxconv.arch.llama.training import to_neox
from neoxconv.errors import CheckpointError, PlanError
from tests.arch.llama_config import CONFIG
from tests.fixtures import real
from tests.llama_shards import Era, files, llama, write
from tests.oracles import program

ERAS = {
    "per-head": Era("w", "per-head"),
    "blocks": Era(),
    "linear1 with heads": Era(qkv="per-head"),
    "TransformerEngine": Era("te", "te", te_norms=True),
}


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    program("transformers")


def stored_in(made: Path) -> dict[str, Any]:
    """The weights of a slim checkpoint by file, and by name in it."""
    (step,) = made.glob("global_step*")
    loaded = {path.name: torch.load(path, weights_only=False) for path in step.glob("*.pt")}
    return {name: value.get("module", value) for name, value in loaded.items() if value.get("module", value)}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two checkpoints have the same tensors in the same files, bit for bit."""
    wanted = {name: value.get("module", value) for name, value in expected.items()}
    wanted = {name: value for name, value in wanted.items() if value}
    return found.keys() == wanted.keys() and all(
        value.keys() == wanted[name].keys() and all(torch.equal(value[key], wanted[name][key]) for key in value)
        for name, value in found.items()
    )


@pytest.mark.parametrize(("before", "after"), [((1, 1), (4, 1)), ((4, 1), (2, 0)), ((2, 0), (1, 2)), ((2, 1), (2, 1))])
@pytest.mark.parametrize("name", ERAS)
def test_another_degree_is_what_its_ranks_would_have_saved(
    name: str, before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    te = name == "TransformerEngine"
    model = llama(4 if 4 in before + after else 2, rms_norm_eps=1e-8, attention_bias=te, mlp_bias=te)
    era = replace(ERAS[name], tp=before[0], pp=before[1])
    asked = {"qkv_layout": era.qkv} if era.names == "linear" else {}
    source = open_checkpoint(write(tmp_path / "run", model, era), **asked)
    made = run(make_plan(source, Recipe("slim", tp=after[0], pp=after[1])), tmp_path / "slim")
    assert same(stored_in(made), files(model, replace(era, tp=after[0], pp=after[1])))
    again = open_checkpoint(made)  # without being told again
    assert verify_weights(source, again).passed
    assert again.config == source.config


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("settings", [
    {}, {"kv_heads": 2}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True},
    {"window": 9}, {"intermediate_size": 45},
], ids=lambda settings: " ".join(settings) or "plain")  # fmt: skip
def test_from_hugging_face_in_the_names_of_today(settings: dict[str, Any], tp: int, tmp_path: Path) -> None:
    model = llama(**{"kv_heads": 4, **settings})
    model.half().save_pretrained(tmp_path / "hf")
    source, recipe = open_checkpoint(tmp_path / "hf"), Recipe("slim", tp=tp)
    if model.config.num_key_value_heads % tp or model.config.intermediate_size % tp:
        with pytest.raises(PlanError, match="does not divide"):
            make_plan(source, recipe)
        return
    made = run(make_plan(source, recipe), tmp_path / "slim")
    assert same(stored_in(made), files(model, Era(tp=tp)))
    again = open_checkpoint(made)
    assert (again.config, again.architecture) == (source.config, source.architecture)
    assert verify_weights(source, again).passed


@pytest.mark.parametrize("width", [*range(1, 200), 1376, 5504, 11008, 14336, 28672, 13825])
def test_the_yaml_gives_the_very_widths(width: int) -> None:
    """gpt-neox's ParallelMLP: its numbers of rows of linear1 and of columns of linear2."""
    words = to_neox(replace(CONFIG, ff=width))
    multiple = words["mlp_multiple_of"]
    rows = int(words["intermediate_size"] * 2 / 3)
    columns = rows // 2
    rows = int((2 * multiple) * ((rows + (2 * multiple) - 1) // (2 * multiple)))
    columns = int(multiple * ((columns + multiple - 1) // multiple))
    assert (rows, columns) == (2 * width, width)


def test_degrees_divide_the_heads_of_keys(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "run", llama(2, rms_norm_eps=1e-8), Era()), qkv_layout="blocks")
    with pytest.raises(PlanError, match="--tp 4: does not divide 2 heads of keys and values"):
        make_plan(source, Recipe("slim", tp=4))


def test_what_was_said_is_written_down(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", llama(2), Era())
    with pytest.raises(CheckpointError, match="--rmsnorm"):
        open_checkpoint(folder)
    source = open_checkpoint(folder, qkv_layout="per-head", rmsnorm="outside")
    made = run(make_plan(source, Recipe("slim", tp=1)), tmp_path / "slim")
    states = torch.load(made / "global_step7/mp_rank_00_model_states.pt", weights_only=False)
    assert states["neoxconv"] == {"qkv_layout": "per-head", "rmsnorm": "outside"}
    again = open_checkpoint(made)
    assert again.config.norm == "rmsnorm_outside"
    assert verify_weights(source, again).passed
    once_more = run(make_plan(again, Recipe("slim", tp=2)), tmp_path / "again")
    assert open_checkpoint(once_more).unusual == {"qkv_layout": "per-head"}


def test_a_yaml_made_here_tells_the_date_of_its_code(tmp_path: Path) -> None:
    llama(2).half().save_pretrained(tmp_path / "hf")
    made = run(make_plan(open_checkpoint(tmp_path / "hf"), Recipe("slim")), tmp_path / "slim")
    path = made / "global_step0/configs/model.yml"
    settings = yaml.safe_load(path.read_text())
    del settings["moe_expert_interval"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match="--rmsnorm"):
        open_checkpoint(made)


def test_today_s_names_turn_older_layer_files_into_today_s(tmp_path: Path) -> None:
    """w1, w2, w3, heads' rows and the older RMSNorm become linear1, blocks and an epsilon that vanishes."""
    source = open_checkpoint(real("llama_2024_bf16_tp2_pp2") / "checkpoints")
    made = run(make_plan(source, Recipe("slim", tp=2, pp=1, current_names=True)), tmp_path / "slim")
    layer = stored_in(made)["layer_02-model_00-model_states.pt"]
    assert {name for name in layer if name.startswith("mlp.")} == {"mlp.linear1.weight", "mlp.linear2.weight"}
    told = yaml.safe_load((made / "global_step0" / "configs" / "model.yml").read_text())
    assert told["rms_norm_epsilon"] == TINY and told["activation"] == "swiglu"
    again = open_checkpoint(made, qkv_layout="blocks")
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2:
            assert (again.tensors[name].read(0, tensor.rows) == tensor.read(0, tensor.rows)).all(), name

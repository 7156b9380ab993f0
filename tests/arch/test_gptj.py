"""GPT-J: transformers' numbers from its folders, and the same function as GPT-NeoX in GGUF and in gpt-neox's shards."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.gptj.weights import GPT_J
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.targets.stand_in import written_as
from neoxconv.verify.logits.compare import compare_predictions
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.level import verify_logits
from neoxconv.verify.logits.trial import Trial
from neoxconv.verify.report import Report
from neoxconv.verify.subject import Subject
from tests.helpers import cli
from tests.oracles import llama_logits, program, transformers_logits
from tests.relatives import (
    CLOSE,
    LLAMA_CPP,
    logits_of,
    native_logits,
    random_model,
    same_first_choices,
    saved,
    some_tokens,
)  # fmt: skip

ROWS = 320
TOKENS = some_tokens(ROWS)
SIZES = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": ROWS}
CASES: dict[str, dict[str, Any]] = {
    "as released": {},
    "two numbers rotated": {"rotary_dim": 2},
    "six numbers rotated": {"rotary_dim": 6},
    "a head rotated whole": {"rotary_dim": 16},
    "one head": {"n_head": 1, "rotary_dim": 64},
    "another width": {"n_inner": 96},
    "erf": {"activation_function": "gelu"},
    "another epsilon": {"layer_norm_epsilon": 1e-3},
    "tied": {"tie_word_embeddings": True},
}


def gptj(**changes: Any) -> Any:
    """A GPTJForCausalLM of random numbers, its head's bias as large as the logits."""
    model = random_model(program("transformers").GPTJConfig(**SIZES | {"bos_token_id": 0, "eos_token_id": 0} | changes))
    model.lm_head.bias.data *= 10
    return model


def converted(source: Path, target: Path, format: str, **recipe: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe(format, **recipe)), target)


def stored(model: Any, folder: Path, dtype: str, file: str) -> Path:
    """Its folder in a type, as safetensors or as a .bin file with the buffers that older versions saved."""
    torch = program("torch")
    for tensor in model.parameters():  # not the buffers, in which transformers keeps sines
        tensor.data = tensor.data.to(getattr(torch, dtype)).float()
    saved(deepcopy(model).to(getattr(torch, dtype)), folder)
    if file == "bin":
        (folder / "model.safetensors").unlink()
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
        state |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
        state |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9)}
        torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("dtype", "file"), [("float32", "safetensors"), ("float16", "bin"), ("bfloat16", "safetensors")]
)
@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_what_transformers_computes(case: str, dtype: str, file: str, tmp_path: Path) -> None:
    model = gptj(**CASES[case])
    source = stored(model, tmp_path / "source", dtype, file)
    expected = logits_of(model, TOKENS)  # of the rounded weights
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.name == "gptj" and len(checkpoint.dropped) == (2 if file == "bin" else 0) + (
        case == "tied" and file == "bin"
    )
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE * expected.std()
    folder = converted(source, tmp_path / "hf", "hf")
    assert np.abs(transformers_logits(folder, TOKENS) - expected).max() < CLOSE * expected.std()
    assert verify_weights(checkpoint, open_checkpoint(folder)).passed


@pytest.mark.parametrize("case", [case for case in CASES if case != "erf"])  # llama.cpp computes the tanh GELU
def test_llama_cpp_computes_the_same_of_its_gguf(case: str, tmp_path: Path) -> None:
    model = gptj(**CASES[case])
    source = saved(model, tmp_path / "source")
    expected = logits_of(model, TOKENS)
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F16")
    found = llama_logits(file, TOKENS)
    assert np.abs(found - expected).max() < LLAMA_CPP * expected.std()
    same_first_choices(found, expected)
    again = open_checkpoint(file)
    assert again.architecture is GPT_NEOX and again.index.settings["general.name"].startswith("GPT-J ")
    assert verify_weights(open_checkpoint(source), again).passed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("another width", "one head")])
def test_shards_for_gpt_neox_compute_the_same(case: str, ranks: int, tmp_path: Path) -> None:
    model = gptj(**CASES[case])
    source = saved(model, tmp_path / "source")
    target = converted(source, tmp_path / "slim", "slim", dtype="BF16", tp=ranks)
    again = open_checkpoint(target)
    assert again.architecture is GPT_NEOX and len(again.ranks) == ranks
    assert verify_weights(open_checkpoint(source), again).passed
    shown = converted(source, tmp_path / "f32.gguf", "gguf", type="F32")  # the same tensors, not rounded
    expected = logits_of(model, TOKENS)
    assert np.abs(native_logits(open_checkpoint(shown), TOKENS) - expected).max() < CLOSE * expected.std() * (
        20000 if case == "erf" else 2  # GGUF does not say which GELU
    )
    rounded = native_logits(again, TOKENS)
    assert np.sqrt(np.mean((rounded - expected) ** 2)) < 0.05 * expected.std()


def test_transformers_computes_the_same_of_gpt_neox(tmp_path: Path) -> None:
    """GPT-J through gpt-neox's shards into transformers' GPT-NeoX class."""
    model = gptj()
    source = stored(model, tmp_path / "source", "float16", "safetensors")
    expected = logits_of(model, TOKENS)
    slim = converted(source, tmp_path / "slim", "slim", tp=2)
    folder = converted(slim, tmp_path / "hf", "hf")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt_neox"
    found = transformers_logits(folder, TOKENS)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.005 * expected.std()


@pytest.mark.parametrize("changed", [{"rotary_dim": 3}, {"rotary_dim": 18}, {"rotary_dim": None}])
def test_what_transformers_cannot_run_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    source = saved(gptj(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: rotary_dim is .*; expected"):
        open_checkpoint(source)


def test_a_setting_of_two_names_says_one_thing(tmp_path: Path) -> None:
    source = saved(gptj(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2 * config["n_head"]}))
    with pytest.raises(CheckpointError, match=r"config.json: n_head is \d+ but num_attention_heads, another name"):
        open_checkpoint(source)


@pytest.mark.parametrize("family", ["gptj", "gpt_neo"])
def test_gguf_of_a_family_that_it_lacks_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """The name `gptj` stands in llama.cpp's list, with no model behind it."""
    writer = program("gguf").GGUFWriter(tmp_path / "x.gguf", family)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=f"is a {family} model; expected gpt_neox or gptneox"):
        open_checkpoint(tmp_path / "x.gguf")


def test_another_activation_is_refused_by_name(tmp_path: Path) -> None:
    source = saved(gptj(activation_function="relu"), tmp_path / "source")
    with pytest.raises(CheckpointError, match="activation_function is 'relu'; expected gelu or"):
        open_checkpoint(source)


def test_another_family_that_it_is_not_is_refused(tmp_path: Path) -> None:
    source = saved(gptj(), tmp_path / "source")
    with pytest.raises(PlanError, match=r"--as gpt2: .*source is a gptj model; --as gpt_neox is the same"):
        make_plan(open_checkpoint(source), Recipe("gguf", as_family="gpt2"))
    assert cli("convert", source, tmp_path / "x", "--to", "hf", "--as", "gpt_neox") == 2


def test_a_changed_bias_of_the_head_is_found(tmp_path: Path) -> None:
    """verify compares with what the source would be written as, head's bias included."""
    model = gptj()
    source = saved(model, tmp_path / "source")
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F16")
    model.lm_head.bias.data[7] += 1.0
    report = verify_weights(open_checkpoint(saved(model, tmp_path / "other")), open_checkpoint(file))
    assert not report.passed and "embed_out.weight" in str(report.findings[0])


def test_its_predictions_are_compared_as_it_is(tmp_path: Path) -> None:
    source = open_checkpoint(saved(gptj(), tmp_path / "source"))
    target = run(make_plan(source, Recipe("gguf", type="F32")), tmp_path / "x.gguf")
    found = compare_predictions(source, open_checkpoint(target), TOKENS)
    assert found.figures.mean < 1e-9 and len(found.layers) == 4


def test_weights_of_several_types_are_stacked(tmp_path: Path) -> None:
    """Queries in one type, keys and values in another."""
    source = saved(gptj(), tmp_path / "source")
    halved = {
        name: tensor.half() if "k_proj" in name or "v_proj" in name else tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(halved, source / "model.safetensors", {"format": "pt"})
    expected = transformers_logits(source, TOKENS)
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F32")
    assert np.abs(native_logits(open_checkpoint(file), TOKENS) - expected).max() < CLOSE * expected.std()


def test_what_breaks_is_named(tmp_path: Path) -> None:
    """Found by exchanging tensors of the target for those that the source would be written as."""
    model = gptj()
    source = open_checkpoint(saved(model, tmp_path / "source"))
    model.transformer.h[1].mlp.fc_out.weight.data *= -1
    target = run(
        make_plan(open_checkpoint(saved(model, tmp_path / "broken")), Recipe("gguf", type="F32")), tmp_path / "x"
    )
    (report,) = verify_logits([Subject(source, open_checkpoint(target), target)], Trial(bisect=True))
    assert isinstance(report, Report)
    assert "gpt_neox.layers.1.mlp.dense_4h_to_h.weight" in str(report.findings[-1])


@pytest.mark.parametrize("left_out", [(), ("model_type",), ("bos_token_id", "eos_token_id")])
def test_a_configuration_may_leave_things_out(left_out: tuple[str, ...], tmp_path: Path) -> None:
    source = saved(gptj(resid_pdrop=0.25), tmp_path / "source")
    for name in ("tokenizer.json", "generation_config.json"):
        (source / name).unlink(missing_ok=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    assert open_checkpoint(source).architecture is GPT_J
    target = converted(source, tmp_path / "hf", "hf")
    written = json.loads((target / "config.json").read_text())
    assert written["model_type"] == "gptj" and ("bos_token_id" in written) == ("bos_token_id" not in left_out)
    assert written["resid_pdrop"] == (0.0 if left_out == ("model_type",) else 0.25)


def test_an_importance_matrix_is_that_of_the_tensors_in_gguf(tmp_path: Path) -> None:
    source = open_checkpoint(saved(gptj(), tmp_path / "source"))
    target = run(make_plan(source, Recipe("gguf", type="F32")), tmp_path / "x.gguf")
    ours, theirs = calibrate(written_as(source, "gguf")[0], TOKENS), calibrate(open_checkpoint(target), TOKENS)
    assert set(ours) == set(theirs) and "blk.0.attn_qkv.weight" in ours
    assert all(np.allclose(ours[name], theirs[name], rtol=1e-4) for name in ours)


@pytest.mark.parametrize(
    ("format", "type"), [("bnb", "NF4"), ("bnb", "INT8"), ("float8", "E4M3"), ("safetensors", None)]
)
def test_other_targets(format: str, type: str | None, tmp_path: Path) -> None:
    source = saved(gptj(), tmp_path / "source")
    target = converted(source, tmp_path / format, format, type=type)
    again = open_checkpoint(target)
    assert again.architecture.name == "gptj"
    assert verify_weights(open_checkpoint(source), again).passed
    if format == "bnb":
        expected = native_logits(again, TOKENS)
        found = transformers_logits(target, TOKENS)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()
    tokenizer = source / "tokenizer.json"
    file = converted(
        target, tmp_path / "again.gguf", "gguf", type="F16", tokenizer=tokenizer
    )  # from quantized queries, keys, values
    assert verify_weights(again, open_checkpoint(file)).passed


def test_a_released_model_is_told_by_its_sizes() -> None:
    from neoxconv.arch import ARCHITECTURES

    presets = {name: config for each in ARCHITECTURES for name, config in each.presets.items()}
    config: ModelConfig = presets["gpt-j-6B"]
    assert config.rotary_dims == 64 and config.head_size == 256
    theirs = program("transformers").GPTJConfig()
    assert (config.layers, config.hidden, config.heads) == (theirs.n_layer, theirs.n_embd, theirs.n_head)
    assert (config.rows, config.context, config.norm_eps) == (theirs.vocab_size, theirs.n_positions, 1e-5)
    assert replace(config, tied=True) != config

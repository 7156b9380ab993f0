"""GPT-Neo: transformers' numbers from its folders, beyond its windows too; within them llama.cpp's, as GPT-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch.gpt2.weights import GPT2
from neoxconv.arch.gpt_neo.weights import GPT_NEO
from neoxconv.errors import CheckpointError, PlanError
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

ROWS, WINDOW, CONTEXT = 320, 16, 64
TOKENS = some_tokens(ROWS)
SHORT = TOKENS[:, :WINDOW]
SIZES = {
    "num_layers": 4, "hidden_size": 64, "num_heads": 4, "max_position_embeddings": CONTEXT, "vocab_size": ROWS,
    "attention_types": [[["global", "local"], 2]], "window_size": WINDOW,
}  # fmt: skip
GLOBAL: dict[str, Any] = {"attention_types": [[["global"], 4]]}
CASES: dict[str, dict[str, Any]] = {
    "as released": {},
    "all local": {"attention_types": [[["local"], 4]]},
    "all global": GLOBAL,
    "in another order": {"attention_types": [[["local", "global"], 1], [["global"], 2]]},
    "odd number of layers": {"num_layers": 3, "attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "a head's root is no whole number": {"num_heads": 8},
    "another width": {"intermediate_size": 96},
    "erf": {"activation_function": "gelu"},
    "another epsilon": {"layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False},
}


def gpt_neo(**changes: Any) -> Any:
    """A GPTNeoForCausalLM of random numbers."""
    sizes = SIZES | {"bos_token_id": 0, "eos_token_id": 0} | changes
    return random_model(program("transformers").GPTNeoConfig(**sizes))


def converted(source: Path, target: Path, format: str, **recipe: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe(format, **recipe)), target)


def stored(model: Any, folder: Path, dtype: str, file: str) -> Path:
    """Its folder in a type, as safetensors or as a .bin file with what older versions saved."""
    torch = program("torch")
    for tensor in model.parameters():
        tensor.data = tensor.data.to(getattr(torch, dtype)).float()
    saved(model.to(getattr(torch, dtype)), folder)
    if file == "bin":
        (folder / "model.safetensors").unlink()
        state = dict(model.state_dict())
        state |= {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool)}
        state |= {"transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)}
        torch.save(state, folder / "pytorch_model.bin")
    model.float()
    return folder


@pytest.mark.parametrize(
    ("dtype", "file"),
    [("float16", "bin"), *(pytest.param(t, "safetensors", marks=pytest.mark.slow) for t in ("float32", "bfloat16"))],
)
@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_what_transformers_computes(case: str, dtype: str, file: str, tmp_path: Path) -> None:
    model = gpt_neo(**CASES[case])
    source = stored(model, tmp_path / "source", dtype, file)
    expected = logits_of(model, TOKENS)
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture is GPT_NEO
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE * expected.std()
    folder = converted(source, tmp_path / "hf", "hf")
    assert np.abs(transformers_logits(folder, TOKENS) - expected).max() < CLOSE * expected.std()
    again = open_checkpoint(folder)
    assert again.config == checkpoint.config and verify_weights(checkpoint, again).passed


def test_the_windows_matter(tmp_path: Path) -> None:
    """Else the tests above would not see them."""
    model, without = gpt_neo(), gpt_neo(**GLOBAL)
    difference = np.abs(logits_of(model, TOKENS) - logits_of(without, TOKENS)).max(axis=(0, 2))
    assert difference[:WINDOW].max() < 1e-4 < 0.01 < difference[WINDOW]


def test_windows_of_256_tokens_as_released(tmp_path: Path) -> None:
    model = gpt_neo(window_size=256, max_position_embeddings=512)
    tokens = some_tokens(ROWS, 400)
    source = saved(model, tmp_path / "source")
    expected = logits_of(model, tokens)
    assert np.abs(native_logits(open_checkpoint(source), tokens) - expected).max() < CLOSE * expected.std()
    with pytest.raises(PlanError, match="GGUF has no gpt_neo; --as gpt2 is the same for at most 256 tokens"):
        make_plan(open_checkpoint(source), Recipe("gguf"))


@pytest.mark.parametrize("case", [case for case in CASES if case != "erf"])  # llama.cpp computes the tanh GELU
def test_as_gpt2_llama_cpp_computes_the_same_within_a_window(case: str, tmp_path: Path) -> None:
    model = gpt_neo(**CASES[case])
    source = saved(model, tmp_path / "source")
    tokens = TOKENS if case == "all global" else SHORT
    expected = logits_of(model, tokens)
    plan = make_plan(open_checkpoint(source), Recipe("gguf", type="F16", as_family="gpt2"))
    assert any("written as gpt2, which" in note for note in plan.notes)
    file = run(plan, tmp_path / "x.gguf")
    found = llama_logits(file, tokens)
    assert np.abs(found - expected).max() < LLAMA_CPP * expected.std()
    same_first_choices(found, expected)
    again = open_checkpoint(file)
    assert again.architecture is GPT2 and again.config.context == (CONTEXT if case == "all global" else WINDOW)
    assert verify_weights(open_checkpoint(source), again).passed
    exact = open_checkpoint(converted(source, tmp_path / "f32.gguf", "gguf", type="F32", as_family="gpt2"))
    assert np.abs(native_logits(exact, tokens) - expected).max() < CLOSE * expected.std()


def test_gguf_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    source = open_checkpoint(saved(gpt_neo(), tmp_path / "source"))
    with pytest.raises(PlanError, match=r"source: GGUF has no gpt_neo; --as gpt2 is the same for at most 16 tokens\.$"):
        make_plan(source, Recipe("gguf"))
    with pytest.raises(PlanError, match="gpt-neox has no gpt_neo; and no family that computes the same"):
        make_plan(source, Recipe("slim"))
    with pytest.raises(PlanError, match=r"--as gpt_neox: .*source is a gpt_neo model; --as gpt2 is the same for"):
        make_plan(source, Recipe("gguf", as_family="gpt_neox"))
    everywhere = open_checkpoint(saved(gpt_neo(**GLOBAL), tmp_path / "global"))
    assert make_plan(everywhere, Recipe("gguf")).notes  # the same function for all tokens, so nothing need be asked


def test_the_command_line_writes_and_verifies_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = saved(gpt_neo(), tmp_path / "source"), tmp_path / "x.gguf"
    assert cli("convert", source, target, "--to", "gguf") == 1
    assert "--as gpt2 is the same for at most 16 tokens" in capsys.readouterr().err
    assert cli("convert", source, target, "--to", "gguf", "--as", "gpt2", "--type", "F32") == 0
    assert "written as gpt2, which is the same for at most 16 tokens" in capsys.readouterr().err
    assert cli("verify", source, target, "--level", "logits") == 0, capsys.readouterr().out
    assert " x 16 tokens of " in capsys.readouterr().out
    program("llama_cpp")
    assert cli("verify", source, target, "--level", "logits", "--engine", "llama.cpp", "--max-kl", 1e-5) == 0
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, TOKENS)
    assert cli("verify", source, target, "--level", "logits", "--tokens", tokens) == 1
    assert "a context of 16" in capsys.readouterr().err


def test_a_matrix_of_importances_is_that_of_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, matrix = saved(gpt_neo(), tmp_path / "source"), tmp_path / "x.imatrix.gguf"
    assert cli("calibrate", source, "-o", matrix) == 1
    assert "GGUF has no gpt_neo; --as gpt2" in capsys.readouterr().err
    assert cli("calibrate", source, "-o", matrix, "--as", "gpt2", "--length", "16", "--sequences", "4") == 0
    recipe = {"type": "Q4_0", "as_family": "gpt2", "imatrix": matrix}
    assert converted(source, tmp_path / "x.gguf", "gguf", **recipe).exists()


@pytest.mark.parametrize(
    ("format", "type"), [("bnb", "NF4"), ("bnb", "INT8"), ("float8", "E4M3"), ("safetensors", None)]
)
def test_other_targets(format: str, type: str | None, tmp_path: Path) -> None:
    source = saved(gpt_neo(), tmp_path / "source")
    target = converted(source, tmp_path / format, format, type=type)
    again = open_checkpoint(target)
    assert again.architecture is GPT_NEO
    assert verify_weights(open_checkpoint(source), again).passed
    if format == "bnb":
        expected, found = native_logits(again, TOKENS), transformers_logits(target, TOKENS)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()
    recipe = {"type": "F16", "tokenizer": source / "tokenizer.json", "as_family": "gpt2"}
    file = converted(target, tmp_path / "again.gguf", "gguf", **recipe)  # from quantized queries, keys, values
    assert verify_weights(again, open_checkpoint(file)).passed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_types": [[["global", "local"], 3]]}, "attention_types is .* for 4 layers"),
        ({"attention_types": [[["global", "sparse"], 2]]}, "attention_types is .* kinds of global and local"),
        ({"attention_types": "global"}, "attention_types is 'global'; expected"),
        ({"attention_types": [[["global"], 1 << 40]]}, "attention_types is"),
        ({"attention_types": None, "num_layers": 4}, "attention_types is .* for 4 layers"),
        ({"attention_layers": ["global"] * 4}, "attention_layers is .* but attention_types is"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"num_attention_heads": 8}, "num_heads is 4 but num_attention_heads, another name for it, is 8"),
        ({"window_size": 0}, "window_size is '0'; expected a whole number above zero"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = saved(gpt_neo(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("attention_layers", None)
    (source / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


@pytest.mark.parametrize("name", ["gpt-neo-125m", "gpt-neo-1.3B", "gpt-neo-2.7B"])
def test_a_released_models_settings_survive_a_configuration(name: str) -> None:
    config = GPT_NEO.presets[name]
    theirs = program("transformers").GPTNeoConfig(**GPT_NEO.to_hf(config, "float16"))
    kinds = ["global" if layer in config.unwindowed else "local" for layer in range(config.layers)]
    assert theirs.attention_layers == kinds and theirs.window_size == 256

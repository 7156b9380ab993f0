"""GPT-2, and gpt-neox's models with learned positions: transformers' and llama.cpp's numbers from either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import open_checkpoint, verify_weights
from neoxconv.core.tensor import LazyTensor, transposed
from neoxconv.dtypes import F32
from neoxconv.errors import CheckpointError, PlanError
from tests.gpt2 import CONTEXT, HIDDEN, LAYERS, SETTINGS, TOKENS, converted, gpt2, shards_of
from tests.helpers import few
from tests.oracles import llama_logits, program, transformers_logits
from tests.relatives import (
    CLOSE,
    LLAMA_CPP,
    logits_of,
    native_logits,
    saved,
    write_shards,
)  # fmt: skip

NEWER = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"}  # names since 2024-09

CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "erf": {"activation_function": "gelu"},
    "another epsilon": {"layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize("ranks", few([1, 2, 4], 2))
@pytest.mark.parametrize("case", CASES)
def test_shards_give_what_transformers_computes(case: str, ranks: int, tmp_path: Path) -> None:
    model = gpt2(**CASES[case])
    expected = logits_of(model, TOKENS)
    settings = SETTINGS | {
        "no_weight_tying": not model.config.tie_word_embeddings,
        "bias_gelu_fusion": model.config.activation_function == "gelu_new",
        "layernorm_epsilon": model.config.layer_norm_epsilon,
    }
    shards = shards_of(model, ranks)
    if case == "erf":
        shards = [{_newer(name): tensor for name, tensor in rank.items()} for rank in shards]
    source = write_shards(tmp_path / "neox", shards, LAYERS, settings, sequential=case == "untied")
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.name == "gpt2" and not checkpoint.dropped
    for merged in (False, True):
        assert np.abs(native_logits(checkpoint, TOKENS, merged) - expected).max() < CLOSE
    folder = converted(source, tmp_path / "hf", "hf")
    assert np.abs(transformers_logits(folder, TOKENS) - expected).max() < CLOSE
    assert verify_weights(checkpoint, open_checkpoint(folder)).passed
    for path in (source, folder) if case != "erf" else ():
        file = converted(path, tmp_path / f"{path.name}.gguf", "gguf", type="F16")
        assert np.abs(llama_logits(file, TOKENS) - expected).max() < LLAMA_CPP * expected.std()
        again = converted(file, tmp_path / f"{path.name}.again", "hf", dtype="F32")
        assert np.abs(transformers_logits(again, TOKENS) - expected).max() < LLAMA_CPP * expected.std()


def _newer(name: str) -> str:
    """A tensor's name since 2024-09."""
    for old, new in NEWER.items():
        name = name.replace(old, new)
    return name


# --- positions that are computed ------------------------------------------------------------------------------------


def sines(frequencies: Any) -> Any:
    """The table of gpt-neox's SinusoidalPositionalEmbedding, in the type of its buffer."""
    torch = program("torch")
    angles = torch.einsum("i,j->ij", torch.arange(CONTEXT).type_as(frequencies), frequencies)
    angles = angles.float() if frequencies.dtype is torch.bfloat16 else angles
    return torch.cat((angles.sin(), angles.cos()), -1).to(frequencies.dtype).float()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["none", "sinusoidal"])
def test_positions_that_gpt_neox_computes_become_a_table(kind: str, dtype: str, tmp_path: Path) -> None:
    torch = program("torch")
    number_type = getattr(torch, dtype)
    model = gpt2().to(number_type).float()
    frequencies = (1.0 / (10000 ** (torch.arange(0, HIDDEN, 2).float() / HIDDEN))).to(number_type)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(sines(frequencies) if kind == "sinusoidal" else torch.zeros(CONTEXT, HIDDEN))
    shards = [{name: tensor.to(number_type) for name, tensor in rank.items()} for rank in shards_of(model, 2)]
    for rank in shards:
        del rank["0.position_embeddings.weight"]
        if kind == "sinusoidal":
            rank["0.position_embeddings.inv_freq"] = frequencies
    source = write_shards(tmp_path / "neox", shards, LAYERS, SETTINGS | {"pos_emb": kind})
    checkpoint, expected = open_checkpoint(source), logits_of(model, TOKENS)
    assert checkpoint.architecture.name == "gpt2"
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE
    folder = converted(source, tmp_path / "hf", "hf")
    assert np.abs(transformers_logits(folder, TOKENS) - expected).max() < CLOSE
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F16")
    assert np.abs(llama_logits(file, TOKENS) - expected).max() < LLAMA_CPP * expected.std()
    slim = open_checkpoint(converted(source, tmp_path / "slim", "slim", tp=1))  # as it was: no table in it
    assert "0.position_embeddings.weight" not in slim.index.ranks[0]
    assert np.abs(native_logits(slim, TOKENS) - expected).max() < CLOSE


# --- folders of Hugging Face's --------------------------------------------------------------------------------------


def as_released(folder: Path) -> Path:
    """A folder named as openai-community/gpt2's: no prefix, no head, each layer's mask a tensor, no tying said."""
    from safetensors.torch import load_file, save_file

    torch = program("torch")
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    for layer in range(LAYERS):
        state[f"h.{layer}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril().reshape(1, 1, CONTEXT, CONTEXT)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tie_word_embeddings"}))
    return folder


@pytest.mark.parametrize("released", [False, True], ids=["with prefix", "as released"])
def test_a_folder_of_gpt2_is_a_source(released: bool, tmp_path: Path) -> None:
    model = gpt2()
    expected, source = logits_of(model, TOKENS), saved(model, tmp_path / "source")
    source = as_released(source) if released else source
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.dropped) == (2 * LAYERS if released else 0)
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE
    for format in ("hf", "safetensors", "gguf", "slim"):
        target = converted(source, tmp_path / f"x.{format}", format, **({"tp": 2} if format == "slim" else {}))
        again = open_checkpoint(target)
        assert again.architecture.name == "gpt2" and again.config.tied == (format != "gguf")
        assert format == "slim" or verify_weights(checkpoint, again).passed
        off = LLAMA_CPP * expected.std() if format in ("gguf", "slim") else CLOSE  # these two in 16 bits
        assert np.abs(native_logits(again, TOKENS) - expected).max() < off
    assert np.abs(transformers_logits(tmp_path / "x.hf", TOKENS) - expected).max() < CLOSE


def test_slim_holds_what_gpt_neox_would_have_stored(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False).half().float()
    slim = open_checkpoint(converted(saved(model, tmp_path / "hf"), tmp_path / "slim", "slim", tp=2, dtype="F16"))
    settings = slim.index.settings
    assert (settings["pos_emb"], settings["gpt_j_residual"], settings["bias_gelu_fusion"]) == ("learned", False, True)
    for ours, theirs in zip(slim.index.ranks, shards_of(model, 2), strict=True):
        assert set(ours) == set(theirs)
        assert all(np.array_equal(ours[name].floats(0, ours[name].rows), theirs[name].numpy()) for name in theirs)


def test_shards_split_anew_are_those_of_the_other_degree(tmp_path: Path) -> None:
    model = gpt2()
    source = write_shards(tmp_path / "neox", shards_of(model, 2), LAYERS, SETTINGS)
    slim = open_checkpoint(converted(source, tmp_path / "slim", "slim", tp=4, dtype=None))
    for ours, theirs in zip(slim.index.ranks, shards_of(model, 4), strict=True):
        assert set(ours) == set(theirs)
        assert all(np.array_equal(ours[name].floats(0, ours[name].rows), theirs[name].numpy()) for name in theirs)


def test_the_exact_merge_is_exact(tmp_path: Path) -> None:
    """Ranks whose norms differ: the folded model computes what the ranks compute."""
    torch = program("torch")
    shards = shards_of(gpt2(tie_word_embeddings=False), 2)
    for name, tensor in shards[1].items():
        if "norm" in name:
            tensor += 0.05 * torch.randn_like(tensor)
    source = write_shards(tmp_path / "neox", shards, LAYERS, SETTINGS | {"no_weight_tying": True})
    expected = native_logits(open_checkpoint(source), TOKENS)
    folded, mean = (native_logits(open_checkpoint(source, norms=n), TOKENS, merged=True) for n in ("fold", "mean"))
    assert np.abs(folded - expected).max() < CLOSE < np.abs(mean - expected).max()


@pytest.mark.parametrize(("type", "marker"), [("NF4", "weight.absmax"), ("INT8", "SCB")])
def test_bitsandbytes_makes_the_same_tensors_of_conv1d(type: str, marker: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    program("bitsandbytes")
    torch, transformers = program("torch"), program("transformers")
    source = saved(gpt2(), tmp_path / "hf")
    asked = {"load_in_8bit": True} if type == "INT8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=transformers.BitsAndBytesConfig(**asked), dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    target = converted(source, tmp_path / "ours", "bnb", type=type)
    ours, saved_by_them = (load_file(folder / "model.safetensors") for folder in (target, tmp_path / "theirs"))
    assert any(marker in name for name in ours) and set(ours) == set(saved_by_them)
    assert all(torch.equal(ours[name], saved_by_them[name]) for name in ours)
    wide = converted(target, tmp_path / "wide", "hf")
    assert np.abs(transformers_logits(wide, TOKENS) - native_logits(open_checkpoint(target), TOKENS)).max() < CLOSE


def test_float8_says_that_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Conv1D"):
        converted(saved(gpt2(), tmp_path / "hf"), tmp_path / "x", "float8")


def test_a_transpose_is_read_in_bands(tmp_path: Path) -> None:
    """No read of the file asks for more numbers than a band of the target has, and the way back reads it as it is."""
    values = np.arange(96 * 40, dtype=np.float32).reshape(96, 40)
    asked: list[int] = []

    def read(start: int, stop: int) -> Any:
        asked.append(stop - start)
        return values[start:stop]

    matrix = LazyTensor(values.shape, F32, read, F32)
    turned = transposed(matrix)
    assert np.array_equal(turned.read(5, 15), values.T[5:15]) and max(asked) * 40 <= 10 * 96
    asked.clear()
    assert np.array_equal(transposed(turned).read(7, 9), values[7:9]) and asked == [2]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"num_attention_heads": 2}, "n_head is 4 but num_attention_heads, another name for it, is 2"),
    ],
)
def test_another_function_is_refused_by_name(settings: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gpt_j_residual": True}, "gpt_j_residual: True is not supported"),
        ({"opt_pos_emb_offset": 2}, "opt_pos_emb_offset: 2 is not supported"),
        ({"num_kv_heads": 2}, "num_kv_heads: 2"),
        ({"activation": "relu"}, "activation: relu is not supported"),
        ({"pos_emb": "rpe"}, "pos_emb is rpe, but the layer files have learned positions"),
        ({"pos_emb": "none"}, "pos_emb is none, but the layer files have learned positions"),
        ({"pos_emb": "sinusoidal"}, "pos_emb is sinusoidal, but the layer files have learned positions"),
        ({"pos_emb": "rotary"}, "pos_emb is rotary, but the layer files have learned positions"),
    ],
)
def test_shards_of_another_function_are_refused_by_name(settings: dict[str, Any], word: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "neox", shards_of(gpt2(), 2), LAYERS, SETTINGS | settings)
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("own", "other"), [("n_head", "num_attention_heads"), ("n_positions", "max_position_embeddings")]
)
def test_a_setting_may_have_transformers_other_name(own: str, other: str, tmp_path: Path) -> None:
    """transformers takes both, so what it computes is what counts, not the default of a name that is not there."""
    folder = saved(gpt2(), tmp_path / "hf")
    expected = transformers_logits(folder, TOKENS)
    config = json.loads((folder / "config.json").read_text())
    config[other] = config.pop(own)
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(transformers_logits(folder, TOKENS), expected)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config.heads, checkpoint.config.context) == (4, config.get(other) if "pos" in other else 64)

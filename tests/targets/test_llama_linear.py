"""Quantized folders and single files of Llamas: what transformers makes of them, against the original model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from tests.llama_shards import Era, llama, write
from tests.oracles import causal_logits, program

TOKENS = np.random.default_rng(3).integers(0, 280, (2, 40))
# Each type, and how far logits may be from the original's, of their standard deviation; about twice what was measured.
TYPES = {
    "INT8": (Recipe("bnb", type="INT8"), 0.09),
    "NF4": (Recipe("bnb", type="NF4"), 0.8),
    "E4M3": (Recipe("float8", type="E4M3"), 0.25),
}
MODELS = {
    "grouped": {"kv_heads": 2},
    "tied": {"kv_heads": 4, "tie_word_embeddings": True},
    "biased": {"kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "windowed": {"kv_heads": 1, "window": 9},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", TYPES)
def test_transformers_runs_what_is_quantized(name: str, kind: str, tmp_path: Path) -> None:
    recipe, most = TYPES[name]
    program("bitsandbytes" if recipe.format == "bnb" else "compressed_tensors")
    model = llama(**{"hidden_size": 128, "intermediate_size": 192, **MODELS[kind]})
    with torch.no_grad():  # so that layers add less than they are given, as in a trained model; a power of two is exact
        model.model.embed_tokens.weight.mul_(4)
        for layer in model.model.layers:
            for values in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                values.mul_(0.25)
    tp = min(2, model.config.num_key_value_heads)
    source = open_checkpoint(write(tmp_path / "run", model, Era(tp=tp, inside=True)), qkv_layout="blocks")
    made = run(make_plan(source, recipe), tmp_path / "made")
    assert verify_weights(source, open_checkpoint(made)).passed
    with torch.inference_mode():
        expected = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    off = (causal_logits(made, TOKENS, "float32") - expected).std() / expected.std()
    assert off < most
    wide = run(make_plan(open_checkpoint(made), Recipe("hf")), tmp_path / "wide")
    read_back = (causal_logits(wide, TOKENS, "float32") - expected).std() / expected.std()
    assert 0 < read_back < most
    assert abs(off - read_back) < most / 4  # INT8 quantizes the inputs too


@pytest.mark.parametrize("kind", ["INT8", "NF4"])
def test_every_tensor_is_the_one_that_bitsandbytes_saves(kind: str, tmp_path: Path) -> None:
    program("bitsandbytes")
    transformers = program("transformers")
    model = llama(2, hidden_size=64, intermediate_size=96)
    source = open_checkpoint(write(tmp_path / "run", model, Era(inside=True)), qkv_layout="blocks")
    hf = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    ours = run(make_plan(source, Recipe("bnb", type=kind)), tmp_path / "ours")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    asked = transformers.BitsAndBytesConfig(**(four if kind == "NF4" else {"load_in_8bit": True}))
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(hf, quantization_config=asked, dtype="auto", device_map="cpu").save_pretrained(tmp_path / "theirs")
    found, expected = (load_file(folder / "model.safetensors") for folder in (ours, tmp_path / "theirs"))
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


def test_a_single_file_holds_the_whole_model(tmp_path: Path) -> None:
    program("transformers")
    source = open_checkpoint(write(tmp_path / "run", llama(2), Era(inside=True)), qkv_layout="blocks")
    made = run(make_plan(source, Recipe("safetensors")), tmp_path / "x.safetensors")
    again = open_checkpoint(made)
    assert again.config == source.config
    assert verify_weights(source, again).passed
    hf = run(make_plan(source, Recipe("hf")), tmp_path / "hf")
    found, expected = load_file(made), load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert json.loads((hf / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

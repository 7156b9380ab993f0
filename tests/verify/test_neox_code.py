"""gpt-neox's own code, where it is installed (tests/neox_code): we read what it saves, it loads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.model import Checkpoint
from tests.fixtures import fixture
from tests.neox_code.program import first_loss, train
from tests.oracles import Tokens, program, transformers_logits
from tests.streamed import logits_of

pytestmark = pytest.mark.slow

LLAMA: dict[str, Any] = {
    "tokenizer_type": "HFTokenizer", "make_vocab_size_divisible_by": 64, "num_layers": 2, "hidden_size": 32,
    "num_attention_heads": 4, "seq_length": 24, "max_position_embeddings": 32, "norm": "rmsnorm",
    "rms_norm_epsilon": 1.0e-5, "pos_emb": "rotary", "rotary_pct": 1.0, "activation": "swiglu",
    "no_weight_tying": True, "gpt_j_residual": False, "intermediate_size": 144, "mlp_multiple_of": 16,
    "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "output_layer_parallelism": "column",
    "init_method": "normal", "init_method_std": 0.15,
}  # fmt: skip
BIASES = {"use_bias_in_attn_linear": True, "use_bias_in_mlp": True}
TRAINED = (
    #   TP  PP  settings
    (2, 2, {"num_kv_heads": 2}),
    (2, 0, BIASES),
    (2, 1, {"num_kv_heads": 2, **BIASES}),
    (1, 1, {"no_weight_tying": False}),
    (1, 2, {"num_kv_heads": 2, "rotary_emb_base": 500000}),
    (1, 1, {"num_kv_heads": 2, "sliding_window_width": 5}),
)
LOADED = (
    #   source                      recipe
    ("neox_2026_bf16_tp2_pp2", Recipe("slim", tp=4, pp=1)),
    ("neox_2026_bf16_tp2_pp2", Recipe("slim", tp=1, pp=0)),
    ("neox_2022_tp2_pp4", Recipe("slim", tp=1, pp=2, current_names=True)),
    ("llama_2026_bf16_tp2_pp2", Recipe("slim", tp=1, pp=2)),
    ("llama_2024_bf16_tp2_pp2", Recipe("slim", tp=1, pp=1, current_names=True)),
)


def tokenizer() -> Path:
    return fixture("neox_2026_bf16_tp2_pp2/tiny_tokenizer.json")


def tokens(*shape: int) -> Tokens:
    return np.random.default_rng(1).integers(0, 493, shape)


def opened(folder: Path) -> Checkpoint:
    """A checkpoint of today's gpt-neox, told so where it is a Llama that does not tell by itself."""
    tells = any(part.startswith(("neox_", "llama_2024")) for part in folder.parts)
    return open_checkpoint(folder) if tells else open_checkpoint(folder, qkv_layout="blocks", rmsnorm="inside")


def loss_of(folder: Path, sequences: Tokens) -> float:
    """What transformers computes: the mean of a word's loss."""
    logits = torch.from_numpy(transformers_logits(folder, sequences[:, :-1])).double().log_softmax(-1)
    return float(-logits.gather(-1, torch.from_numpy(sequences[:, 1:, None])).mean())


@pytest.mark.parametrize(("tp", "pp", "settings"), TRAINED, ids=str)
def test_what_gpt_neox_saves_is_read_as_it_computes(tp: int, pp: int, settings: dict[str, Any], tmp_path: Path) -> None:
    degrees = {"model_parallel_size": tp, "pipe_parallel_size": pp, "vocab_file": str(tokenizer())}
    made = train(tmp_path / "run", {**LLAMA, **degrees, **settings}, tokens(3, 2, 2, 25))
    checkpoint = opened(made.checkpoints)
    limit = 1e-5 * made.averaged.std()
    assert np.abs(logits_of(checkpoint, made.tokens) - made.as_is).max() <= limit
    folder = run(make_plan(checkpoint, Recipe("hf", dtype="F32")), tmp_path / "hf")
    assert np.abs(transformers_logits(folder, made.tokens) - made.averaged).max() <= limit


@pytest.mark.parametrize(("name", "recipe"), LOADED, ids=str)
def test_gpt_neox_goes_on_from_slim(name: str, recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = opened(fixture(f"{name}/checkpoints"))
    slim = run(make_plan(checkpoint, recipe), tmp_path / "slim")
    merged = run(make_plan(checkpoint, Recipe("hf")), tmp_path / "hf")
    batch = tokens(2, 2, 17)
    found = first_loss(slim, batch, tmp_path / "work")
    assert found == pytest.approx(loss_of(merged, batch.reshape(4, -1)), abs=2e-6)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 0)])
def test_gpt_neox_goes_on_from_a_llama_of_transformers(tp: int, pp: int, biases: bool, tmp_path: Path) -> None:
    transformers = program("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, attention_bias=biases, mlp_bias=biases,
        initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "hf")
    recipe = Recipe("slim", tp=tp, pp=pp, tokenizer=tokenizer())
    slim = run(make_plan(open_checkpoint(tmp_path / "hf"), recipe), tmp_path / "slim")
    batch = tokens(2, 2, 25)
    found = first_loss(slim, batch, tmp_path / "work")
    assert found == pytest.approx(loss_of(tmp_path / "hf", batch.reshape(4, -1)), abs=2e-6)

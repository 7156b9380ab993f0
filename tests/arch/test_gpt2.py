"""GPT-2, and gpt-neox's models with learned positions: transformers' and llama.cpp's numbers from either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from tests.oracles import llama_logits, program, transformers_logits
from tests.relatives import (
    CLOSE,
    LLAMA_CPP,
    Shards,
    by_columns,
    by_rows,
    copies,
    joined,
    logits_of,
    native_logits,
    per_head,
    random_model,
    some_tokens,
    write_shards,
)  # fmt: skip

LAYERS, HIDDEN, HEADS, ROWS, CONTEXT = 3, 64, 4, 320, 64
TOKENS = some_tokens(ROWS)
SETTINGS = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT,
    "seq_length": CONTEXT, "norm": "layernorm", "activation": "gelu", "bias_gelu_fusion": True,
}  # fmt: skip  # pos_emb is silent: learned
NEWER = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"}  # names since 2024-09


def gpt2(**changes: Any) -> Any:
    """A GPT2LMHeadModel of random numbers."""
    sizes = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": ROWS}
    return random_model(program("transformers").GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes))


def shards_of(model: Any, ranks: int) -> Shards:
    """What gpt-neox's ranks hold of a GPT-2, whose matrices are stored [inputs, outputs]."""
    state = model.state_dict()
    groups = [
        {
            "0.word_embeddings.weight": by_rows(state["transformer.wte.weight"], ranks),
            "0.position_embeddings.weight": copies(state["transformer.wpe.weight"], ranks),
        }
    ]
    for layer in range(LAYERS):
        at, n = f"transformer.h.{layer}.", layer + 2
        thirds = {kind: state[f"{at}attn.c_attn.{kind}"].chunk(3, -1) for kind in ("weight", "bias")}
        qkv = {
            "weight": per_head(*(third.T for third in thirds["weight"]), HEADS),
            "bias": per_head(*thirds["bias"], HEADS),
        }
        groups.append(
            {
                f"{n}.input_layernorm.weight": copies(state[at + "ln_1.weight"], ranks),
                f"{n}.input_layernorm.bias": copies(state[at + "ln_1.bias"], ranks),
                **{f"{n}.attention.query_key_value.{kind}": by_rows(tensor, ranks) for kind, tensor in qkv.items()},
                f"{n}.attention.dense.weight": by_columns(state[at + "attn.c_proj.weight"].T, ranks),
                f"{n}.attention.dense.bias": copies(state[at + "attn.c_proj.bias"], ranks),
                f"{n}.post_attention_layernorm.weight": copies(state[at + "ln_2.weight"], ranks),
                f"{n}.post_attention_layernorm.bias": copies(state[at + "ln_2.bias"], ranks),
                f"{n}.mlp.dense_h_to_4h.weight": by_rows(state[at + "mlp.c_fc.weight"].T, ranks),
                f"{n}.mlp.dense_h_to_4h.bias": by_rows(state[at + "mlp.c_fc.bias"], ranks),
                f"{n}.mlp.dense_4h_to_h.weight": by_columns(state[at + "mlp.c_proj.weight"].T, ranks),
                f"{n}.mlp.dense_4h_to_h.bias": copies(state[at + "mlp.c_proj.bias"], ranks),
            }
        )
    groups.append(
        {f"{LAYERS + 3}.norm.{kind}": copies(state[f"transformer.ln_f.{kind}"], ranks) for kind in ("weight", "bias")}
    )
    if not model.config.tie_word_embeddings:
        groups.append({f"{LAYERS + 4}.final_linear.weight": by_rows(state["lm_head.weight"], ranks)})
    return joined(groups)


def converted(source: Path, target: Path, format: str, **recipe: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe(format, **recipe)), target)


CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "erf": {"activation_function": "gelu"},
    "another epsilon": {"layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
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

"""A small GPT-2 of transformers' own, and what gpt-neox's ranks hold of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neoxconv import Recipe, make_plan, open_checkpoint, run
from tests.oracles import program
from tests.relatives import Shards, by_columns, by_rows, copies, joined, per_head, random_model, some_tokens

LAYERS, HIDDEN, HEADS, ROWS, CONTEXT = 3, 64, 4, 320, 64
TOKENS = some_tokens(ROWS)
SETTINGS = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT,
    "seq_length": CONTEXT, "norm": "layernorm", "activation": "gelu", "bias_gelu_fusion": True,
}  # fmt: skip  # pos_emb is silent: learned


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

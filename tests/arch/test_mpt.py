"""gpt-neox's models with ALiBi: llama.cpp runs them as mpt, rank by rank they are what gpt-neox computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import open_checkpoint, verify_weights
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.errors import CheckpointError, PlanError
from tests.gpt2 import LAYERS, SETTINGS, TOKENS, converted, gpt2, shards_of
from tests.oracles import Logits, llama_logits, program
from tests.relatives import CLOSE, LLAMA_CPP, Shards, native_logits, write_shards

ALIBI = SETTINGS | {"pos_emb": "alibi"}


def slopes(heads: int) -> list[float]:
    """As gpt-neox's AliBi._get_slopes has them."""

    def of_power(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(np.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    lower = 2 ** int(np.floor(np.log2(heads)))
    return of_power(lower) + of_power(2 * lower)[0::2][: heads - lower]


def alibi_logits(model: Any, heads: int) -> Logits:
    """A GPT-2 without positions, its attention given ALiBi: written from gpt-neox's forward, in torch."""
    torch = program("torch")
    f, net, n = torch.nn.functional, model.transformer, TOKENS.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    bias = -torch.tensor(slopes(heads)).float()[:, None, None] * distance
    bias = bias.masked_fill(distance < 0, float("-inf"))
    with torch.inference_mode():
        x = net.wte(torch.from_numpy(TOKENS))
        for block in net.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(f.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
        return np.asarray(model.lm_head(net.ln_f(x)).numpy())


def alibi_shards(model: Any, ranks: int) -> Shards:
    """As gpt-neox stores them, each layer's slopes a buffer."""
    torch = program("torch")
    shards = shards_of(model, ranks)
    for rank in shards:
        del rank["0.position_embeddings.weight"]
        rank |= {f"{n + 2}.attention.alibi_embed.slopes": torch.ones(2) for n in range(LAYERS)}
    return shards


@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_give_what_gpt_neox_computes_and_llama_cpp_too(ranks: int, tmp_path: Path) -> None:
    model = gpt2()
    source, expected = (
        write_shards(tmp_path / "neox", alibi_shards(model, ranks), LAYERS, ALIBI),
        alibi_logits(model, 4),
    )
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.name == "mpt" and len(checkpoint.dropped) == LAYERS
    assert np.abs(native_logits(checkpoint, TOKENS) - expected).max() < CLOSE
    file = converted(source, tmp_path / "x.gguf", "gguf", type="F16")
    assert np.abs(llama_logits(file, TOKENS) - expected).max() < LLAMA_CPP * expected.std()
    again = open_checkpoint(file)
    assert again.config.positions == "alibi" and verify_weights(checkpoint, again).passed
    slim = open_checkpoint(converted(file, tmp_path / "slim", "slim", tp=2))
    assert slim.architecture.name == "mpt"
    assert np.abs(native_logits(slim, TOKENS) - expected).max() < LLAMA_CPP * expected.std()


@pytest.mark.parametrize("format", ["hf", "safetensors", "bnb"])
def test_hugging_face_has_no_such_model(format: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "neox", alibi_shards(gpt2(), 2), LAYERS, ALIBI)
    with pytest.raises(PlanError, match=r"pos_emb: alibi: transformers has no model .* --to gguf"):
        converted(source, tmp_path / "x", format)


def test_a_parallel_residual_is_refused_by_name(tmp_path: Path) -> None:
    settings = ALIBI | {"gpt_j_residual": True}
    with pytest.raises(CheckpointError, match="pos_emb: alibi is not supported with gpt_j_residual: true"):
        open_checkpoint(write_shards(tmp_path / "neox", alibi_shards(gpt2(), 2), LAYERS, settings))


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 40])
def test_slopes_are_gpt_neoxs_also_of_heads_that_are_no_power_of_2(heads: int) -> None:
    torch = program("torch")
    from neoxconv.arch.gpt2.forward import _alibi

    config = replace(GPT_NEOX.presets["20B"], heads=heads, positions="alibi")
    ours = _alibi(torch.zeros(1, 3, 8), config)
    assert torch.allclose(ours[:, 2, 0], -2 * torch.tensor(slopes(heads)).float())

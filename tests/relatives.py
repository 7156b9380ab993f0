"""Small models of transformers' own classes, and gpt-neox's shards of them, split as its ranks split: no code of ours.

gpt-neox's side is written from its megatron/model/transformer.py and mpu/layers.py: a rank of T has every T-th part of
an embedding's and a column-parallel matrix's rows, of a row-parallel matrix's columns, and a copy of all else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.synthetic import tiny
from neoxconv.verify.logits.stream import running, side
from tests.oracles import Logits, Tokens, program

Shards = list[dict[str, Any]]  # of each rank: `N.name` -> torch.Tensor
CLOSE = 2e-5  # float32 logits of order 1, summed in another order
LLAMA_CPP = 0.02  # of the logits' standard deviation, in F16


def random_model(config: Any, seed: int = 0) -> Any:
    """A transformers model of a configuration, every number of it random: norms and biases too."""
    torch = program("torch")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            is_gain = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(torch.randn_like(tensor) * 0.1 + is_gain)
    return model


def saved(model: Any, folder: Path) -> Path:
    """Its Hugging Face folder, a tokenizer in it."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny().data)
    return folder


def logits_of(model: Any, tokens: Tokens) -> Logits:
    """What transformers computes."""
    torch = program("torch")
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(tokens), use_cache=False).logits.numpy())


def native_logits(checkpoint: Checkpoint, tokens: Tokens, merged: bool = False) -> Logits:
    """What our forward pass computes, rank by rank or of the merged model."""
    with running(tokens, "cpu") as (pool, words):
        ours = side(checkpoint, pool, merged=merged)
        streams = ours.embed(words)
        for layer in range(checkpoint.config.layers):
            streams = ours.layer(layer, streams)
        return np.asarray(ours.logits(ours.final(streams), 0, checkpoint.config.rows).numpy())


def same_first_choices(found: Logits, expected: Logits) -> None:
    """Assert that the likeliest word is the same wherever it is clearly the likeliest."""
    first, second = np.sort(expected, axis=-1)[..., -1], np.sort(expected, axis=-1)[..., -2]
    clear = first - second > 2 * LLAMA_CPP * expected.std()
    assert clear.mean() > 0.5
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


def some_tokens(rows: int, time: int = 48) -> Tokens:
    return np.random.default_rng(1).integers(0, rows, (2, time))


def by_rows(tensor: Any, ranks: int) -> list[Any]:
    return [part.clone() for part in tensor.chunk(ranks, 0)]


def by_columns(tensor: Any, ranks: int) -> list[Any]:
    return [part.clone() for part in tensor.chunk(ranks, 1)]


def copies(tensor: Any, ranks: int) -> list[Any]:
    return [tensor.clone() for _ in range(ranks)]


def per_head(query: Any, key: Any, value: Any, heads: int) -> Any:
    """Rows [heads][query, key, value][size], as gpt-neox's `mixed_x_layer` is viewed."""
    torch = program("torch")
    parts = [part.reshape(heads, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.stack(parts, 1).reshape(-1, *query.shape[1:])


def write_shards(
    folder: Path, shards: Shards, layers: int, settings: Mapping[str, Any], sequential: bool = False
) -> Path:
    """A checkpoint of gpt-neox's at `folder`: layer files and states (or all in the states), a YAML, a tokenizer."""
    torch = program("torch")
    step = folder / "global_step10"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    (folder / "tokenizer.json").write_bytes(tiny().data)
    (step / "configs" / "model.yml").write_text(json.dumps({**settings, "model_parallel_size": len(shards)}))
    for rank, tensors in enumerate(shards):
        module = {f"sequential.{name}": tensor for name, tensor in tensors.items()} if sequential else None
        state = {"module": module, "optimizer": None, "iteration": 10, "mp_world_size": len(shards), "args": {}}
        torch.save(state, step / f"mp_rank_{rank:02d}_model_states.pt")
        for number in () if sequential else range(layers + 5):
            held = {k.split(".", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{number}.")}
            if held:
                torch.save(held, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return folder


def joined(parts: Sequence[Mapping[str, Sequence[Any]]]) -> Shards:
    """The ranks' tensors of several groups of `N.name` -> one tensor for each rank."""
    ranks = len(next(iter(parts[0].values())))
    return [{name: tensors[rank] for group in parts for name, tensors in group.items()} for rank in range(ranks)]

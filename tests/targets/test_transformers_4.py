"""Every family's Hugging Face folder loads in transformers 4 as in 5, without a missing or unexpected key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.synthetic import tiny
from tests.oracles import program, transformers4_load
from tests.relatives import logits_of, random_model, saved, some_tokens

_LLAMA: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "MistralConfig": {**_LLAMA, "sliding_window": 9},
    "GPT2Config": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTJConfig": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8,
                   "tie_word_embeddings": False},
    "GPTNeoConfig": {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 9,
                     "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = random_model(getattr(program("transformers"), name)(**FAMILIES[name]))
    source = saved(model, tmp_path / "source")
    (source / "tokenizer.json").write_bytes(tiny().data)
    folder = run(make_plan(open_checkpoint(source), Recipe("hf", dtype="F32")), tmp_path / "hf")
    tokens = some_tokens(512)
    expected = logits_of(model, tokens)
    found = transformers4_load(folder, tokens, tmp_path / "logits.npy")
    assert np.abs(found - expected).max() < 1e-4 * expected.std() + 2e-5

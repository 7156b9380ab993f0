"""Small Llama and Mistral models that transformers makes, with random weights, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neoxconv.formats.tokenizer import hf_files
from neoxconv.synthetic import tiny
from tests.oracles import program

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
}  # fmt: skip


def little_llama(folder: Path, *, mistral: bool = False, seed: int = 0, **settings: Any) -> Path:
    """Write a model to `folder` and return it; `settings` are those of its config.json, beside SIZES.

    Biases and norms are random too, and weights large enough for logits that differ by more than rounding.
    """
    transformers, torch = program("transformers"), program("torch")
    torch.manual_seed(seed)
    family = "Mistral" if mistral else "Llama"
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **ids, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = name.endswith("norm.weight")
            weight.normal_(1.0 if norm else 0.0, 0.1 if norm or name.endswith("bias") else 0.08)
    model.to(torch.float16).save_pretrained(folder)
    for name, data in hf_files(tiny(), config.max_position_embeddings).items():
        (folder / name).write_bytes(data)
    return folder

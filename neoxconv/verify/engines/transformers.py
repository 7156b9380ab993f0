"""transformers, in float32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neoxconv.dtypes import Numbers
from neoxconv.errors import PlanError
from neoxconv.verify.engines.program import Encode, Run, Words, needed


def load(folder: Path) -> Run:
    """A Hugging Face folder in float32; one of bitsandbytes' weights in the type that the folder says.

    Told another, transformers 5 leaves embeddings and norms of such a folder as they are, and fails.
    """
    library, torch = needed("transformers", "transformers"), needed("torch", "torch")
    library.utils.logging.disable_progress_bar()
    settings = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config")
    packed = isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"
    try:
        model = library.AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if packed else torch.float32).eval()
    except ImportError as error:
        raise PlanError(
            f"{folder}: transformers cannot load it ({str(error).strip().splitlines()[0]:.200}); leave --engine out."
        ) from error

    def run(tokens: Numbers) -> Words:
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens[None]), use_cache=False).logits[0]
        return np.asarray(logits.float().numpy())

    return run


def words(folder: Path) -> Encode:
    """The tokenizer of a Hugging Face folder, as the class that the folder names makes it."""
    library = needed("transformers", "transformers")
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> Sequence[int]:
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        return [*tokenizer(text, **options)["input_ids"]]

    return encode

"""The programs that will run a target, asked for its logits: transformers and llama.cpp, where they are installed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.errors import PlanError, VerifyError
from neoxconv.storage.remote import Place
from neoxconv.verify.logits.compare import Logits


def needed(module: str, package: str) -> ModuleType:
    """An optional package's module. Raises PlanError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise PlanError(f"{package} is not installed; pip install {package}, or leave --engine out.") from error


def here(target: Place) -> Path:
    """A target that other programs can open. Raises PlanError for a URL."""
    if isinstance(target, Path):
        return target
    raise PlanError(f"{target}: other engines read local files only; download it, or leave --engine out.")


def transformers(target: Place, candidate: Checkpoint, tokens: Numbers) -> Logits:
    """The logits of a Hugging Face folder, in float32; of bitsandbytes' weights in the type that the folder says.

    Told another, transformers 5 leaves embeddings and norms of such a folder as they are, and fails.
    """
    if candidate.index.format != "hf":
        raise PlanError(
            f"{target}: --engine transformers runs Hugging Face folders, not {candidate.index.format}; leave it out."
        )
    target = here(target)
    library = needed("transformers", "transformers")
    library.utils.logging.disable_progress_bar()
    settings = candidate.index.settings.get("quantization_config")
    packed = isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"
    try:
        model = library.AutoModelForCausalLM.from_pretrained(target, dtype="auto" if packed else torch.float32).eval()
    except ImportError as error:
        raise PlanError(
            f"{target}: transformers cannot load it ({str(error).strip().splitlines()[0]:.200}); leave --engine out."
        ) from error
    with torch.inference_mode():
        rows = [model(torch.from_numpy(row[None]), use_cache=False).logits[0].float().numpy() for row in tokens]
    return in_bands(np.stack(rows))


def llama_cpp(target: Place, candidate: Checkpoint, tokens: Numbers) -> Logits:
    """The logits of a GGUF file, on the CPU."""
    if candidate.index.format != "gguf":
        raise PlanError(f"{target}: --engine llama.cpp runs GGUF files, not {candidate.index.format}; leave it out.")
    llama = needed("llama_cpp", "llama-cpp-python")
    llama.llama_log_set(silent(llama), ctypes.c_void_p(0))
    return in_bands(llama_logits(here(candidate.index.files[0].storage.path), tokens))


def llama_logits(path: Path, tokens: Numbers) -> npt.NDArray[np.float32]:
    """llama.cpp's logits [batch, time, words] of a GGUF file for tokens [batch, time]."""
    llama = needed("llama_cpp", "llama-cpp-python")
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise VerifyError(f"{path}: llama.cpp cannot load it; see why with llama.cpp's own tools.")
    try:
        return np.stack([one_sequence(llama, model, row) for row in tokens])
    finally:
        llama.llama_model_free(model)


@cache
def silent(llama: ModuleType) -> Any:
    """A callback that prints nothing; kept for good, as llama.cpp goes on calling the last one it was given."""
    return llama.llama_log_callback(lambda level, text, data: None)


def one_sequence(llama: ModuleType, model: Any, tokens: Numbers) -> npt.NDArray[np.float32]:
    """The logits [time, words] of one sequence in a context of its own."""
    size = llama.llama_context_default_params()
    size.n_ctx = size.n_batch = size.n_ubatch = len(tokens)
    size.n_threads = size.n_threads_batch = os.cpu_count() or 1
    context = llama.llama_init_from_model(model, size)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if llama.llama_decode(context, batch):
            raise VerifyError("llama.cpp cannot run the model on these tokens; give fewer with --length.")
        words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), words)).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)


def in_bands(logits: npt.NDArray[np.float32]) -> Logits:
    """Logits [batch, time, words] as compare_predictions asks for them."""
    whole = torch.from_numpy(logits)
    return lambda start, stop: whole[..., start:stop]


ENGINES: dict[str, Callable[[Place, Checkpoint, Numbers], Logits]] = {
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}

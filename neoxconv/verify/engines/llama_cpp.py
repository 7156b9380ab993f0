"""llama.cpp by llama-cpp-python, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from neoxconv.dtypes import Numbers
from neoxconv.errors import VerifyError
from neoxconv.verify.engines.program import Encode, Run, Words, needed


def load(path: Path) -> Run:
    """A GGUF file, or the first of several, on the CPU."""
    llama = needed("llama_cpp", "llama-cpp-python")
    model = llama_model(llama, path)
    return lambda tokens: one_sequence(llama, model, tokens)


def words(path: Path) -> Encode:
    """The vocabulary of a GGUF file, or of the first of several; special tokens in a text count as such."""
    llama = needed("llama_cpp", "llama-cpp-python")
    vocabulary = llama.llama_model_get_vocab(llama_model(llama, path, words_only=True))

    def encode(text: str) -> Sequence[int]:
        data = text.encode()
        room = len(data) + 1
        for _ in range(2):  # where there is no room it tells how much is needed, below zero
            ids = (llama.llama_token * room)()
            count = llama.llama_tokenize(vocabulary, data, len(data), ids, room, False, True)
            if count >= 0:
                return list(ids[:count])
            room = -count
        raise VerifyError(f"{path}: llama.cpp gives no ids for the text; see why with llama.cpp's own tools.")

    return encode


def llama_model(llama: ModuleType, path: Path, *, words_only: bool = False) -> Any:
    """llama.cpp's own handle of the model, or of its vocabulary. Raises VerifyError where it does not load it."""
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.vocab_only = words_only
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise VerifyError(f"{path}: llama.cpp cannot load it; see why with llama.cpp's own tools.")
    return model


def one_sequence(llama: ModuleType, model: Any, tokens: Numbers) -> Words:
    """The logits [time, words] of one sequence in a context of its own. Raises VerifyError where there is no room."""
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

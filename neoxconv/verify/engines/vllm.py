"""vLLM, on its own device; plain weights in float32, quantized ones in the model's number type, as its kernels want."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from neoxconv.dtypes import Numbers
from neoxconv.verify.engines.program import Run, Words, needed

_SETTINGS = {  # of the environment, where it has none
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process more would outlive this one
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # elsewhere it wants cores of its own
    "HF_HUB_OFFLINE": "1",
}
_GIB = 1 << 30
_MORE = 2  # tokens beyond a sequence: one whose predecessor's logits are asked for, one that it must generate


def load(folder: Path) -> Run:
    """A Hugging Face folder, or one of compressed-tensors'."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    length = config["max_position_embeddings"] + _MORE
    seen = 2 * 4 * config["num_hidden_layers"] * config["hidden_size"] * length  # keys and values, in bytes at most
    room = {"VLLM_CPU_KVCACHE_SPACE": str(-(-seen // _GIB))}  # else it takes nearly all memory of a CPU
    os.environ.update(_SETTINGS | room | dict(os.environ))
    library = needed("vllm", "vllm")
    model = library.LLM(
        str(folder),
        dtype="auto" if "quantization_config" in config else "float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        disable_log_stats=True,
    )
    asked = library.SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)

    def run(tokens: Numbers) -> Words:
        prompt = {"prompt_token_ids": [*tokens.tolist(), 0]}
        [answer] = model.generate([prompt], asked, use_tqdm=False)
        return _in_order(answer.prompt_logprobs, len(tokens))

    return run


def _in_order(found: object, count: int) -> Words:
    """Logits [count, words] by the token, of vLLM's, which begin with the token that follows and go on by size."""
    ids, values = (np.array(getattr(found, name)).reshape(count, -1) for name in ("token_ids", "logprobs"))
    logits = np.empty((count, ids.shape[1] - 1), np.float32)
    np.put_along_axis(logits, ids, values.astype(np.float32), axis=1)
    return logits

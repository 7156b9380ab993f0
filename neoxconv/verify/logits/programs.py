"""The programs that will run a target, where they are installed: what each runs, how it gives logits and token ids.

They are somebody else's code, which may die and take its process along. So `child` starts a process of its own for
them, which begins with `main` here; only numpy is imported at the top.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Numbers
from neoxconv.errors import NeoxconvError, PlanError, VerifyError

# Files in the folder that both processes know: what is asked, and what is answered.
TOKENS, LOGITS = "tokens.npy", "logits.npy"
TEXT, IDS = "text.txt", "ids.npy"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a share of it, or what one file may hold
_Words = npt.NDArray[np.float32]  # the logits of one sequence, [time, words]
Run = Callable[[Numbers], _Words]  # what a loaded model makes of one sequence of token ids [time]
_Encode = Callable[[str], Sequence[int]]  # the ids of a text by a loaded tokenizer, with none that begins or ends it


_Work = Callable[[Path], None]  # answers a question in a folder that both processes know


@dataclass(frozen=True)
class _Program:
    """A program by the format that it runs: as `Index.format` and in words.

    `load` opens a model in this process, `words` its tokenizer alone. They raise PlanError where the program is not
    installed or cannot load such a model, VerifyError where it fails.
    """

    format: str
    runs: str
    load: Callable[[Path], Run]
    words: Callable[[Path], _Encode]


def needed(module: str, package: str) -> ModuleType:
    """An optional package's module. Raises PlanError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise PlanError(f"{package} is not installed; pip install {package}, or leave --engine out.") from error


def transformers(folder: Path) -> Run:
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

    def run(tokens: Numbers) -> _Words:
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens[None]), use_cache=False).logits[0]
        return np.asarray(logits.float().numpy())

    return run


def transformers_words(folder: Path) -> _Encode:
    """The tokenizer of a Hugging Face folder, as the class that the folder names makes it."""
    library = needed("transformers", "transformers")
    words = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> Sequence[int]:
        return [*words(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"]]

    return encode


def llama_cpp(path: Path) -> Run:
    """A GGUF file, or the first of several, on the CPU."""
    llama = needed("llama_cpp", "llama-cpp-python")
    model = llama_model(llama, path)
    return lambda tokens: one_sequence(llama, model, tokens)


def llama_cpp_words(path: Path) -> _Encode:
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


def one_sequence(llama: ModuleType, model: Any, tokens: Numbers) -> _Words:
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


def ctranslate2(folder: Path) -> Run:
    """A folder of CTranslate2's on the CPU, in float32 whatever its weights are stored in.

    Left to itself it would multiply 8 bits by 8 bits, which a processor without VNNI saturates: docs/verification.md.
    """
    library = needed("ctranslate2", "ctranslate2")
    library.set_log_level(logging.ERROR)
    model = library.Generator(str(folder), device="cpu", compute_type="float32", intra_threads=os.cpu_count() or 1)
    return lambda tokens: np.asarray(model.forward_batch([tokens.tolist()]))[0]


PROGRAMS = {
    "transformers": _Program("hf", "Hugging Face folders", transformers, transformers_words),
    "llama.cpp": _Program("gguf", "GGUF files", llama_cpp, llama_cpp_words),
    "ctranslate2": _Program("ctranslate2", "CTranslate2 folders", ctranslate2, transformers_words),
}


# --- the child process ------------------------------------------------------------------------------------------------


def main(name: str, answers: str, path: str, folder: str) -> None:
    """Load the model at `path`, or its tokenizer; then, for every byte on stdin, do the work and answer on stdout.

    The work by the file that answers: LOGITS of the TOKENS in `folder`, or IDS of the TEXT there. An answer is a line
    of JSON: nothing where the file is written, or the kind of an error and its problems, which is the last. Whatever a
    program prints goes to stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends this process
    asked = questions()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as told:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for answer in _answered(name, answers, Path(path), Path(folder), asked):
            print(json.dumps(answer), file=told, flush=True)


def _answered(name: str, answers: str, path: Path, folder: Path, asked: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """An answer to each byte of `asked`, up to the first error."""
    try:
        work = _WORK[answers](PROGRAMS[name], path)
        for _ in asked:
            work(folder)
            yield {}
    except NeoxconvError as error:
        yield {"kind": type(error).__name__, "problems": [*map(str, error.args)]}
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        yield {
            "kind": "NeoxconvError",
            "problems": [f"{path}: {name} cannot run it ({what:.300}); leave --engine out."],
        }


def _running(program: _Program, path: Path) -> _Work:
    """What writes the logits of tokens."""
    run = program.load(path)
    return lambda folder: run_all(run, np.load(folder / TOKENS), folder / LOGITS)


def _encoding(program: _Program, path: Path) -> _Work:
    """What writes the ids of a text."""
    encode = program.words(path)
    return lambda folder: np.save(folder / IDS, np.array(encode((folder / TEXT).read_bytes().decode()), np.int64))


_WORK: dict[str, Callable[[_Program, Path], _Work]] = {LOGITS: _running, IDS: _encoding}


def run_all(run: Run, tokens: Numbers, file: Path) -> None:
    """Write the logits [batch, time, words] of tokens [batch, time] as a .npy file, each sequence when it is ready.

    Raises VerifyError where the disk is full.
    """
    try:
        with open(file, "wb") as stream:
            for number, row in enumerate(tokens):
                logits = np.ascontiguousarray(run(row), "<f4")
                if number == 0:
                    shape = (len(tokens), *logits.shape)
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(logits.data)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise VerifyError(
            f"{file}: has no room for {len(tokens)} x {tokens.shape[1]} tokens' logits ({error.strerror}); "
            "name a folder on another disk in TMPDIR, or give fewer tokens."
        ) from error


def questions() -> Iterator[bytes]:
    """The bytes of stdin. When it ends, as the parent closed it or is dead, this process ends, whatever it is doing."""
    read: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stdin = sys.stdin.fileno()

    def listen() -> None:
        while byte := os.read(stdin, 1):  # sys.stdin would be locked when Python ends, which then aborts
            read.put(byte)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return iter(read.get, b"")  # for ever, as no byte is none

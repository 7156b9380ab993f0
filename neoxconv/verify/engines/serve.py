"""The child process: it loads one model, or its tokenizer, and answers until nobody asks any more.

Somebody else's code may die and take its process along; `child` starts this and outlives it.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neoxconv.dtypes import Numbers
from neoxconv.errors import NeoxconvError, VerifyError
from neoxconv.verify.engines.program import Program, Run
from neoxconv.verify.engines.programs import PROGRAMS

# Files in the folder that both processes know: what is asked, and what is answered.
TOKENS, LOGITS = "tokens.npy", "logits.npy"
TEXT, IDS = "text.txt", "ids.npy"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a share of it, or what one file may hold

_Work = Callable[[Path], None]  # answers a question in a folder that both processes know


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


def _running(program: Program, path: Path) -> _Work:
    """What writes the logits of tokens."""
    run = program.load(path)
    return lambda folder: run_all(run, np.load(folder / TOKENS), folder / LOGITS)


def _encoding(program: Program, path: Path) -> _Work:
    """What writes the ids of a text."""
    encode = program.words(path)
    return lambda folder: np.save(folder / IDS, np.array(encode((folder / TEXT).read_bytes().decode()), np.int64))


_WORK: dict[str, Callable[[Program, Path], _Work]] = {LOGITS: _running, IDS: _encoding}


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

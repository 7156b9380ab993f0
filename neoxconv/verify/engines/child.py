"""A program of somebody else's in a process of its own, so that its death is a message here and nothing more.

Tokens go to it and logits come back as .npy files in a private folder, or a text and its ids. What it prints is kept,
and its last line shown if it dies. torch is needed for logits only.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.errors import NeoxconvError, PlanError, VerifyError
from neoxconv.storage import Place
from neoxconv.verify.engines.programs import PROGRAMS
from neoxconv.verify.engines.serve import IDS, LOGITS, TEXT, TOKENS
from neoxconv.verify.logits.trial import Engine

if TYPE_CHECKING:
    from neoxconv.verify.logits.compare import Logits

# The child looks for modules where this process does, and not in the folder that it happens to be started in. Another
# Python has its own, and of ours this package alone, without what lies beside it.
_BEGIN = """
import sys, types
at = sys.argv.index("--")
sys.path[:] = sys.argv[2:at] or sys.path[1:]
sys.modules["neoxconv"] = package = types.ModuleType("neoxconv")
package.__path__ = [sys.argv[1]]
from neoxconv.verify.engines.serve import main
main(*sys.argv[at + 1 :])
"""
_PACKAGE = Path(__file__).parents[2]
_SAID = "said.txt"  # what the program printed
_TAIL = 4096  # bytes of it that are read
_KINDS: dict[str, type[NeoxconvError]] = {"PlanError": PlanError, "VerifyError": VerifyError}
_REASONS: dict[int, str] = {
    signal.SIGILL: "its build may be for another processor: install one for this",
    signal.SIGKILL: "memory may have run out: it holds the whole model",
}


@contextmanager
def program(engine: Engine, target: Place, candidate: Checkpoint) -> Iterator[Callable[[Numbers], Logits]]:
    """What gives the logits of tokens [batch, time]: a program with the target's model, loaded once for all questions.

    It ends with this block. Raises PlanError where it is not installed or is for other targets; asking raises
    NeoxconvError where it dies.
    """
    with _started(engine, LOGITS, target, candidate) as child:
        yield child.logits


def ids_by(engine: Engine, target: Place, candidate: Checkpoint, text: str) -> list[int]:
    """The ids of a text by a program with the target's tokenizer. Raises as `program` and asking it do."""
    with _started(engine, IDS, target, candidate) as child:
        return child.ids(text)


@contextmanager
def _started(engine: Engine, answers: str, target: Place, candidate: Checkpoint) -> Iterator[_Child]:
    """The program in a process of its own, which writes files named `answers`; it ends with this block."""
    path = _model_for(engine.name, target, candidate)
    with TemporaryDirectory(prefix="neoxconv-") as folder, open(Path(folder, _SAID), "wb") as said:
        python, modules = (engine.python, ()) if engine.python else (sys.executable, sys.path)
        begin = [str(python), "-c", _BEGIN, str(_PACKAGE), *modules]
        command = [*begin, "--", engine.name, answers, str(path), folder]
        with _process(command, said) as process:
            try:
                yield _Child(engine.name, target, process, Path(folder))
            finally:
                process.kill()


def _process(command: list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    """The process of a command. Raises PlanError where its Python cannot be run."""
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=said)
    except OSError as error:
        raise PlanError(
            f"--engine-python {command[0]}: cannot be run ({error.strerror}); give the path of a Python, such as "
            "FOLDER/bin/python of a virtual environment."
        ) from error


def runs(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a program runs models of this format, from where this one lies."""
    return checkpoint.index.format == PROGRAMS[name].format and isinstance(_place_of(checkpoint), Path)


def _place_of(checkpoint: Checkpoint) -> Place:
    """What a program opens: a folder, or the first file."""
    index = checkpoint.index
    return index.files[0].storage.path if index.format == "gguf" else index.folder


def _model_for(name: str, target: Place, candidate: Checkpoint) -> Path:
    """What the program is to open. Raises PlanError where it runs no such targets, or the target is at a URL."""
    found, wanted = candidate.index.format, PROGRAMS[name]
    if found != wanted.format:
        raise PlanError(f"{target}: --engine {name} runs {wanted.runs}, not {found}; leave it out.")
    path = _place_of(candidate)
    if not isinstance(path, Path):
        raise PlanError(f"{target}: other engines read local files only; download it, or leave --engine out.")
    return path


@dataclass(frozen=True)
class _Child:
    """A running child process, and the folder that it shares with this one."""

    name: str
    target: Place
    process: subprocess.Popen[bytes]
    folder: Path

    def logits(self, tokens: Numbers) -> Logits:
        """The logits of tokens [batch, time], which stay on disk. Raises what went wrong in the child, or its death."""
        import torch

        np.save(self.folder / TOKENS, tokens)
        self.answer()
        mapped = np.load(self.folder / LOGITS, mmap_mode="r")
        (self.folder / LOGITS).unlink()  # the mapping keeps the bytes for as long as they are used
        return lambda start, stop: torch.from_numpy(np.array(mapped[..., start:stop]))

    def ids(self, text: str) -> list[int]:
        """The ids of a text. Raises what went wrong in the child, or its death."""
        (self.folder / TEXT).write_bytes(text.encode())
        self.answer()
        return [int(number) for number in np.load(self.folder / IDS)]

    def answer(self) -> None:
        """Wait until the child has done what lies in the folder. Raises what went wrong in it, or its death."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # its answer says why it does not listen
            self.process.stdin.write(b"?")
        line = self.process.stdout.readline()
        if not line:
            raise NeoxconvError(f"{self.target}: {self.name} {self.death()}. Leave --engine out to do without it.")
        answer = json.loads(line)
        if answer:
            raise _KINDS.get(answer["kind"], NeoxconvError)(*answer["problems"])

    def death(self) -> str:
        """How the process ended, what that usually means, and the last that it said."""
        code = self.process.wait()
        how = f"died of {_signal_name(-code)}" if code < 0 else f"ended by itself with exit code {code}"
        last = self.last_line()
        parts = (how, _REASONS.get(-code), f"it said last: {last:.200}" if last else None)
        return "; ".join(part for part in parts if part)

    def last_line(self) -> str:
        """The last line that the program printed, of which more than TAIL bytes are not read."""
        with open(self.folder / _SAID, "rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL))
            lines = stream.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _signal_name(number: int) -> str:
    """A signal as people know it: SIGILL."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"

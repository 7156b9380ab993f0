"""What the third level of verification is asked to do, as values; nothing heavy is imported for them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from neoxconv.errors import CheckpointError
from neoxconv.storage import read_bounded


@dataclass(frozen=True)
class Sample:
    """Where tokens are taken from: a text, or a .npy file of ids [batch, time]; with neither, our own text."""

    text: Path | None = None
    tokens: Path | None = None
    length: int = 256  # tokens in a sequence of text
    sequences: int | None = None  # at most; by default all of a file, two of our own text

    @cached_property
    def content(self) -> str:
        """The text as the file has it, line ends and all; read once, as it may come through a pipe.

        Raises CheckpointError where it is none, or too large.
        """
        assert self.text
        data = read_bounded(self.text)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.text}: is not UTF-8 text ({error.reason} at byte {error.start}); give another file."
            ) from error

    @property
    def lines(self) -> str:
        """The text with line ends as Python reads them."""
        return io.StringIO(self.content, newline=None).read()


@dataclass(frozen=True)
class Limits:
    """The limits that were asked for. With None the mean KL has one by the target's type, the others have none."""

    max_kl: float | None = None  # nats, the mean
    max_kl_p99: float | None = None  # nats, the 99th percentile
    min_top1: float | None = None  # a share
    max_ppl_ratio: float | None = None


@dataclass(frozen=True)
class Task:
    """Questions that both sides answer: the task's name, the .jsonl file, and how many are asked at most.

    Before each stand `shots` examples with their answers, which are taken from a file like it.
    """

    name: str
    data: Path
    limit: int | None = None
    shots: int = 0
    shots_data: Path | None = None


@dataclass(frozen=True)
class Engine:
    """What runs the target: our own forward pass, or the program of this name (a key of PROGRAMS) in a Python."""

    name: str = "native"
    python: Path | None = None  # of the program; None: this one

    @property
    def native(self) -> bool:
        return self.name == "native"


NATIVE = Engine()


@dataclass(frozen=True)
class Trial:
    """What both sides are put to, what may come of it, and what is made of it."""

    sample: Sample = Sample()
    limits: Limits = Limits()
    engine: Engine = NATIVE
    device: str = "cpu"  # of the native engine
    bisect: bool = False  # look for the tensor that breaks a layer
    task: Task | None = None
    html: Path | None = None  # a page to write

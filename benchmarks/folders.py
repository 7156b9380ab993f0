"""How far quantized folders are from the F16 folder, in float32 and in the programs that run them.

    python -m benchmarks.folders --source CHECKPOINT --tokens tokens.npy

Mean KL divergence over all positions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.formats import RECIPES, option_of
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.compare import compare_predictions
from neoxconv.verify.logits.trial import Engine

PROGRAMS = {  # MLX's types in float32 alone
    "bnb": "transformers",
    "float8": "transformers",
    "compressed-tensors": "transformers",
    "mlx": "",
    "ctranslate2": "ctranslate2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(PROGRAMS), nargs="*", default=tuple(PROGRAMS))
    given = parser.parse_args()
    tokens = np.load(given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        hf = run(make_plan(open_checkpoint(given.source), Recipe("hf", dtype="F16")), Path(folder) / "hf")
        reference = open_checkpoint(hf)
        print(f"{'':57} {'float32':>10} {'program':>12}")
        for recipe in (recipe for recipe in RECIPES if recipe.format in given.only):
            target = run(make_plan(reference, recipe), Path(folder) / "made", overwrite=True)
            made = open_checkpoint(target)
            means = [compare_predictions(reference, made, tokens).figures.mean]
            if engine := PROGRAMS[recipe.format]:
                with program(Engine(engine), target, made) as ask:
                    logits = ask(tokens)
                as_run = compare_predictions(reference, made, tokens, engine=engine, logits=logits)
                means.append(as_run.figures.mean)
            figures = " ".join(f"{mean:11.7f}" for mean in means)
            print(f"{recipe.format:18} {option_of(recipe):38} {figures}", flush=True)


if __name__ == "__main__":
    main()

"""How far bitsandbytes', float8 and MLX folders are from the F16 folder, in float32 and in transformers.

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
from neoxconv.verify.logits.child import program
from neoxconv.verify.logits.compare import compare_predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    given = parser.parse_args()
    tokens = np.load(given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        hf = run(make_plan(open_checkpoint(given.source), Recipe("hf", dtype="F16")), Path(folder) / "hf")
        reference = open_checkpoint(hf)
        print(f"{'':35} {'float32':>12} {'transformers':>12}")
        for recipe in (recipe for recipe in RECIPES if recipe.format in ("bnb", "float8", "mlx")):
            target = run(make_plan(reference, recipe), Path(folder) / "made", overwrite=True)
            made = open_checkpoint(target)
            means = [compare_predictions(reference, made, tokens).figures.mean]
            if recipe.format != "mlx":  # which transformers does not load
                with program("transformers", target, made) as ask:
                    logits = ask(tokens)
                as_run = compare_predictions(reference, made, tokens, engine="transformers", logits=logits)
                means.append(as_run.figures.mean)
            figures = " ".join(f"{mean:12.6f}" for mean in means)
            print(f"{recipe.format:6} {option_of(recipe):28} {figures}", flush=True)


if __name__ == "__main__":
    main()

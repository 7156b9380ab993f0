"""How far every target's predictions are from the trained model's, rank by rank as it was trained.

    python -m benchmarks.verify_table --source CHECKPOINT [--tokens tokens.npy] [--sequences N] [--only hf]
    make verify-table SOURCE=CHECKPOINT TOKENS=tokens.npy

One row for each target and type: the native engine's figures, and the mean KL divergence by the program that will run
the file, where it is installed. The first rows tell what joining the ranks' norms costs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.formats import RECIPES, option_of
from neoxconv.errors import PlanError
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.compare import compare_predictions
from neoxconv.verify.logits.tokens import tokens_for
from neoxconv.verify.logits.trial import Engine, Sample

ENGINE = {"hf": "transformers", "gguf": "llama.cpp", "bnb": "transformers", "float8": "transformers"}
ROWS = (
    *((Recipe("hf", dtype=dtype), norms) for dtype in ("F32", "F16", "BF16") for norms in ("mean", "fold", "rank0")),
    (Recipe("safetensors", dtype="F16"), "mean"),
    (Recipe("slim"), "mean"),
    (Recipe("slim", tp=1), "mean"),
    *((recipe, "mean") for recipe in RECIPES if recipe.type),
)


def row(source: Path, recipe: Recipe, norms: str, tokens: Any, folder: Path) -> str:
    """Return one line of the table."""
    reference = open_checkpoint(source)
    try:
        target = run(make_plan(open_checkpoint(source, norms=norms), recipe), folder / "target")
    except PlanError as error:
        return f"| {recipe.format} | {norms} | {str(error).splitlines()[0]:.80} |"
    made = open_checkpoint(target)
    found = compare_predictions(reference, made, tokens).figures
    other = ""
    if engine := ENGINE.get(recipe.format):
        try:
            with program(Engine(engine), target, made) as ask:
                logits = ask(tokens)
            mean = compare_predictions(reference, made, tokens, engine=engine, logits=logits).figures.mean
            other = f"{mean:.2e} ({engine})"
        except PlanError:
            other = f"no {engine}"
    kind = option_of(recipe) or (f"TP {recipe.tp}" if recipe.tp else "as stored")
    numbers = f"{found.mean:.2e} | {found.p99:.1e} | {100 * found.top1:.2f} % | {found.perplexity.ratio:.5f}"
    return f"| {recipe.format} {kind} | {norms} | {numbers} | {other} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--only", help="a target's format")
    given = parser.parse_args()
    tokens, text = tokens_for(open_checkpoint(given.source), Sample(tokens=given.tokens, sequences=given.sequences))
    print(f"{given.source}, {len(tokens)} x {tokens.shape[1]} tokens of {text}\n")
    print("| target | norms | mean KL | 99 % | first choice | perplexity ratio | mean KL by |\n|-|-|-|-|-|-|-|")
    for recipe, norms in [row for row in ROWS if given.only in (None, row[0].format)]:
        with tempfile.TemporaryDirectory() as folder:
            print(row(given.source, recipe, norms, tokens, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

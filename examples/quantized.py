"""Make folders with quantized linear layers, load each in transformers, and let it go on from a few tokens.

    python examples/quantized.py CHECKPOINT FOLDER

Needs transformers, bitsandbytes and accelerate (for nf4 and int8), compressed-tensors (for e4m3 and w4a16).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from neoxconv import Recipe, make_plan, open_checkpoint, run

RECIPES = {
    "nf4": Recipe("bnb", type="NF4", double_quant=True),
    "int8": Recipe("bnb", type="INT8"),
    "e4m3": Recipe("float8", type="E4M3", scale="channel"),
    "w4a16": Recipe("compressed-tensors", type="W4A16", group="64"),  # vLLM loads it too
    "e5m2": Recipe("float8", type="E5M2"),  # for storage: transformers widens it
}


def main(source: str, folder: str) -> None:
    """Each folder in turn: what it takes on disk and in memory, and what it says."""
    checkpoint = open_checkpoint(source)
    for name, recipe in RECIPES.items():
        plan = make_plan(checkpoint, recipe)
        target = run(plan, Path(folder) / name)
        model = AutoModelForCausalLM.from_pretrained(target)
        spoken = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=8, do_sample=False)
        print(
            f"{target}: {plan.total:,} bytes on disk, {model.get_memory_footprint():,} in memory, {spoken[0].tolist()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

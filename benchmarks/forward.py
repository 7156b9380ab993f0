"""The streamed forward pass beside transformers with accelerate's disk offload: seconds and peak memory of each.

    python -m benchmarks.forward [--layers 2] [--tokens 512] [--runs 3]

The model has 20B widths. Both sides run in child processes, in turns, from the same Hugging Face folder: load the
model, compute the logits of one sequence. Ours is one side of a verification.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.children import Cost, in_turns, measure, ratios, show
from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.synthetic import Synthetic, write_checkpoint

KEPT = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.rotary_emb", "gpt_neox.emb_dropout", "lm_head")


def ours(folder: str, count: str) -> None:
    """Stream the model of a folder over `count` tokens."""
    import torch

    from neoxconv.verify.logits.stream import multipliers, side

    checkpoint, began = open_checkpoint(folder), time.monotonic()
    with torch.inference_mode(), multipliers() as pool:
        model = side(checkpoint, pool)
        streams = model.embed(ids(count))
        for layer in range(checkpoint.config.layers):
            streams = model.layer(layer, streams)
        normed = model.final(streams)
        rows = checkpoint.config.rows
        total = sum(float(model.logits(normed, at, min(at + 2048, rows)).sum()) for at in range(0, rows, 2048))
    print(f"neoxconv: {time.monotonic() - began:.1f} s, sum of logits {total:.6g}", file=sys.stderr)


def theirs(folder: str, count: str) -> None:
    """Do the same with transformers, its layers offloaded to disk."""
    import torch
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as offload, torch.inference_mode():
        places = {"gpt_neox.layers": "disk"} | dict.fromkeys(KEPT, "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=places, offload_folder=offload
        )
        total = float(model(ids(count), use_cache=False).logits.sum())
    print(f"transformers: {time.monotonic() - began:.1f} s, sum of logits {total:.6g}", file=sys.stderr)


def ids(count: str) -> "torch.Tensor":  # noqa: F821, UP037
    import torch

    return torch.arange(int(count))[None] * 97 % 50000


def child(name: str, folder: Path, count: int) -> Callable[[], Cost]:
    """A run of `ours` or `theirs` in a process of its own."""
    code = f"import sys; from benchmarks.forward import {name}; {name}(*sys.argv[1:])"
    return lambda: measure([sys.executable, "-c", code, str(folder), str(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=50432, context=2048)
        source = write_checkpoint(Path(place) / "source", model)
        folder = run(make_plan(open_checkpoint(source), Recipe("hf")), Path(place) / "hf")
        a, b = in_turns(given.runs, child("ours", folder, given.tokens), child("theirs", folder, given.tokens))
        show("neoxconv, streamed", a)
        show("transformers, disk offload", b)
        print(f"  transformers takes {', '.join(f'{r:.2f}' for r in ratios(a, b))} times as long")


if __name__ == "__main__":
    main()

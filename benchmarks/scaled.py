"""How fast weights are quantized beside bitsandbytes and torch, one thread each: bytes asserted equal, ratios printed.

    python -m benchmarks.scaled [--layers 1] [--runs 3] [--tokenizer FILE]

First, end to end at 20B widths, shards to a folder against transformers, which loads the Hugging Face conversion,
quantizes it with bitsandbytes on the CPU and saves it. Then the encoders on the same rows of float16 in turns.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.children import fresh, in_turns, measure, median, neoxconv, ratios, show
from benchmarks.encoders import in_turns as timed
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, Bytes, Floats
from neoxconv.formats import tokenizer
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.synthetic import Synthetic, write_checkpoint

if TYPE_CHECKING:
    import torch

SHAPE = (1024, 6144)
FLOAT8 = {"F8_E4M3": ("float8_e4m3fn", 448.0), "F8_E5M2": ("float8_e5m2", 57344.0)}
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
settings = {"INT8": dict(load_in_8bit=True), "NF4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "NF4_DQ": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)}[sys.argv[3]]
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float16, device_map="cpu", quantization_config=BitsAndBytesConfig(**settings))
model.save_pretrained(sys.argv[2])
"""


def ours(name: str, weights: torch.Tensor) -> list[bytes]:
    """All bytes of the weights' parts, as a conversion makes them."""
    encoding = SCALED[name]
    rows = ENCODINGS["F16"].decode(weights.numpy())
    sizes = encoding.sizes(rows)
    like = LazyTensor(tuple(weights.shape), F16, lambda start, stop: weights.numpy()[start:stop], F16)
    return [encoding.encode(rows, sizes, F16).tobytes(), *encoding.finish(like, sizes)]


def theirs(name: str, weights: torch.Tensor) -> list[bytes]:
    """The same made by bitsandbytes."""
    from bitsandbytes import functional

    if name == "INT8":
        codes, scales, _ = functional.int8_vectorwise_quant(weights)
        return [codes.numpy().tobytes(), scales.numpy().tobytes(), b"\0"]
    kind, _, double = name.lower().partition("_")
    codes, state = functional.quantize_4bit(weights, quant_type=kind, compress_statistics=bool(double))
    parts = {name: part.numpy().tobytes() for name, part in state.as_dict(packed=True).items()}
    order = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"quant_state.bitsandbytes__{kind}")
    return [codes.numpy().tobytes(), *(parts[part] for part in order if part in parts)]


def line(name: str, tasks: tuple[Callable[[], object], Callable[[], object]], count: int) -> str:
    """Million weights a second of both, and the ratio."""
    mine, other = (count / seconds / 1e6 for seconds in timed(tasks))
    return f"{name:12} {mine:8.0f} {other:8.0f} {mine / other:8.1f}x"


def encoders() -> None:
    """The table of encoders. torch is imported here: a child's peak memory begins with its parent's."""
    import torch

    torch.set_num_threads(1)
    weights = torch.from_numpy((np.random.default_rng(0).standard_normal(SHAPE) * 0.02).astype(np.float16))
    print("\nmillion weights a second, one thread, all bytes equal")
    print(f"{'':12} {'ours':>8} {'theirs':>8} {'ratio':>9}")
    for name in ("NF4", "NF4_DQ", "FP4", "FP4_DQ", "INT8"):
        assert ours(name, weights) == theirs(name, weights), f"{name}: the bytes differ from bitsandbytes'"
        tasks = (lambda name=name: ours(name, weights), lambda name=name: theirs(name, weights))  # type: ignore[misc]
        print(line(name, tasks, weights.numel()), flush=True)
    rows = weights.float()
    for name, (dtype, largest) in FLOAT8.items():
        encode, kind = ENCODINGS[name].encode, getattr(torch, dtype)

        def mine(encode: Callable[[Floats], Any] = encode) -> Bytes:
            return np.asarray(encode(rows.numpy()))

        def other(dtype: torch.dtype = kind, largest: float = largest) -> torch.Tensor:
            return rows.clamp(-largest, largest).to(dtype)

        assert np.array_equal(mine(), other().view(torch.uint8).numpy()), f"{name}: the bytes differ from torch's"
        print(line(name, (mine, other), weights.numel()), flush=True)


def conversions(given: argparse.Namespace, folder: Path) -> None:
    """Shards to folders, against transformers from the Hugging Face conversion."""
    words = tokenizer.load(given.tokenizer) if given.tokenizer else None
    model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=50432, tp=2, pp=1, context=2048)
    source, hf, mine, other = (folder / name for name in ("source", "hf", "ours", "theirs"))
    write_checkpoint(source, model, tokenizer=words)
    measure(neoxconv("convert", str(source), str(hf), "--to", "hf", "--quiet"))
    for name in ("NF4", "NF4_DQ", "INT8"):
        kind, _, double = name.partition("_")
        options = ["--to", "bnb", "--type", kind, "--jobs", "2", "--quiet", *(["--double-quant"] if double else [])]
        command = [sys.executable, "-c", TRANSFORMERS, str(hf), str(other), name, "2"]
        measure(fresh(mine, neoxconv("convert", str(source), str(mine), *options)))  # kernels are compiled
        a, b = in_turns(
            given.runs,
            lambda options=options: measure(fresh(mine, neoxconv("convert", str(source), str(mine), *options))),
            lambda command=command: measure(fresh(other, command)),
        )
        print(f"\nshards to bitsandbytes {name}, against transformers from the Hugging Face folder, two threads")
        show("neoxconv", a)
        show("transformers", b)
        print(f"  {median(ratios(a, b)):.1f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-"))
    try:
        conversions(given, folder)
    finally:
        shutil.rmtree(folder)
    encoders()


if __name__ == "__main__":
    main()

"""Peak memory of converting shards of 20B widths to each format, at several depths, with the default options.

    python -m benchmarks.memory [--layers 2 4] [--only REGEX] [--tokenizer FILE] [--limit 1GiB] [--jobs 8]

The checkpoints are sparse (zeros that take no room), which changes nothing of what a conversion holds in memory. With
--limit the operating system gives no process more (RLIMIT_DATA): a conversion that needed more would fail. All 44
layers of the 20B take up to 41 GB of disk for a 16-bit target, 82 GB for F32.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import tempfile
from pathlib import Path

from benchmarks.children import measure, neoxconv
from neoxconv.cli.values import byte_count
from neoxconv.formats import tokenizer
from neoxconv.synthetic import Synthetic, write_checkpoint

TARGETS = (
    ("hf", ["--to", "hf"]),
    ("hf, folded", ["--to", "hf", "--norms", "fold"]),
    ("safetensors f32", ["--to", "safetensors", "--dtype", "F32"]),
    ("slim", ["--to", "slim"]),
    ("slim, TP 1", ["--to", "slim", "--tp", "1"]),
    ("gguf F16", ["--to", "gguf", "--type", "F16"]),
    ("gguf Q8_0", ["--to", "gguf", "--type", "Q8_0"]),
    ("gguf Q4_0", ["--to", "gguf", "--type", "Q4_0"]),
    ("gguf Q5_1, folded", ["--to", "gguf", "--type", "Q5_1", "--norms", "fold"]),
    ("gguf Q4_K_M", ["--to", "gguf", "--type", "Q4_K_M"]),
    ("bnb NF4, double", ["--to", "bnb", "--type", "NF4", "--double-quant"]),
    ("bnb INT8", ["--to", "bnb", "--type", "INT8"]),
    ("float8", ["--to", "float8"]),
    ("ctranslate2", ["--to", "ctranslate2"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="the targets whose name holds this")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--limit", type=byte_count)
    parser.add_argument("--jobs", type=int)
    given = parser.parse_args()
    if given.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (given.limit, given.limit))
    jobs = ["--jobs", str(given.jobs)] if given.jobs else []
    words = tokenizer.load(given.tokenizer) if given.tokenizer else None
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-"))
    try:
        for count in given.layers:
            model = Synthetic(layers=count, hidden=6144, heads=64, rows=50432, tp=2, pp=1, context=2048)
            write_checkpoint(folder / str(count), model, tokenizer=words, sparse=True)
        print(f"{'layers':22}", *(f"{count:9}" for count in given.layers), "  (peak memory in MB; goal: 600, equal)")
        for name, options in filter(lambda target: given.only.search(target[0]), TARGETS):
            peaks = [peak(folder, count, [*options, *jobs]) / 1e6 for count in given.layers]
            print(f"{name:22}", *(f"{used:9.0f}" for used in peaks), flush=True)
    finally:
        shutil.rmtree(folder)


def peak(folder: Path, layers: int, options: list[str]) -> int:
    """Peak resident bytes of one conversion."""
    target = folder / "target"
    cost = measure(neoxconv("convert", str(folder / str(layers)), str(target), *options, "--quiet", "--overwrite"))
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return cost.peak


if __name__ == "__main__":
    main()

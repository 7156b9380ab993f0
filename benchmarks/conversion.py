"""Shards of 20B widths to Hugging Face against `cp`, and to GGUF against llama.cpp's quantizer: ratios from one run.

    python -m benchmarks.conversion [--layers 4] [--runs 3] [--threads 2] [--folder /tmp/...] [--tokenizer FILE]

Both sides of each pair run in turns as child processes, with their output on disk (synced) at the end of the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.children import Cost, in_turns, measure, median, neoxconv, ratios, show
from neoxconv.formats import tokenizer
from neoxconv.synthetic import Synthetic, write_checkpoint

SYNC = "import os,sys,pathlib\nfor p in pathlib.Path(sys.argv[1]).rglob('*'): os.fsync(os.open(p, os.O_RDONLY))"
COPY = f"import subprocess,sys; subprocess.run(['cp','-r',*sys.argv[1:]],check=True); sys.argv.pop(1)\n{SYNC}"
QUANTIZE = """
import llama_cpp as l, os, sys
p = l.llama_model_quantize_default_params()
p.ftype, p.nthread = int(sys.argv[3]), int(sys.argv[4])
assert l.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), p) == 0
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
"""
FTYPES = {"Q8_0": (7, 3), "Q4_K_M": (15, 4)}  # llama.cpp's number, and how many times faster we want to be


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="neoxconv-bench-"))
    try:
        compare(given, folder)
    finally:
        if not given.folder:
            shutil.rmtree(folder)


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Make the checkpoint, then print both comparisons."""
    source = prepare(given, folder)
    threads = ["--jobs", str(given.threads)]
    began = time.monotonic()
    warm, options = folder / "warm.gguf", ["--to", "gguf", "--type", "Q4_K_M", "--quiet"]
    measure(fresh(warm, neoxconv("convert", str(folder / "small"), str(warm), *options)))
    print(
        f"kernels loaded, or compiled where they were not yet, in {time.monotonic() - began:.1f} s (not counted below)"
    )

    def to_hf() -> Cost:
        return measure(fresh(folder / "hf", neoxconv("convert", source, str(folder / "hf"), "--to", "hf", *threads)))

    def copy() -> Cost:
        arguments = [str(folder / "hf"), str(folder / "copy")]
        return measure(fresh(folder / "copy", [sys.executable, "-c", COPY, *arguments]))

    ours, theirs = in_turns(given.runs, to_hf, copy)
    print("\nshards to Hugging Face fp16, against cp -r of the result (both synced)")
    show("neoxconv --to hf", ours)
    show("cp", theirs)
    print(f"  {1 / median(ratios(ours, theirs)):.2f} times as long as cp (goal: 1.25 at most)")
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "copy")
    if importlib.util.find_spec("llama_cpp") is None:
        print("\nllama-cpp-python is not installed, so there is nothing to compare GGUF with; run `make oracles`")
        return
    for mix in FTYPES:
        against_llama(given, folder, source, mix)


def against_llama(given: argparse.Namespace, folder: Path, source: str, mix: str) -> None:
    """Shards to a mix, against llama.cpp's quantizer from an F16 file that we made for it."""
    f16, mine, other = (folder / name for name in ("f16.gguf", "ours.gguf", "theirs.gguf"))
    if not f16.exists():
        measure(neoxconv("convert", source, str(f16), "--to", "gguf", "--type", "F16", "--quiet"))
    options = ["--to", "gguf", "--type", mix, "--jobs", str(given.threads), "--quiet"]
    quantize = [sys.executable, "-c", QUANTIZE, str(f16), str(other), str(FTYPES[mix][0]), str(given.threads)]
    ours, theirs = in_turns(
        given.runs,
        lambda: measure(fresh(mine, neoxconv("convert", source, str(mine), *options))),
        lambda: measure(fresh(other, quantize)),
    )
    print(f"\nshards to GGUF {mix}, against llama_model_quantize from F16 with {given.threads} threads")
    show(f"neoxconv --to gguf --type {mix}", ours)
    show("llama_model_quantize", theirs)
    print(f"  {median(ratios(ours, theirs)):.1f} times faster (goal: {FTYPES[mix][1]} at least)")


def prepare(given: argparse.Namespace, folder: Path) -> str:
    """A checkpoint of 20B widths, and a small one to load the kernels with."""
    folder.mkdir(exist_ok=True)
    words = tokenizer.load(given.tokenizer) if given.tokenizer else None
    model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=50432, tp=2, pp=1, context=2048)
    for name, shape in (("large", model), ("small", Synthetic(hidden=256))):
        if not (folder / name).exists():
            write_checkpoint(folder / name, shape, tokenizer=words if name == "large" else None)
    os.sync()  # else the first timed run shares the disk with the checkpoint's own bytes
    return str(folder / "large")


def fresh(target: Path, command: list[str]) -> list[str]:
    """The command, once its target is out of the way."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.with_name(f"{target.name}.manifest.json").unlink(missing_ok=True)
    return command


if __name__ == "__main__":
    main()

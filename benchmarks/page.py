"""One page: every job beside its peer, and beside what this machine could do at best; ratios from one run.

    python -m benchmarks.page [--layers 2] [--runs 3] [--threads 2] [--folder DIR] [--only REGEX]

The source is a checkpoint of 20B's widths, TP 2. A job and its peer run in turns as child processes, their output on
disk (synced) at the end of the clock. `wall` and `cpu` are the peer's time over ours, medians of the runs. `of the
limit` is the share of our wall time that the limit alone would take, measured in this run:

    disk        the bytes written, as fast as one file is written and synced
    memory      the bytes read and written, as fast as all threads copy
    multiply    the products of a forward pass, as fast as torch multiplies such matrices in float32
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks import forward
from benchmarks.children import Cost, fresh, in_turns, measure, median, neoxconv
from neoxconv.synthetic import Synthetic, write_checkpoint

SYNC = "import os,sys,pathlib\nfor p in pathlib.Path(sys.argv[1]).rglob('*'): os.fsync(os.open(p, os.O_RDONLY))"
COPY = f"import subprocess,sys; subprocess.run(['cp','-r',*sys.argv[1:]],check=True); sys.argv.pop(1)\n{SYNC}"
QUANTIZE = """
import llama_cpp as l, os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
p = l.llama_model_quantize_default_params()
p.ftype, p.nthread = int(sys.argv[3]), int(sys.argv[4])
assert l.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), p) == 0
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
"""
FTYPES = {"Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}  # llama.cpp's numbers
TOKENS = 512
GIB = 1 << 30


@dataclass(frozen=True)
class Job:
    """What is done by us and by a peer; `limit` names what binds it, and the seconds that this alone would take."""

    name: str
    peer: str
    ours: Callable[[], Cost]
    theirs: Callable[[], Cost]
    limit: Callable[[], tuple[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="the jobs whose name holds this")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-", dir=given.folder))
    try:
        print(f"{'':34}{'beside':38}{'wall':>6}{'cpu':>6}{'peak MB':>14}   of the limit")
        for job in jobs(given, folder):
            if given.only.search(job.name):
                print(row(job, given.runs), flush=True)
    finally:
        shutil.rmtree(folder)


def row(job: Job, runs: int) -> str:
    """A job's line: once beforehand, which compiles kernels and fills the page cache, then in turns."""
    job.theirs(), job.ours()  # a conversion makes what a check reads
    ours, theirs = in_turns(runs, job.ours, job.theirs)
    wall = median([b.wall / a.wall for a, b in zip(ours, theirs, strict=True)])
    cpu = median([b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)])
    peaks = "/".join(f"{max(cost.peak for cost in costs) / 1e6:.0f}" for costs in (ours, theirs))
    name, seconds = job.limit()
    share = seconds / median([cost.wall for cost in ours])
    return f"{job.name:34}{job.peer:38}{wall:6.2f}{cpu:6.2f}{peaks:>14}   {share:.2f} {name}"


def jobs(given: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """Every job, its files made when its turn comes."""
    model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=50432, tp=2, pp=1, context=2048)
    source = write_checkpoint(folder / "source", model)
    threads, hf = ("--jobs", str(given.threads)), folder / "hf"
    os.sync()  # else the first timed run shares the disk with the checkpoint's own bytes

    def convert(target: Path, *options: str, origin: Path = source) -> Callable[[], Cost]:
        words = neoxconv("convert", str(origin), str(target), *options, *threads, "--quiet")
        return lambda: measure(fresh(target, words))

    to_hf, to_gguf = ("--to", "hf"), ("--to", "gguf", "--type")
    convert(hf, *to_hf)()
    size = sum(path.stat().st_size for path in hf.rglob("*"))
    copy = [sys.executable, "-c", COPY, str(hf), str(folder / "copy")]
    yield Job(
        "shards to hf F16",
        "cp -r of the result",
        convert(folder / "hf2", *to_hf),
        lambda: measure(fresh(folder / "copy", copy)),
        lambda: ("disk", size / alone(disk, folder)),
    )
    f16, theirs = folder / "f16.gguf", folder / "theirs.gguf"
    convert(f16, *to_gguf, "F16")()
    for mix, number in FTYPES.items() if importlib.util.find_spec("llama_cpp") else ():
        made = folder / f"{mix}.gguf"
        quantize = [sys.executable, "-c", QUANTIZE, str(f16), str(theirs), str(number), str(given.threads)]
        yield Job(
            f"shards to GGUF {mix}",
            "llama_model_quantize from F16",
            convert(made, *to_gguf, mix),
            lambda quantize=quantize: measure(fresh(theirs, quantize)),  # type: ignore[misc]
            lambda made=made: ("memory", (size + made.stat().st_size) / alone(memory, given.threads)),  # type: ignore[misc]
        )
    for words in (to_hf, (*to_gguf, "Q8_0"), (*to_gguf, "Q4_K_M"), ("--to", "bnb", "--type", "NF4")):
        made = folder / f"checked-{words[-1]}"
        name = " ".join(word for word in words if not word.startswith("--"))
        check = neoxconv("verify", str(source), str(made), *threads, "--level", "weights", "--quiet")
        limit = lambda: ("memory", 2 * size / alone(memory, given.threads))  # noqa: E731
        plain = convert(made, *words)
        yield Job(f"{name}: bytes and weights", "the conversion", lambda c=check: measure(c), plain, limit)  # type: ignore[misc]
        yield Job(f"{name}: convert --verify", "the conversion", convert(made, *words, "--verify"), plain, limit)
    products = forward_products(model)
    yield Job(
        f"logits of {TOKENS} tokens, one side",
        "transformers, offloaded to disk",
        forward.child("ours", hf, TOKENS),
        forward.child("theirs", hf, TOKENS),
        lambda: ("multiply", products / alone(multiply, given.threads)),
    )


def forward_products(model: Synthetic) -> float:
    """Multiply-adds of a forward pass: the matrices of every layer and the head."""
    return TOKENS * model.hidden * (12.0 * model.layers * model.hidden + model.rows)


def alone(rate: Callable[..., float], *given: object) -> float:
    """A rate measured in a process of its own: what this one holds would count as its children's peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(rate, *given).result()


def disk(folder: Path) -> float:
    """Bytes a second of one file that is written and synced."""
    path, data, began = folder / "disk", memoryview(bytes(8 << 20)), time.monotonic()
    with open(path, "wb") as stream:
        for _ in range(GIB // len(data)):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.unlink()
    return GIB / (time.monotonic() - began)


def memory(threads: int) -> float:
    """Bytes a second that all threads read and write when they copy."""
    arrays = [np.ones((2, 64 << 20), np.uint8) for _ in range(threads)]

    def copy(array: np.ndarray) -> None:
        for _ in range(10):
            np.copyto(array[0], array[1])

    with ThreadPoolExecutor(threads) as pool:
        began = time.monotonic()
        list(pool.map(copy, arrays))
    return threads * 10 * 2 * (64 << 20) / (time.monotonic() - began)


def multiply(threads: int) -> float:
    """Multiply-adds a second of torch, float32, in the shape of a layer's largest matrix."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.ones(TOKENS, 6144), torch.ones(6144, 24576)
    left @ right
    began = time.monotonic()
    for _ in range(3):
        left @ right
    return 3 * TOKENS * 6144.0 * 24576 / (time.monotonic() - began)


if __name__ == "__main__":
    main()

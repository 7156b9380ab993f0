"""How fast the encoders are beside ggml's own, on one thread, and how large their errors.

    python -m benchmarks.encoders [CHECKPOINT]

The simple blocks' bytes are ggml's. Of super-blocks the errors' ratios are printed, ours over ggml's: with each
weight's error weighted as ggml's encoder does without an importance matrix / plain, on normal, Laplace and Student (3)
weights and, where one is given, on all of a trained checkpoint's. Then the same with an importance matrix, by it; there
IQ1, IQ2 and IQ3 too, and MXFP4 and NVFP4, whose encoders in ggml pass over a matrix. Both encode the same rows in
turns, and processor time is measured, so that a busy machine slows both alike; the medians' ratio is what to compare
between machines. ggml comes with llama-cpp-python (`make oracles`, or pip install llama-cpp-python); without it only
our own speed is printed.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from neoxconv.core.encoding import Context
from neoxconv.dtypes import Floats
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml.searches import SEARCHES
from tests.golden.make_blocks import NAMES as SIMPLE
from tests.golden.make_blocks import ggml, ggml_encode
from tests.superblocks import NAMES as SUPER
from tests.superblocks import SPREAD, columns, errors, trained, weighted, weights

ROUNDS = 7
SHAPE = (341, 6144)  # a slab of 8 MiB
SLOW = [name for name in SPREAD if name not in SEARCHES]  # codebooks and 4-bit floating point


def seconds(task: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    task()
    return time.process_time() - start


def in_turns(tasks: Sequence[Callable[[], object]]) -> list[float]:
    """Return the median time of each task; every round runs all of them."""
    rounds = [[seconds(task) for task in tasks] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def compare(name: str, rows: Floats) -> str:
    """Return one line of the table: million weights a second for us and for ggml, the ratio, compile time, errors."""
    encoding, library = ENCODINGS[name], ggml()
    compiling = seconds(lambda: encoding.encode(rows[:1]))
    tasks: list[Callable[[], object]] = [lambda: encoding.encode(rows), lambda: encoding.decode(stored)]
    stored, errors = encoding.encode(rows), ""
    if library:
        if name in SIMPLE:
            assert np.array_equal(stored, ggml_encode(library, name, rows)), f"{name}: the bytes differ from ggml's"
        else:
            errors = "  ".join(error_ratios(name, rows) for rows in samples())
        tasks.append(lambda: ggml_encode(library, name, rows))
    ours, decoding, *theirs = (rows.size / time / 1e6 for time in in_turns(tasks))
    other = f"{theirs[0]:8.0f} {ours / theirs[0]:8.1f}x" if theirs else f"{'absent':>8} {'':>9}"
    return f"{name:6} {ours:8.0f} {other} {decoding:8.0f} {compiling:10.2f}  {errors}"


def samples() -> list[Floats]:
    """Weights of each kind, and those of the checkpoint that was given."""
    made = [weights(kind, 1 << 19) for kind in ("gauss", "laplace", "student")]
    return [*made, *(trained(Path(path)) for path in sys.argv[1:])]


def error_ratios(name: str, rows: Floats) -> str:
    """Return our error over ggml's, weighted / plain."""
    library = ggml()
    assert library
    ours = errors(ENCODINGS[name], rows, ENCODINGS[name].encode(rows))
    theirs = errors(ENCODINGS[name], rows, ggml_encode(library, name, rows))
    return f"{ours[0] / theirs[0]:.4f}/{ours[1] / theirs[1]:.4f}"


def by_importance(name: str, rows: Floats) -> str:
    """Return one line of the second table: speed with an importance matrix beside ggml's, and the errors by it."""
    library, encoding = ggml(), ENCODINGS[name]
    assert library and encoding.search
    importance = np.exp(np.random.default_rng(1).standard_normal(rows.shape[1])).astype(np.float32)
    tasks = (lambda: encoding.search(rows, Context(importance)), lambda: ggml_encode(library, name, rows, importance))
    ours, theirs = (rows.size / time / 1e6 for time in in_turns(tasks))
    ratios = []
    for kind in ("gauss", "laplace", "student"):
        sample, usual = weights(kind, 1 << 19), columns("usual")
        values = encoding.decode(encoding.search(sample, Context(usual)))
        others = encoding.decode(ggml_encode(library, name, sample, usual))
        ratios.append((weighted(name, sample, usual, values) / weighted(name, sample, usual, others)) ** 0.5)
    return f"{name:6} {ours:8.0f} {theirs:8.0f} {ours / theirs:8.1f}x  {'  '.join(f'{r:.4f}' for r in ratios)}"


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache  # read when numba is imported: every kernel is compiled anew
        rows = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
        ENCODINGS["F16"].encode(rows[:1])
        print("million weights a second, one thread; compiling in seconds, once per machine; errors over ggml's")
        print(f"{'':6} {'encode':>8} {'ggml':>8} {'ratio':>9} {'decode':>8} {'compiling':>10}  errors")
        for name in (*SIMPLE, *SUPER):
            print(compare(name, rows), flush=True)
        if ggml():
            print("\nwith an importance matrix (log-normal): the same, errors by it")
            for name in SEARCHES:
                print(by_importance(name, rows[:85]), flush=True)
            for name in SLOW:  # in ggml
                print(by_importance(name, rows[:17]), flush=True)
        else:
            print("ggml is absent: run `make oracles`, or pip install llama-cpp-python")


if __name__ == "__main__":
    main()

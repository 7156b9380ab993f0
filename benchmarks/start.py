"""What a first run costs: the demo's model converted and verified before any kernel is compiled, and once more after.

    python -m benchmarks.start [--runs 3] [TYPE ...]

Each type begins with an empty cache of kernels. Processor time is what to compare on a busy machine. The ratios are
those of one run, cold over warm, so they hardly depend on the machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.children import Cost, fresh, measure, median, neoxconv, show
from neoxconv.synthetic import Synthetic, write_checkpoint

MODEL = Synthetic(layers=8, hidden=256, heads=8, rows=1024, tp=2, pp=4, context=512)  # the demo's

FORMATS = {
    **dict.fromkeys(("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "Q2_K", "IQ4_XS"), "gguf"),
    **dict.fromkeys(("NF4", "INT8"), "bnb"),
    "E4M3": "float8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", default=list(FORMATS), metavar="TYPE")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "source", MODEL)
        for kind in given.types:
            compare(folder, kind, given.runs)


def compare(folder: Path, kind: str, runs: int) -> None:
    """Print both commands for one type, cold and warm."""
    source, target = str(folder / "source"), folder / "target"
    convert = neoxconv("convert", source, str(target), "--to", FORMATS[kind], "--type", kind, "--quiet")
    verify = neoxconv("verify", source, str(target), "--quiet")
    costs: dict[str, list[Cost]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            os.environ["NUMBA_CACHE_DIR"] = cache
            for state in ("cold", "warm"):
                costs.setdefault(f"convert, {state}", []).append(measure(fresh(target, convert)))
            for state in ("cold", "warm"):
                costs.setdefault(f"verify after it, {state}", []).append(measure(verify))
    print(kind)
    for title, found in costs.items():
        show(title, found)
    for command in ("convert", "verify after it"):
        pairs = zip(costs[f"{command}, cold"], costs[f"{command}, warm"], strict=True)
        print(
            f"  {command}: cold {median([cold.cpu / warm.cpu for cold, warm in pairs]):.1f} times warm's cpu",
            flush=True,
        )


if __name__ == "__main__":
    main()

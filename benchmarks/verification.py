"""What `verify` costs beside the conversion that it checks: processor time for every target and type, ratios only.

    python -m benchmarks.verification [--layers 1] [--rows 4096] [--runs 3] [--only REGEX] [--folder DIR]

Layers of 20B widths with a small vocabulary are converted, then compared with their source, in turns, by one thread of
one process. All are run once beforehand, which compiles the kernels and fills the page cache. The first number is the
weights level over the conversion, the second what `verify` does by default: the bytes level, then that one. The third
is a conversion with --verify, which decodes what it encodes in the same pass, over the conversion alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes, verify_weights
from neoxconv.cli.formats import RECIPES, option_of
from neoxconv.engine.manifest import read_manifest
from neoxconv.storage import watched
from neoxconv.synthetic import Synthetic, write_checkpoint
from neoxconv.verify.bytes import Seen

ROWS = (
    *(Recipe("hf", dtype=dtype) for dtype in ("F16", "BF16", "F32")),
    Recipe("slim"),
    Recipe("slim", tp=1),
    *(recipe for recipe in RECIPES if recipe.type),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096, help="of the vocabulary")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="the targets whose name holds this")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-", dir=given.folder))
    try:
        model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=given.rows, tp=2, pp=1, context=2048)
        source = write_checkpoint(folder / "source", model)
        print(f"{'over the conversion':28}{'weights':>9}{'both':>9}{'--verify':>10}   (processor time)")
        for name, recipe in ((name_of(recipe), recipe) for recipe in ROWS):
            if given.only.search(name):
                weights, both, at_once = ratios(source, recipe, folder / "target", given.runs)
                print(f"{name:28}{weights:9.2f}{both:9.2f}{at_once:10.2f}", flush=True)
    finally:
        shutil.rmtree(folder)


def name_of(recipe: Recipe) -> str:
    """A target and its type."""
    return f"{recipe.format} {option_of(recipe) or recipe.dtype or (f'--tp {recipe.tp}' if recipe.tp else '')}"


def ratios(source: Path, recipe: Recipe, target: Path, runs: int) -> tuple[float, ...]:
    """The weights level, it with the bytes level, and a conversion with --verify, over the conversion.

    They are medians of the runs, the first left out.
    """

    def convert(verify: bool = False) -> None:
        remove(target)
        run(make_plan(open_checkpoint(source), recipe), target, jobs=1, verify=verify)

    def compare() -> None:
        assert verify_weights(open_checkpoint(source), open_checkpoint(target), jobs=1).passed

    def compare_and_hash() -> None:
        seen = Seen(target, read_manifest(target) or {})
        with watched(seen):
            made = open_checkpoint(target)
        assert verify_weights(open_checkpoint(source), made, jobs=1).passed
        assert verify_bytes(target, seen=seen, jobs=1).passed

    found = []
    for _ in range(1 + runs):
        alone, *others = map(seconds, (convert, partial(convert, True), compare, compare_and_hash))
        at_once, weights, both = (other / alone for other in others)
        found.append((weights, both, at_once))
    remove(target)
    return tuple(statistics.median(column) for column in zip(*found[1:], strict=True))


def seconds(task: Callable[[], None]) -> float:
    """The processor time of one call."""
    begin = time.process_time()
    task()
    return time.process_time() - begin


def remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    target.with_name(f"{target.name}.manifest.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

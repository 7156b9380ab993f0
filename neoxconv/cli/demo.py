"""The demo: a small checkpoint made here, converted to every format, each verified, in one table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neoxconv.core.model import Checkpoint
from neoxconv.engine.plan import make_plan
from neoxconv.engine.run import run
from neoxconv.errors import PlanError, escaped
from neoxconv.sources.checkpoint import open_checkpoint
from neoxconv.synthetic import Synthetic, write_checkpoint
from neoxconv.targets.recipe import Recipe
from neoxconv.verify.bytes import verify_bytes
from neoxconv.verify.weights import verify_weights
from neoxconv.words import shell, size, table

_MODEL = Synthetic(layers=8, hidden=256, heads=8, rows=1024, tp=2, pp=4, context=512)
TARGETS = (
    #  name             recipe                        how ranks' norms are joined
    ("hf",              Recipe("hf"),                 "mean"),
    ("hf-folded",       Recipe("hf"),                 "fold"),
    ("f32.safetensors", Recipe("safetensors", dtype="F32"), "mean"),
    ("slim",            Recipe("slim"),               "mean"),
    ("slim-tp1",        Recipe("slim", tp=1),         "mean"),
    ("F16.gguf",        Recipe("gguf", type="F16"),   "mean"),
    ("Q8_0.gguf",       Recipe("gguf", type="Q8_0"),  "mean"),
    ("Q4_K_M.gguf",     Recipe("gguf", type="Q4_K_M"), "mean"),
    ("Q4_0.gguf",       Recipe("gguf", type="Q4_0"),  "mean"),
    ("nf4",             Recipe("bnb", type="NF4", double_quant=True), "mean"),
    ("int8",            Recipe("bnb", type="INT8"),   "mean"),
    ("e4m3",            Recipe("float8"),             "mean"),
    ("w4a16",           Recipe("compressed-tensors"), "mean"),
    ("mlx-4bit",        Recipe("mlx"),                "mean"),
    ("ct2-int8",        Recipe("ctranslate2"),        "mean"),
)  # fmt: skip
_HEADER = ("target", "size", "bits/weight", "convert", "verify", "largest relative error", "verdict")


@dataclass(frozen=True)
class _Outcome:
    """One line of the table; times in seconds, the error as the worst tensor's RMS error over its RMS."""

    name: str
    nbytes: int
    bits: float
    convert: float
    verify: float
    error: float
    passed: bool

    @property
    def row(self) -> tuple[str, ...]:
        verdict = "ok" if self.passed else "WRONG"
        times = f"{self.convert:.2f} s", f"{self.verify:.2f} s"
        return (self.name, size(self.nbytes), f"{self.bits:.2f}", *times, f"{self.error:.2g}", verdict)


def run_demo(folder: Path, report: Callable[[str], None]) -> bool:
    """Make everything in `folder`, tell of it through `report`, and return whether all of it verified.

    Raises PlanError where the folder exists already and is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise PlanError(f"{folder}: exists already; remove it, or name another folder.")
    source = folder / "checkpoint"
    write_checkpoint(source, _MODEL)
    checkpoint = open_checkpoint(source)
    shape = f"{_MODEL.layers} layers, hidden {_MODEL.hidden}, TP {_MODEL.tp} x PP {_MODEL.pp}"
    report(f"{escaped(source)}: a gpt-neox checkpoint of {checkpoint.parameters:,} random parameters ({shape})")
    outcomes = [_one_target(source, folder / name, recipe, norms) for name, recipe, norms in TARGETS]
    report(table("<>>>>><", [_HEADER, *(outcome.row for outcome in outcomes)]))
    passed = all(outcome.passed for outcome in outcomes)
    report("every byte and every weight is as it should be" if passed else "something is wrong: see the table")
    report(f"all of it is in {escaped(folder)}; to remove it: {shell(['rm', '-r', str(folder)])}")
    return passed


def _one_target(source: Path, target: Path, recipe: Recipe, norms: str) -> _Outcome:
    """Convert and verify."""
    began = time.monotonic()
    checkpoint: Checkpoint = open_checkpoint(source, norms=norms)
    plan = make_plan(checkpoint, recipe)
    run(plan, target)
    converted = time.monotonic()
    written, weights = verify_bytes(target), verify_weights(checkpoint, open_checkpoint(target))
    ended = time.monotonic()
    bits = 8 * sum(step.nbytes for step in plan.steps) / checkpoint.parameters
    times = converted - began, ended - converted
    return _Outcome(target.name, plan.total, bits, *times, weights.relative, written.passed and weights.passed)

"""Memory: a conversion of 20B widths stays within what its plan announces, whatever the threads.

A quarter of the vocabulary, to be quick; all of it, and all layers: `python -m benchmarks.memory`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neoxconv.synthetic import Synthetic, write_checkpoint

WIDE = Synthetic(layers=1, hidden=6144, heads=64, rows=12800, tp=2, pp=1, context=2048)
COMMAND = (sys.executable, "-m", "neoxconv", "convert")
WATCH = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
subprocess.check_call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
UNIT = 1 if sys.platform == "darwin" else 1024


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "source", WIDE, sparse=True)


def peak(command: list[str]) -> int:
    """Peak resident bytes of a command that must succeed in 1 GiB; a small process runs it, as a peak begins so."""
    report = subprocess.check_output([sys.executable, "-c", WATCH, *command], text=True)
    return int(report) * UNIT


def test_a_conversion_keeps_what_its_plan_announces(source: Path, tmp_path: Path) -> None:
    """Folded, with eight jobs that must share 240 MiB. Twice: compiling takes memory, once a machine."""
    limits = ("--norms", "fold", "--jobs", "8", "--memory", "240MiB")
    options = [str(source), str(tmp_path / "x.gguf"), "--to", "gguf", "--type", "Q4_0", *limits]
    plan = json.loads(subprocess.check_output([*COMMAND, *options, "--dry-run", "--json"]))
    subprocess.check_call([*COMMAND, *options, "--quiet"])
    used = peak([*COMMAND, *options, "--quiet", "--overwrite"])
    assert used <= plan["peak_memory"] <= 600e6

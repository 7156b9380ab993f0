"""Processors: which tests need an x86 one, and how a child process does without what makes this one special."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from numpy._core import _multiarray_umath as numpy_core

X86 = platform.machine().lower() in ("x86_64", "amd64")
BEYOND_BASELINE = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name)]
# A child's environment: numba compiles for a plain processor and numpy uses no vector units beyond those it must have.
# The names are this numpy's own (AVX2 became X86_V3 in 2.4): those that it or the processor lacks would be ignored.
PLAIN = {
    "NPY_DISABLE_CPU_FEATURES": " ".join(BEYOND_BASELINE),
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
    "NUMBA_DISABLE_CACHING": "1",
}

_ROOT = Path(__file__).parents[1]


def printed(code: str, environment: Mapping[str, str] = PLAIN) -> str:
    """What Python code prints in a child process, by default one of a plain processor."""
    others = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=others, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def needs_x86() -> None:
    """Skip a test of numbers that depend on the order in which torch adds up."""
    if not X86:
        pytest.skip(f"torch adds up in another order on {platform.machine()} than on an x86 processor")


def has_avx2() -> bool:
    """Whether torch multiplies and adds in one rounding, as it does with AVX2: its `linspace`, of which bitsandbytes
    makes the table of double quantization, has other last bits without."""
    import torch

    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def needs_avx2() -> None:
    """Skip a test of double quantization's bytes."""
    if not has_avx2():
        pytest.skip("bitsandbytes' table of double quantization has other last bits where torch has no AVX2")

"""Processors: which tests need an x86 one, and how a child process does without what makes this one special."""

from __future__ import annotations

import platform

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


def needs_x86() -> None:
    """Skip a test of bytes that depend on the order in which torch adds up."""
    if not X86:
        pytest.skip(f"torch adds up in another order on {platform.machine()} than on an x86 processor")

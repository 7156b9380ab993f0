"""Weights of every kind for the encodings whose bytes are ggml's, and gguf as their oracle."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from neoxconv.dtypes import Floats
from neoxconv.quant import ENCODINGS
from tests.golden.make_blocks import NAMES

quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
kinds = pytest.importorskip("gguf", reason="gguf is not installed").GGMLQuantizationType
PACKED = [ENCODINGS[name] for name in NAMES]  # equal to ggml's; super-blocks have tests of their own
FLOAT8 = [encoding for encoding in ENCODINGS.values() if encoding.limit < np.inf]  # torch is their oracle
EVERY = [e for e in ENCODINGS.values() if (e.dtype.block == 1 or e in PACKED) and e not in FLOAT8]
every = pytest.mark.parametrize("encoding", EVERY, ids=lambda e: e.name)
packed = pytest.mark.parametrize("encoding", PACKED, ids=lambda e: e.name)
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of gguf, for infinities and NaN


def noise(rows: int = 37, columns: int = 96, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def random_bits(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**32, count, dtype=np.uint32)


def data(kind: str, seed: int, size: float = 1.0) -> Floats:
    """64 blocks of one kind of weights."""
    random = np.random.default_rng(seed)
    gauss = random.standard_normal((16, 128))
    made = {
        "gauss": gauss,
        "heavy": np.clip(random.standard_t(1.2, gauss.shape), -200, 200),
        "constant": np.repeat(gauss[:, :4], 32, axis=1),
        "zero": np.zeros_like(gauss),
        "signed zeros": np.where(gauss > 0, 0.0, -0.0),
        "half zeros": np.maximum(gauss, 0) * np.where(random.random(gauss.shape) < 0.5, 1, -0.0),
        "outlier": np.where(np.arange(128) % 32 == 7, 200, gauss),
        "shifted": gauss + 50,
        "ties": random.integers(-4, 5, gauss.shape),
        "halves": random.integers(-254, 255, gauss.shape) / 2,
    }[kind]
    return (made * size).astype(np.float32)


KINDS = ("gauss", "heavy", "constant", "zero", "signed zeros", "half zeros", "outlier", "shifted", "ties", "halves")
SIZES = (1.0, 0.02, 1e-6, 1e-38, 1e-40, 1e-44, 3e4)


def digest() -> str:
    rows = np.concatenate([data(kind, seed=6, size=size) for kind in KINDS for size in SIZES])
    return hashlib.sha256(b"".join(encoding.encode(rows).tobytes() for encoding in EVERY)).hexdigest()

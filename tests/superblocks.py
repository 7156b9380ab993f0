"""Weights like a model's, importances of their columns, and errors weighed as ggml's encoders weigh them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from neoxconv import open_checkpoint
from neoxconv.core.encoding import Encoding
from neoxconv.dtypes import Bytes, Floats
from neoxconv.quant.ggml import codebooks
from neoxconv.quant.ggml.searches import SEARCHES

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL")
BLOCK = dict.fromkeys(NAMES, 32) | dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16)  # weights that share a scale


def weights(kind: str, count: int = 1 << 17, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    made = {
        "gauss": random.standard_normal(count),
        "laplace": random.laplace(size=count),
        "student": random.standard_t(3, count),
    }[kind]
    return (made * 0.02).astype(np.float32).reshape(-1, 512)


def trained(checkpoint: Path) -> Floats:
    """All matrices of a checkpoint, 256 weights a row."""
    tensors = open_checkpoint(checkpoint).tensors.values()
    return np.vstack([tensor.floats(0, tensor.rows).reshape(-1, 256) for tensor in tensors if len(tensor.shape) == 2])


def importance(name: str, blocks: Floats) -> Floats:
    """How ggml's encoder weighs the errors in [n, block] without an importance matrix."""
    if name in ("Q4_K", "Q5_K"):
        return np.sqrt((blocks**2).mean(axis=1, keepdims=True)) + np.abs(blocks)
    return np.abs(blocks) if name == "Q2_K" else blocks**2


def errors(encoding: Encoding, rows: Floats, stored: Bytes) -> tuple[float, float]:
    """Weighted and plain root of the sum of squares."""
    blocks = rows.reshape(-1, BLOCK[encoding.name])
    squares = (blocks - encoding.decode(stored).reshape(blocks.shape)).astype(np.float64) ** 2
    return float(np.sqrt((importance(encoding.name, blocks) * squares).sum())), float(np.sqrt(squares.sum()))


COLUMNS = 512


def columns(kind: str) -> Floats:
    """Importances as they are (log-normal), nearly flat, or with a few columns that matter a hundred times as much."""
    random = np.random.default_rng(1)
    made = {
        "flat": np.ones(COLUMNS),
        "usual": np.exp(random.standard_normal(COLUMNS)),
        "spiky": np.where(random.random(COLUMNS) < 0.02, 100, 1) * np.exp(0.3 * random.standard_normal(COLUMNS)),
    }[kind]
    return made.astype(np.float32)


# What share of the mean of w^2 over how many weights is added to w^2 under the root; None: importance alone.
# Source: quantize_row_*_impl in ggml-quants.c; Q2_K's is ours, as ggml's 1 makes the weights smaller than they are.
SPREAD = dict.fromkeys(SEARCHES, (2, 256)) | {"Q2_K": (0.1, 256), "IQ4_NL": (2, 32), "Q6_K": None}
SPREAD |= dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), (1, COLUMNS))
SPREAD |= {form.name: (form.spread, 256) for form in codebooks.FORMS} | dict.fromkeys(("MXFP4", "NVFP4"))


def spread_by(rows: Floats, share: float, group: int) -> Floats:
    """The root of w^2 and a share of its mean over every `group` weights, by which ggml weighs importances."""
    means = share * (rows.reshape(-1, group).astype(np.float64) ** 2).mean(axis=1)
    return np.sqrt(np.repeat(means, group).reshape(rows.shape) + rows.astype(np.float64) ** 2)


def weighted(name: str, rows: Floats, importance: Floats, values: Floats) -> float:
    """The error as the encoder weighs it: ours and ggml's, but for Q2_K."""
    squares, worth = (rows - values).astype(np.float64) ** 2, np.broadcast_to(importance, rows.shape)
    if spread := SPREAD[name]:
        worth = worth * spread_by(rows, *spread)
    return float((worth * squares).sum())

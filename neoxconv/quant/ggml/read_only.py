"""ggml's types for models that are trained in few bits, which are only read: a float16 step, then the codes.

    Q1_0: 128 weights, a bit each: -1 or 1 steps
    Q2_0: 64 weights, two bits each: -1 to 2 steps

Source: dequantize_row_q1_0 and dequantize_row_q2_0 in ggml-quants.c. TQ1_0 and TQ2_0 are read by llama.cpp's package
gguf, which does not know these.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from neoxconv.dtypes import Bytes, Floats


def _decode(weights: int, bits: int, values: tuple[int, ...], stored: Bytes) -> Floats:
    """Blocks [n, bytes] of so many weights as the numbers [n, columns] that ggml reads. Raises ValueError for parts."""
    nbytes = 2 + weights * bits // 8
    if stored.shape[1] % nbytes:
        raise ValueError(f"blocks have {nbytes} bytes")
    blocks = np.ascontiguousarray(stored).reshape(-1, nbytes)
    steps = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    codes = blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    numbers: Floats = np.array(values, np.float32)[codes.reshape(-1, weights)] * steps
    return numbers.reshape(len(stored), stored.shape[1] // nbytes * weights)


READERS = {
    "Q1_0": partial(_decode, 128, 1, (-1, 1)),
    "Q2_0": partial(_decode, 64, 2, (-1, 0, 1, 2)),
}

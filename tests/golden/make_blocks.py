"""Make blocks.json: weights, and the blocks that ggml itself makes of them.

    python -m tests.golden.make_blocks

ggml comes with llama-cpp-python (`make oracles`, or pip install llama-cpp-python).
"""

from __future__ import annotations

import ctypes
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from neoxconv.dtypes import Bytes, Floats

BLOCKS = Path(__file__).with_name("blocks.json")
NAMES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def ggml() -> ctypes.CDLL | None:
    """Load ggml's own library, or return None where llama-cpp-python is not installed."""
    spec = find_spec("llama_cpp")
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*")) if spec and spec.origin else []
    return ctypes.CDLL(str(found[0])) if found else None


def ggml_encode(library: ctypes.CDLL, name: str, rows: Floats, importance: Floats | None = None) -> Bytes:
    """Encode rows [n, columns] on one thread, with an importance of the columns or without; return [n, row bytes]."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    stored = np.zeros((len(rows), rows.shape[1] // block * size), np.uint8)
    function, long, pointer = library.ggml_quantize_chunk, ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    function.restype = ctypes.c_size_t
    columns = None if importance is None else importance.ctypes.data
    wrote = function(int(kind), rows.ctypes.data, stored.ctypes.data, 0, len(rows), rows.shape[1], columns)
    assert wrote == stored.nbytes
    return stored


def weights() -> Floats:
    """Return one row of 32 for each kind of block: usual, heavy-tailed, ties, zeros, tiny, constant, one outlier."""
    random = np.random.default_rng(20)
    rows = np.zeros((10, 32))
    rows[0] = random.standard_normal(32) * 0.02
    rows[1] = random.standard_t(1.5, 32)
    rows[2] = random.integers(-3, 4, 32)
    rows[3] = random.integers(-127, 128, 32) / 2
    rows[5] = -0.0
    rows[6] = random.standard_normal(32) * 1e-39
    rows[7] = random.standard_normal(32) * 1e-6
    rows[8] = -1.25
    rows[9] = np.where(np.arange(32) == 9, -300, rows[0])
    return rows.astype(np.float32)


def main() -> None:
    library = ggml()
    assert library, "install llama-cpp-python first"
    rows = weights()
    made = {"F32": rows.view(np.uint8)} | {name: ggml_encode(library, name, rows) for name in NAMES}
    text = json.dumps({name: [row.tobytes().hex() for row in blocks] for name, blocks in made.items()}, indent=1)
    BLOCKS.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Mixes: which encoding each weight of a GGUF file gets, by its role. The first row that fits decides."""

from __future__ import annotations

from neoxconv.errors import PlanError
from neoxconv.model import Encoding
from neoxconv.quant import ENCODINGS

ANY = "*"
VECTORS = ("norm", "bias")  # always F32 in GGUF
BLOCK_FALLBACK = "F16"  # for rows that the block does not divide

Rows = tuple[tuple[str, str], ...]  # (role, encoding)

# The number is llama.cpp's general.file_type.
MIXES: dict[str, tuple[int, Rows]] = {
    "F32": (0, ((ANY, "F32"),)),
    "F16": (1, ((ANY, "F16"),)),
    "BF16": (32, ((ANY, "BF16"),)),
    "Q8_0": (7, ((ANY, "Q8_0"),)),
    "Q5_1": (9, (("head", "Q8_0"), (ANY, "Q5_1"))),
    "Q5_0": (8, (("head", "Q8_0"), (ANY, "Q5_0"))),
    "Q4_1": (3, (("head", "Q8_0"), (ANY, "Q4_1"))),
    "Q4_0": (2, (("head", "Q8_0"), (ANY, "Q4_0"))),
}
# llama.cpp gives these mixes a Q6_K head, which has no encoder here yet.
HEAD_STANDS_IN = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")


def choose(mix: str, role: str, columns: int) -> Encoding:
    """The encoding of a weight with rows of `columns` numbers."""
    if mix not in MIXES:
        raise PlanError(f"--type {mix}: expected one of {', '.join(MIXES)}.")
    if role in VECTORS:
        return ENCODINGS["F32"]
    name = next(encoding for who, encoding in MIXES[mix][1] if who in (role, ANY))
    encoding = ENCODINGS[name]
    return encoding if columns % encoding.dtype.block == 0 else ENCODINGS[BLOCK_FALLBACK]

"""MLX's types, by what its configuration says of them: the mode, bits, and how many weights of a row share a scale."""

from __future__ import annotations

from neoxconv.core.encoding import Scaled
from neoxconv.quant.scaled.affine import affine
from neoxconv.quant.scaled.microscaling import MXFP4, MXFP8, NVFP4

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MLX: dict[tuple[str, int, int], Scaled] = {
    **{("affine", bits, group): affine(bits, group) for bits in BITS for group in GROUPS},
    ("mxfp4", 4, 32): MXFP4,
    ("mxfp8", 8, 32): MXFP8,
    ("nvfp4", 4, 16): NVFP4,
}

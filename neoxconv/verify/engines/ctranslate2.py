"""CTranslate2 on the CPU, in float32 whatever the weights are stored in.

Left to itself it would multiply 8 bits by 8 bits, which a processor without VNNI saturates: docs/verification.md.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from neoxconv.verify.engines.program import Run, needed


def load(folder: Path) -> Run:
    """A folder of CTranslate2's."""
    library = needed("ctranslate2", "ctranslate2")
    library.set_log_level(logging.ERROR)
    model = library.Generator(str(folder), device="cpu", compute_type="float32", intra_threads=os.cpu_count() or 1)
    return lambda tokens: np.asarray(model.forward_batch([tokens.tolist()]))[0]

"""MLX, by mlx_lm, on the device that MLX chooses; all but the codes in float32."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np

from neoxconv.dtypes import Numbers
from neoxconv.verify.engines.program import Run, Words, needed


def load(folder: Path) -> Run:
    """A folder of MLX's, or a plain Hugging Face one."""
    utils = needed("mlx_lm.utils", "mlx-lm")
    core = import_module("mlx.core")
    model, _ = utils.load_model(folder)
    model.set_dtype(core.float32)

    def run(tokens: Numbers) -> Words:
        return np.array(model(core.array(tokens[None]))[0])

    return run

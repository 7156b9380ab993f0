"""GPT-J rotates neighbours (0 and 1, 2 and 3, ...), GPT-NeoX the first half against the second."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neoxconv.core.table import ModelConfig


def halves_first(config: ModelConfig) -> npt.NDArray[np.int64]:
    """The order of a head's numbers, int64 [head size], in which rotating halves is what rotating neighbours was."""
    dims = config.rotary_dims
    return np.concatenate([np.arange(0, dims, 2), np.arange(1, dims, 2), np.arange(dims, config.head_size)])

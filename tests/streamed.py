"""The logits of verify's reference forward pass, for tests that hold them against recorded ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from neoxconv.core.model import Checkpoint
from neoxconv.verify.logits.stream import multipliers, side


def logits_of(checkpoint: Checkpoint, tokens: np.ndarray, merged: bool = False) -> np.ndarray:
    """The logits [batch, time, words] of the streamed pass, the head in three bands."""
    rows = checkpoint.config.rows
    with torch.inference_mode(), multipliers() as pool:
        model = side(checkpoint, pool, merged=merged)
        streams = model.embed(torch.from_numpy(tokens))
        for layer in range(checkpoint.config.layers):
            streams = model.layer(layer, streams)
        normed = model.final(streams)
        borders = [0, rows // 3 + 1, rows // 2 + 7, rows]
        return np.concatenate([model.logits(normed, *ends) for ends in pairwise(borders)], axis=-1)

"""An importance matrix by the same streamed forward pass that verifies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Doubles, Numbers
from neoxconv.errors import CheckpointError
from neoxconv.verify.logits.stream import running, side


def calibrate(
    checkpoint: Checkpoint,
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Doubles]:
    """By the GGUF name of each matrix in the layers: the sum over tokens [batch, time] of its squared inputs [columns].

    The ranks are joined first, as a GGUF file holds them; `progress` is told of sequences, once for each layer.
    """
    checkpoint.refuse_doubts()
    names = {weight.unified: weight.gguf for _, weight in checkpoint.architecture.names(checkpoint.config)}
    sums: dict[str, Doubles] = {}

    def watch(name: str, x: Tensor) -> None:
        squares = x.reshape(-1, x.shape[-1]).double().square().sum(0).cpu().numpy()
        sums[names[name]] = sums.get(names[name], 0) + squares

    with running(tokens, device) as (pool, ids):
        model = side(checkpoint, pool, merged=True, device=device, watch=watch)
        streams = model.embed(ids)
        for number in range(checkpoint.config.layers):
            streams = model.layer(number, streams, into=streams, progress=progress)
    with np.errstate(over="ignore"):
        bad = [name for name, values in sums.items() if not np.isfinite(values.astype(np.float32)).all()]
    if bad:
        raise CheckpointError(
            f"{checkpoint.index.folder}: what {bad[0]} is multiplied with is not finite; check the weights."
        )
    return sums

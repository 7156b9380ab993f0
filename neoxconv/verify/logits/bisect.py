"""Which tensor breaks a layer: the candidate's layer is run on the reference's stream, with one tensor exchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from torch import Tensor

from neoxconv.core.model import Checkpoint, ModelConfig
from neoxconv.dtypes import Numbers
from neoxconv.verify.logits.compare import layer_error
from neoxconv.verify.logits.stream import Side, running, side

HEALED = 0.3  # of a part's error is left at most where the right tensor was exchanged
CLEAR = 2.0  # times the median error of a layer: it stands out
TOKENS = 64
HYPERPARAMETERS = "the hyperparameters (rotary, activation, norm epsilon, ...) are not the source's"


@dataclass(frozen=True)
class Suspect:
    """A part of the model that the candidate computes differently, by how much, and what mends it."""

    part: str
    error: float
    cause: str

    def __str__(self) -> str:
        return f"{self.part} goes wrong by {self.error:.2g}: {self.cause}"


def bisect(source: Checkpoint, candidate: Checkpoint, layer: int | None, tokens: Numbers, device: str) -> Suspect:
    """What goes wrong in `layer` (-1: the embedding, None: in the layer that stands out, else the head), and why.

    The source is run rank by rank up to there; then both go on from its stream, the candidate again and again with one
    tensor of the merged source in the place of its own.
    """
    with running(tokens[:1, :TOKENS], device) as (pool, ids):
        reference = side(source, pool, device=device)
        streams = [reference.embed(ids)]
        for number in range(source.config.layers if layer is None else max(layer, 0)):
            streams.append(reference.layer(number, streams[-1]))

        def stream(at: int | None) -> list[Tensor]:
            return streams[-1 if at is None else max(at, 0)]

        @cache
        def expected(at: int | None) -> list[Tensor]:
            return part(reference, at, stream(at), ids)

        def error(at: int | None, *exchanged: str, config: ModelConfig = candidate.config) -> float:
            before = stream(at)
            tensors = candidate.tensors | {name: source.tensors[name] for name in exchanged}
            model = side(replace(candidate, tensors=tensors, config=config), pool, merged=True, device=device)
            return layer_error(0, expected(at), part(model, at, [sum(before[1:], before[0]) / len(before)], ids)).error

        if layer is None:
            alone = [error(number) for number in range(source.config.layers)]
            worst, usual = int(np.argmax(alone)), float(np.median(alone))
            layer = worst if alone[worst] > CLEAR * usual else None
            if error(worst, config=source.config) < HEALED * usual:
                return Suspect("every layer", usual, HYPERPARAMETERS)
        whole, acting = error(layer), names(source, layer)
        if error(layer, config=source.config) < HEALED * whole:
            cause = HYPERPARAMETERS
        else:
            after = {name: error(layer, name) for name in acting}
            best = min(after, key=lambda name: after[name])
            several = "several of its tensors" if error(layer, *acting) < HEALED * whole else "no tensor mends it"
            cause = best if after[best] < HEALED * whole else several
    where = "the head" if layer is None else "the embedding" if layer < 0 else f"layer {layer}"
    return Suspect(where, whole, cause)


def names(source: Checkpoint, layer: int | None) -> list[str]:
    """The tensors that act there."""
    stages = {None: ("norm", "head"), -1: ("embed",)}.get(layer, ("layer",))
    rows = source.architecture.names(source.config)
    return [weight.unified for at, weight in rows if weight.stage in stages and at in (None, layer)]


def part(model: Side, layer: int | None, streams: list[Tensor], ids: Tensor) -> list[Tensor]:
    """What the model makes of the streams there."""
    if layer is None:
        return [model.logits(model.final(streams), 0, model.config.rows)]
    return model.embed(ids) if layer < 0 else model.layer(layer, streams)

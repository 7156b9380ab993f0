"""Which tensor breaks a layer: the candidate's layer is run on the reference's stream, with one tensor exchanged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.dtypes import Numbers
from neoxconv.verify.logits.compare import layer_error
from neoxconv.verify.logits.stream import Side, running, side

# Where these numbers are from: docs/verification.md, "Thresholds".
_HEALED = 0.3  # of a part's error is left at most where the right tensor was exchanged
_STANDS_OUT = 2.0  # times the median error of a layer
_TOKENS = 64
_HYPERPARAMETERS = "the hyperparameters (rotary, activation, norm epsilon, ...) are not the source's"


@dataclass(frozen=True)
class _Part:
    """A part of the model by its name, the stages of the weights that act in it, and of a layer its number."""

    name: str
    stages: tuple[str, ...]
    layer: int | None = None

    def tensors(self, source: Checkpoint) -> list[str]:
        """The unified names of the tensors that act there."""
        rows = source.architecture.names(source.config)
        return [weight.unified for at, weight in rows if weight.stage in self.stages and at in (None, self.layer)]

    def run(self, model: Side, streams: list[Tensor], ids: Tensor) -> list[Tensor]:
        """What the model makes of the streams [batch, time, hidden] before it; the embedding makes its own."""
        if self == _EMBEDDING:
            return model.embed(ids)
        if self.layer is None:
            return [model.logits(model.final(streams), 0, model.config.rows)]
        return model.layer(self.layer, streams)


_EMBEDDING = _Part("the embedding", ("embed",))
HEAD = _Part("the head", ("norm", "head"))


def _layer_part(number: int) -> _Part:
    """One of the layers."""
    return _Part(f"layer {number}", ("layer",), number)


@dataclass(frozen=True)
class _Suspect:
    """A part of the model that the candidate computes differently, by how much, and what mends it."""

    part: str
    error: float
    cause: str

    def __str__(self) -> str:
        return f"{self.part} goes wrong by {self.error:.2g}: {self.cause}"


@dataclass(frozen=True)
class Exchange:
    """Parts of the candidate, run on the source's streams with some of its tensors exchanged for the source's.

    The source is run rank by rank up to `last`; the candidate goes on from the mean of its ranks' streams.
    """

    source: Checkpoint
    candidate: Checkpoint
    last: _Part
    ids: Tensor  # [batch, time]
    pool: ThreadPoolExecutor
    device: str
    known: dict[_Part, list[Tensor]] = field(default_factory=dict)  # what the source makes of each part so far

    @cached_property
    def reference(self) -> Side:
        return side(self.source, self.pool, device=self.device)

    @cached_property
    def streams(self) -> list[list[Tensor]]:
        """The source's streams before each layer up to `last`, and of the head those before it."""
        found = [self.reference.embed(self.ids)]
        layers = {_EMBEDDING: 0, HEAD: self.source.config.layers}.get(self.last, self.last.layer or 0)
        for number in range(layers):
            found.append(self.reference.layer(number, found[-1]))
        return found

    def error(self, part: _Part, *exchanged: str, config: ModelConfig | None = None) -> float:
        """How far the candidate's part is from the source's, relative, with the tensors named `exchanged`."""
        before = self.streams[-1 if part == HEAD else part.layer or 0]
        tensors = self.candidate.tensors | {name: self.source.tensors[name] for name in exchanged}
        changed = replace(self.candidate, tensors=tensors, config=config or self.candidate.config)
        model = side(changed, self.pool, merged=True, device=self.device)
        if part not in self.known:
            self.known[part] = part.run(self.reference, before, self.ids)
        found = part.run(model, [sum(before[1:], before[0]) / len(before)], self.ids)
        return layer_error(0, self.known[part], found).error


def bisect(source: Checkpoint, candidate: Checkpoint, layer: int | None, tokens: Numbers, *, device: str) -> _Suspect:
    """What goes wrong in `layer` (-1: the embedding, None: in the layer that stands out, else the head), and why."""
    part = HEAD if layer is None else _EMBEDDING if layer < 0 else _layer_part(layer)
    with running(tokens[:1, :_TOKENS], device) as (pool, ids):
        exchange = Exchange(source, candidate, part, ids, pool, device)
        if layer is None:
            layers = [_layer_part(number) for number in range(source.config.layers)]
            alone = [exchange.error(each) for each in layers]
            worst, usual = int(np.argmax(alone)), float(np.median(alone))
            if exchange.error(layers[worst], config=source.config) < _HEALED * usual:
                return _Suspect("every layer", usual, _HYPERPARAMETERS)
            part = layers[worst] if alone[worst] > _STANDS_OUT * usual else HEAD
        whole = exchange.error(part)
        return _Suspect(part.name, whole, _cause(exchange, part, whole))


def _cause(exchange: Exchange, part: _Part, whole: float) -> str:
    """What mends a part whose error is `whole`: other hyperparameters, one tensor, several, or nothing."""
    if exchange.error(part, config=exchange.source.config) < _HEALED * whole:
        return _HYPERPARAMETERS
    acting = part.tensors(exchange.source)
    after = {name: exchange.error(part, name) for name in acting}
    best = min(after, key=lambda name: after[name])
    if after[best] < _HEALED * whole:
        return best
    return "several of its tensors" if exchange.error(part, *acting) < _HEALED * whole else "no tensor mends it"

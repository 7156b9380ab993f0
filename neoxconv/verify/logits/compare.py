"""The third level: the target's predictions are the trained model's, layer by layer and at the end.

The reference is the source as it was trained, rank by rank; the candidates are targets. All are streamed from disk,
side by side, for the same tokens, so that the reference is run once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Doubles, Numbers
from neoxconv.errors import VerifyError
from neoxconv.verify.logits.metrics import Comparison, Figures, Softmax, figures
from neoxconv.verify.logits.stream import Side, running, side

WORDS = 1024  # logits at a time
_SIZES = ("layers", "hidden", "heads", "ff", "rows")
_WORST = 10
# When a layer's own error stands out. Where these numbers are from: docs/verification.md, "Thresholds".
_OVER_EARLIER = 8.0  # times the median own error of all before it
_OVER_LATER = 3.0  # of layer 0, which has only the embedding before it: times that of the layers after it
_LEAST = 1e-4  # the error is large in itself,
_NEAR_LARGEST = 0.3  # and not less than this share of the largest

Logits = Callable[[int, int], Tensor]  # for words from start to stop, [batch, time, words]


@dataclass(frozen=True)
class _LayerError:
    """How far the residual stream is from the reference's after a layer (-1: the embedding)."""

    layer: int
    error: float  # root mean square of the difference over the stream's
    cosine: float  # mean over positions


@dataclass(frozen=True)
class Position:
    """Where the predictions differ most: both sides' most likely words with their probabilities."""

    sequence: int
    position: int
    divergence: float
    reference: tuple[tuple[int, float], ...]
    candidate: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Predictions:
    """What comparing the predictions found, as values; `divergences` has one of every position, in order."""

    engine: str
    tokens: Numbers
    layers: tuple[_LayerError, ...]
    figures: Figures
    divergences: Doubles
    worst: tuple[Position, ...]

    @property
    def broken(self) -> int | None:
        """The first layer whose own error stands out, else the embedding (-1) if its does; None where none does."""
        place = first_broken(np.array([layer.error for layer in self.layers]))
        return None if place is None else self.layers[place].layer

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain values, without the tokens."""
        return {
            "engine": self.engine,
            "sequences": len(self.tokens),
            "length": self.tokens.shape[1],
            "layers": [asdict(layer) for layer in self.layers],
            **asdict(self.figures),
        }


def first_broken(errors: Doubles) -> int | None:
    """Which of the errors [embedding, layers ...] is the first whose own part stands out, the embedding's the last.

    None where none does, and where there are no errors; an error that is not finite stands out always.
    """
    if not errors.size:
        return None
    if not np.isfinite(errors).all():
        return int(np.argmin(np.isfinite(errors)))
    own = _own_errors(errors)
    found = own > np.maximum(_most_expected(own), max(_LEAST, _NEAR_LARGEST * own.max()))
    return next((place for place in (*range(1, len(own)), 0) if found[place]), None)


def _own_errors(errors: Doubles) -> Doubles:
    """What each layer adds to the stream's errors [embedding, layers ...], whose squares add up as if independent."""
    return np.sqrt(np.maximum(np.diff(errors**2, prepend=0), 0))


def _most_expected(own: Doubles) -> Doubles:
    """The own error [embedding, layers ...] up to which each is like the others."""
    embedding = _OVER_EARLIER * np.median(own[1:])
    first = _OVER_LATER * np.median(own[2:]) if len(own) > 2 else 0.0
    return np.array([embedding, first, *(_OVER_EARLIER * np.median(own[:at]) for at in range(2, len(own)))])


def compare_predictions(
    reference: Checkpoint,
    candidate: Checkpoint,
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
    engine: str = "native",
    logits: Logits | None = None,
) -> Predictions:
    """The same as `compare_all` for one candidate; `logits` are its, where another engine has computed them."""
    given = (logits,) if logits else ()
    (found,) = compare_all(
        reference, [candidate], tokens, device=device, progress=progress, engine=engine, logits=given
    )
    return found


def compare_all(
    reference: Checkpoint,
    candidates: Sequence[Checkpoint],
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
    engine: str = "native",
    logits: Sequence[Logits] = (),
) -> list[Predictions]:
    """Run all models on tokens [batch, time]; `progress` is told of every layer of a side, and of the heads.

    `logits` are the candidates' where another engine has computed them; then their layers are not compared. Raises
    VerifyError where the models have other sizes, PlanError where the device is not there.
    """
    following = np.full(tokens.shape, -1)
    following[:, :-1] = tokens[:, 1:]
    for candidate in candidates:
        check_sizes(reference, candidate)
    with running(tokens, device) as (pool, ids):
        sides = [side(model, pool, device=device) for model in (reference, *(() if logits else candidates))]
        streams = [each.embed(ids) for each in sides]
        layers = [_apart(-1, streams)]
        for number in range(reference.config.layers):
            for at, each in enumerate(sides):
                streams[at] = each.layer(number, streams[at])
                progress(1)
            layers.append(_apart(number, streams))
        ours, *theirs = [head(each, stream) for each, stream in zip(sides, streams, strict=True)]
        compared = _compare_heads(following, reference.config.rows, ours, logits or theirs, device=device)
    progress(len(sides))
    errors = list(zip(*layers, strict=True)) or [()] * len(logits)
    return [
        Predictions(engine, tokens, found, figures(each), each.divergence, worst(each, tokens))
        for found, each in zip(errors, compared, strict=True)
    ]


def _apart(number: int, streams: Sequence[list[Tensor]]) -> list[_LayerError]:
    """How far every candidate's streams are from the first, the reference's."""
    return [layer_error(number, streams[0], theirs) for theirs in streams[1:]]


def check_sizes(reference: Checkpoint, candidate: Checkpoint) -> None:
    """Raise VerifyError where the models have other sizes."""
    for size in _SIZES:
        ours, theirs = getattr(reference.config, size), getattr(candidate.config, size)
        if ours != theirs:
            raise VerifyError(
                f"{candidate.index.where}: its predictions cannot be compared, as it has {size} {theirs} "
                f"and the source {ours}; give the source that it was made from."
            )


def layer_error(number: int, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> _LayerError:
    """How far the streams are apart; of ranks with streams of their own, their means."""
    r, c = (sum(streams[1:], streams[0]) / len(streams) for streams in (reference, candidate))
    r, c = r.double(), c.double()
    cosine = (r * c).sum(-1) / (r.norm(dim=-1) * c.norm(dim=-1)).clamp_min(1e-300)
    return _LayerError(number, float((r - c).norm() / r.norm().clamp_min(1e-300)), float(cosine.mean()))


def head(model: Side, streams: list[Tensor]) -> Logits:
    """The model's logits for bands of words."""
    normed = model.final(streams)
    return lambda start, stop: model.logits(normed, start, stop)


def _compare_heads(
    following: Numbers, rows: int, reference: Logits, candidates: Sequence[Logits], *, device: str
) -> list[Comparison]:
    """All sides' logits of `rows` words, band by band; `following` [batch, time] are the right ones."""
    found = [Comparison(following.reshape(-1), device) for _ in candidates]
    for start in range(0, rows, WORDS):
        stop = min(start + WORDS, rows)
        ours, *theirs = [logits(start, stop).reshape(-1, stop - start) for logits in (reference, *candidates)]
        for comparison, band in zip(found, theirs, strict=True):
            comparison.add(start, ours, band)
    return found


def worst(comparison: Comparison, tokens: Numbers) -> tuple[Position, ...]:
    """The positions that differ most, and what each side expects there."""
    divergence = comparison.divergence
    return tuple(
        Position(
            int(at // tokens.shape[1]),
            int(at % tokens.shape[1]),
            float(divergence[at]),
            expected(comparison.reference, at),
            expected(comparison.candidate, at),
        )
        for at in np.argsort(-divergence, kind="stable")[:_WORST].tolist()
    )


def expected(side: Softmax, at: int) -> tuple[tuple[int, float], ...]:
    """The likeliest words at a position, with their probabilities."""
    shares = (side.values[at] - side.normaliser[at]).exp()
    return tuple(zip(side.words[at].tolist(), shares.tolist(), strict=True))

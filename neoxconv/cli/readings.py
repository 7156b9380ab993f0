"""`inspect --try`: SRC read in every way that its files leave open, each with what it predicts of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neoxconv.cli.source import Reading, opened
from neoxconv.core.model import Checkpoint
from neoxconv.errors import UntoldError
from neoxconv.storage import Place
from neoxconv.words import shell, table

_SEQUENCES = 4  # of the text, at most
_SAYS_NOTHING = 0.9  # of the loss of a guess among all words: what is above has learnt nothing


@dataclass(frozen=True)
class _Tried:
    """One reading: its options, nats per token of the text, and how far stored logits are from its own."""

    options: str
    loss: float
    off: float | None  # None where the checkpoint holds no logits


@dataclass(frozen=True)
class _Trials:
    """All readings, the best first: by stored logits where there are any, else by the loss on the text.

    `guess` is the loss of a guess among all words.
    """

    readings: tuple[_Tried, ...]
    guess: float

    @property
    def facts(self) -> dict[str, Any]:
        return {"readings": [asdict(tried) for tried in self.readings], "guess": self.guess}

    @property
    def listing(self) -> str:
        """A line for each reading, and what follows from them."""
        rows = [(t.options, f"{t.loss:.4f}", "none" if t.off is None else f"off by {t.off:.3g}") for t in self.readings]
        return "\n".join([table("<><", [("reading", "loss", "stored logits"), *rows]), f"  {self.verdict}"])

    @property
    def verdict(self) -> str:
        best = self.readings[0]
        if best.off is not None:
            return f"{best.options}: gives the logits that gpt-neox stored with the model, or is the nearest to them."
        if best.loss > _SAYS_NOTHING * self.guess:
            return f"None is a language model of this text: a guess among all words has a loss of {self.guess:.4f}."
        return f"{best.options}: predicts the text best."


def _readings(source: Place, how: Reading) -> Iterator[tuple[str, Checkpoint]]:
    """SRC in every way that its files leave open, each with the options for it."""
    try:
        checkpoint = opened(source, how)
    except UntoldError as error:
        for choice in error.choices:
            answer: dict[str, Any] = {error.option: choice}
            yield from _readings(source, replace(how, **answer))
        return
    checkpoint.refuse_doubts()
    yield shell(how.words) or "as the files tell", checkpoint


def tried(source: Place, how: Reading, text: Path) -> _Trials:
    """What each reading of SRC predicts of a text. Raises what opening it and reading the text raise."""
    from neoxconv.verify.logits.alone import loss_of, off_stored
    from neoxconv.verify.logits.tokens import tokens_for
    from neoxconv.verify.logits.trial import Sample

    found, rows, sample = [], 0, Sample(text=text, sequences=_SEQUENCES)
    for options, checkpoint in _readings(source, how):
        tokens, _ = tokens_for(checkpoint, sample)
        found.append(_Tried(options, loss_of(checkpoint, tokens), off_stored(checkpoint)))
        rows = checkpoint.config.rows
    return _Trials(tuple(sorted(found, key=lambda one: one.loss if one.off is None else one.off)), math.log(rows))

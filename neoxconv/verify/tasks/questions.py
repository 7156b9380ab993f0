"""A task's questions in tokens, as EleutherAI's lm-evaluation-harness makes them, and the rows that a model is given.

Source: lm_eval 0.4.13: api/model.py, models/huggingface.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv.formats.tokenizer import END
from neoxconv.verify.logits.trial import Task
from neoxconv.verify.tasks.exercises import Exercise, exercises
from neoxconv.verify.tasks.lines import Line

_Ids = tuple[int, ...]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """A (context, continuation) for each choice, the choices' lengths in characters, and the number of the right one.

    The contexts are cut from the left, so that all tokens but the last fit the model.
    """

    pairs: tuple[tuple[_Ids, _Ids], ...]
    lengths: tuple[int, ...]
    answer: int
    subject: str


@dataclass(frozen=True)
class Requests:
    """What to ask a model: one row for each pair of the questions, in their order, filled up with 0 on the right.

    `next` is the token that follows each of `tokens`; `scored` marks where that belongs to the continuation.
    """

    tokens: npt.NDArray[np.int64]
    next: npt.NDArray[np.int64]
    scored: Marks


def read_task(task: Task, tokenizer: Any, *, context: int) -> list[Question]:
    """The questions of a task, for a model of `context` positions.

    `tokenizer` is a tokenizers.Tokenizer that neither pads nor truncates. Raises what `exercises` raises.
    """
    return [_question(line, exercise, tokenizer, context) for line, exercise in exercises(task)]


def _question(line: Line, exercise: Exercise, tokenizer: Any, context: int) -> Question:
    """An exercise in tokens. Raises CheckpointError where a choice has none, or more than the model has positions."""
    pairs = []
    for field, choice in exercise.choices.items():
        before, after = encoded(tokenizer, exercise.context, " " + choice)
        if not 0 < len(after) <= context:
            raise line.wrong(field, f"1 to {context}", f"ends in a choice of {len(after)} tokens")
        pairs.append((before[len(after) - context - 1 :], after))
    return Question(tuple(pairs), tuple(map(len, exercise.choices.values())), exercise.answer, exercise.subject)


def encoded(tokenizer: Any, context: str, continuation: str) -> tuple[_Ids, _Ids]:
    """The ids of both; white space that ends the context belongs to the continuation, an empty context is one END.

    The continuation's ids are those of the whole text after as many as the context alone has.
    """
    before, whole = (ids(tokenizer, text) for text in (context.rstrip(), context + continuation))
    return before or (tokenizer.token_to_id(END),), whole[len(before) :]


def ids(tokenizer: Any, text: str) -> _Ids:
    """The ids of a text, and no others around them."""
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def requests(questions: Sequence[Question]) -> Requests:
    """The rows to compute for these questions."""
    pairs = [pair for question in questions for pair in question.pairs]
    shape = len(pairs), max(len(before) + len(after) for before, after in pairs) - 1
    tokens, following, scored = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, (before, after) in enumerate(pairs):
        whole, length = before + after, len(before) + len(after) - 1
        tokens[row, :length], following[row, :length] = whole[:-1], whole[1:]
        scored[row, len(before) - 1 : length] = True
    return Requests(tokens, following, scored)

"""Questions with known answers, read and scored by the rules of EleutherAI's lm-evaluation-harness, without examples.

    lambada    {"text"}                            the last word: right where each of its tokens is the likeliest one
    piqa       {"goal", "sol1", "sol2", "label"}   two solutions: right where the right one is the likelier
    hellaswag  {"activity_label", "ctx_a", "ctx_b", "endings", "label"}    endings: likewise

A choice's likelihood is the sum of its tokens' log-probabilities; the normalised one is that over its characters.
Source: lm_eval 0.4.13: the tasks lambada_openai, piqa and hellaswag; api/model.py, api/task.py, models/huggingface.py.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.dtypes import Doubles
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.tokenizer import END, SURROGATE
from neoxconv.storage import check_size, open_storage

_Ids = tuple[int, ...]
Marks = npt.NDArray[np.bool_]


class _Exercise(NamedTuple):
    """A question in text: what comes before, the continuations by their fields' names, and the right one's number."""

    context: str
    choices: dict[str, str]
    answer: int


@dataclass(frozen=True)
class _Question:
    """A (context, continuation) for each choice, the choices' lengths in characters, and the number of the right one.

    The contexts are cut from the left, so that all tokens but the last fit the model.
    """

    pairs: tuple[tuple[_Ids, _Ids], ...]
    lengths: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Requests:
    """What to ask a model: one row for each pair of the questions, in their order, filled up with 0 on the right.

    `next` is the token that follows each of `tokens`; `scored` marks where that belongs to the continuation.
    """

    tokens: npt.NDArray[np.int64]
    next: npt.NDArray[np.int64]
    scored: Marks


@dataclass(frozen=True)
class _Line:
    """The fields of a line, and the file and number that messages name it by."""

    where: str
    fields: dict[str, Any]

    def wrong(self, field: str, expected: str, found: str = "") -> CheckpointError:
        """The error that a field is not what it should be; `found` says in words what it is."""
        shown = f"is {reprlib.repr(self.fields[field])}" if field in self.fields else "is missing"
        return CheckpointError(
            f"{self.where}: {field} {found or shown}, expected {expected}; correct the line, or give another file."
        )

    def text(self, field: str, *, empty: bool = False) -> str:
        """A text. Raises CheckpointError where the field is none, or empty unless it may be."""
        value = self.fields.get(field)
        if not _is_text(value) or not (value or empty):
            raise self.wrong(field, "text" if empty else "text, not empty")
        return str(value)

    def texts(self, field: str) -> list[str]:
        """Two or more texts, none of them empty. Raises CheckpointError where the field is no list of such."""
        value = self.fields.get(field)
        if not isinstance(value, list) or len(value) < 2 or not all(_is_text(text) and text for text in value):
            raise self.wrong(field, "a list of two or more texts, none empty")
        return value

    def label(self, choices: int) -> int:
        """The number of the right choice, which may be written as text. Raises CheckpointError where it is none."""
        value = self.fields.get("label")
        if isinstance(value, int | str) and str(value) in map(str, range(choices)):
            return int(value)
        raise self.wrong("label", f"a number from 0 to {choices - 1}")


def _is_text(value: Any) -> bool:
    """Whether this is a string that UTF-8 can spell."""
    return isinstance(value, str) and not SURROGATE.search(value)


def lambada(line: _Line) -> _Exercise:
    """All before the last space, and the word after it."""
    context, _, word = line.text("text").rpartition(" ")
    if not word:
        raise line.wrong("text", "a word", "has nothing after its last space")
    return _Exercise(context, {"text": word}, 0)


def piqa(line: _Line) -> _Exercise:
    """The goal as a question, and two solutions."""
    choices = {field: line.text(field) for field in ("sol1", "sol2")}
    return _Exercise(f"Question: {line.text('goal', empty=True)}\nAnswer:", choices, line.label(2))


def hellaswag(line: _Line) -> _Exercise:
    """The activity and what has happened so far, and the endings. `ctx_b` gets one capital, the first, and no other."""
    activity, before, after = (line.text(field, empty=True) for field in ("activity_label", "ctx_a", "ctx_b"))
    endings = line.texts("endings")
    choices = {f"endings[{number}]": _cleaned(ending) for number, ending in enumerate(endings)}
    return _Exercise(_cleaned(f"{activity}: {before} {after.capitalize()}"), choices, line.label(len(endings)))


def _cleaned(text: str) -> str:
    """The text without WikiHow's marks in brackets, of which a title ends a sentence."""
    unmarked = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return unmarked.replace("  ", " ")


_TASKS: dict[str, Callable[[_Line], _Exercise]] = {"lambada": lambada, "piqa": piqa, "hellaswag": hellaswag}


def read_task(name: str, data: Path, tokenizer: Any, *, context: int, limit: int | None = None) -> list[_Question]:
    """The questions of a .jsonl file, or the first `limit`, for a model of `context` positions.

    `tokenizer` is a tokenizers.Tokenizer that neither pads nor truncates. Raises PlanError for an unknown task or an
    impossible limit, and CheckpointError where a line is not as the task has them.
    """
    if name not in _TASKS:
        raise PlanError(f"{name!r:.40} is no task; choose one of {', '.join(_TASKS)}.")
    if limit is not None and limit < 1:
        raise PlanError(f"a limit of {limit} leaves no questions; give 1 or more, or no limit.")
    found = [_question(line, _TASKS[name](line), tokenizer, context) for line in islice(lines(data), limit)]
    if not found:
        raise CheckpointError(f"{data}: holds no lines, expected questions of {name}; give another file.")
    return found


def lines(data: Path) -> Iterator[_Line]:
    """The lines of a .jsonl file that are not blank.

    Raises CheckpointError at one that is no JSON object, and where the file is far too large.
    """
    file = open_storage(data)
    check_size(data, file.size)
    for number, text in enumerate(file.text().split(b"\n"), 1):
        if text.strip():
            yield _Line(where := f"{data}: line {number}", _parsed(where, text))


def _parsed(where: str, text: bytes) -> dict[str, Any]:
    """The fields that a line holds. Raises CheckpointError where it is no JSON object."""
    advice = "expected a JSON object in UTF-8; correct the line, or give another file."
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON ({error}), {advice}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: is {reprlib.repr(fields)}, {advice}")
    return fields


def _question(line: _Line, exercise: _Exercise, tokenizer: Any, context: int) -> _Question:
    """An exercise in tokens. Raises CheckpointError where a choice has none, or more than the model has positions."""
    pairs = []
    for field, choice in exercise.choices.items():
        before, after = encoded(tokenizer, exercise.context, " " + choice)
        if not 0 < len(after) <= context:
            raise line.wrong(field, f"1 to {context}", f"ends in a choice of {len(after)} tokens")
        pairs.append((before[len(after) - context - 1 :], after))
    return _Question(tuple(pairs), tuple(map(len, exercise.choices.values())), exercise.answer)


def encoded(tokenizer: Any, context: str, continuation: str) -> tuple[_Ids, _Ids]:
    """The ids of both; white space that ends the context belongs to the continuation, an empty context is one END.

    The continuation's ids are those of the whole text after as many as the context alone has.
    """
    before, whole = (ids(tokenizer, text) for text in (context.rstrip(), context + continuation))
    return before or (tokenizer.token_to_id(END),), whole[len(before) :]


def ids(tokenizer: Any, text: str) -> _Ids:
    """The ids of a text, and no others around them."""
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def requests(questions: Sequence[_Question]) -> Requests:
    """The rows to compute for these questions."""
    pairs = [pair for question in questions for pair in question.pairs]
    shape = len(pairs), max(len(before) + len(after) for before, after in pairs) - 1
    tokens, following, scored = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, (before, after) in enumerate(pairs):
        whole, length = before + after, len(before) + len(after) - 1
        tokens[row, :length], following[row, :length] = whole[:-1], whole[1:]
        scored[row, len(before) - 1 : length] = True
    return Requests(tokens, following, scored)


def score(
    name: str, questions: Sequence[_Question], requests: Requests, *, logprob: Doubles, greedy: Marks
) -> dict[str, float]:
    """The task's metrics, from the log-probability of each `requests.next` and whether it is the likeliest token.

    What stands where nothing is scored has no effect. Raises CheckpointError where a log-probability is not a number.
    """
    sums: Doubles = np.where(requests.scored, logprob, 0.0).sum(axis=1)
    bad = np.flatnonzero(np.isnan(sums))
    if bad.size:
        raise CheckpointError(f"{name}: the likelihood of row {bad[0]} is nan, expected a number; check the weights.")
    found = {"questions": len(questions)}
    if name == "lambada":
        exact = np.asarray((greedy | ~requests.scored).all(axis=1))
        with np.errstate(over="ignore"):
            return {**found, **share("accuracy", exact), "perplexity": float(np.exp(-sums.mean()))}
    with np.errstate(divide="ignore"):  # an ending of nothing but marks has no characters; it is never the likeliest
        normalised: Doubles = sums / np.concatenate([question.lengths for question in questions])
    plain, norm = chosen(questions, sums), chosen(questions, normalised)
    return {**found, **share("accuracy", plain), **share("accuracy_norm", norm)}


def chosen(questions: Sequence[_Question], values: Doubles) -> Marks:
    """For each question whether the right choice has the highest value; of equal ones the first counts."""
    rows = np.split(values, np.cumsum([len(question.pairs) for question in questions])[:-1])
    return np.array([row.argmax() == question.answer for row, question in zip(rows, questions, strict=True)])


def share(name: str, right: Marks) -> dict[str, float]:
    """The share of right answers, and its standard error, which a single one does not have (nan)."""
    error = right.std(ddof=1) / math.sqrt(len(right)) if len(right) > 1 else math.nan
    return {name: float(right.mean()), f"{name}_error": float(error)}

"""What a model's answers come to, counted as EleutherAI's lm-evaluation-harness does.

Source: lm_eval 0.4.13: api/task.py, api/metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neoxconv.dtypes import Doubles
from neoxconv.errors import CheckpointError
from neoxconv.verify.tasks.exercises import TASKS
from neoxconv.verify.tasks.questions import Marks, Question, Requests


@dataclass(frozen=True)
class _Answers:
    """Of every pair of the questions: its likelihood's logarithm, and whether each of its tokens is the likeliest."""

    questions: Sequence[Question]
    sums: Doubles
    exact: Marks

    def chosen(self, values: Doubles) -> Marks:
        """For each question whether the right choice has the highest value; of equal ones the first counts."""
        rows = np.split(values, np.cumsum([len(question.pairs) for question in self.questions])[:-1])
        return np.array([row.argmax() == question.answer for row, question in zip(rows, self.questions, strict=True)])

    def share(self, name: str, right: Marks) -> dict[str, float]:
        """The share of right answers, and its standard error: within subjects where there are any, as in the harness.

        A single question of each subject leaves none (nan).
        """
        subjects = np.unique([question.subject for question in self.questions], return_inverse=True)[1]
        means = np.bincount(subjects, right) / np.bincount(subjects)
        freedom = len(right) - len(means)
        squares = float(np.square(right - means[subjects]).sum())
        error = math.sqrt(squares / freedom / len(right)) if freedom else math.nan
        return {name: float(right.mean()), f"{name}_error": error}


def _exact(answers: _Answers) -> dict[str, float]:
    """How often every token of the word is the likeliest."""
    return answers.share("accuracy", answers.exact)


def _perplexity(answers: _Answers) -> dict[str, float]:
    """Of a word."""
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(-answers.sums.mean()))}


def _accuracy(answers: _Answers) -> dict[str, float]:
    """How often the right choice is the likeliest."""
    return answers.share("accuracy", answers.chosen(answers.sums))


def _accuracy_norm(answers: _Answers) -> dict[str, float]:
    """How often it is the likeliest for its number of characters."""
    lengths = np.concatenate([question.lengths for question in answers.questions])
    with np.errstate(divide="ignore"):  # an ending of nothing but marks has no characters; it is never the likeliest
        return answers.share("accuracy_norm", answers.chosen(answers.sums / lengths))


METRICS: dict[str, Callable[[_Answers], dict[str, float]]] = {
    "exact": _exact,
    "perplexity": _perplexity,
    "accuracy": _accuracy,
    "accuracy_norm": _accuracy_norm,
}


def score(
    name: str, questions: Sequence[Question], requests: Requests, *, logprob: Doubles, greedy: Marks
) -> dict[str, float]:
    """The task's metrics, from the log-probability of each `requests.next` and whether it is the likeliest token.

    What stands where nothing is scored has no effect. Raises CheckpointError where a log-probability is not a number.
    """
    sums: Doubles = np.where(requests.scored, logprob, 0.0).sum(axis=1)
    bad = np.flatnonzero(np.isnan(sums))
    if bad.size:
        raise CheckpointError(f"{name}: the likelihood of row {bad[0]} is nan, expected a number; check the weights.")
    answers = _Answers(questions, sums, np.asarray((greedy | ~requests.scored).all(axis=1)))
    found: dict[str, float] = {"questions": len(questions)}
    for metric in TASKS[name].metrics:
        found |= METRICS[metric](answers)
    return found

"""Both models' answers to a task's questions: how often each is right, as EleutherAI's evaluation harness counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Doubles
from neoxconv.errors import PlanError
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage.remote import Place
from neoxconv.verify.logits.compare import run_both
from neoxconv.verify.logits.engines import ENGINES
from neoxconv.verify.logits.metrics import Running, as_array
from neoxconv.verify.logits.tokens import library
from neoxconv.verify.tasks.questions import Marks, Requests, read_task, requests, score

TOGETHER = 1 << 14  # tokens that one pass over the weights serves
SIDES = ("reference", "candidate")


@dataclass(frozen=True)
class Exam:
    """A task's metrics by side: accuracy and its standard error, and what else the task has."""

    task: str
    data: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A line for each metric: its name, and both sides' with their standard errors."""
        ours, theirs = (self.scores[side] for side in SIDES)
        names = [name for name in ours if not name.endswith("_error")]
        return [(f"{self.task} {name}", *(with_error(scores, name) for scores in (ours, theirs))) for name in names]


def with_error(scores: Mapping[str, float], name: str) -> str:
    """A metric, with its standard error where it has one."""
    error = scores.get(f"{name}_error")
    return f"{scores[name]:.6g}" if error is None else f"{scores[name]:.4f} +- {error:.4f}"


def examine(source: Checkpoint, candidate: Checkpoint, target: Place, given: Mapping[str, Any]) -> Exam:
    """Both sides' scores on the task that the options name. Raises PlanError where the source has no tokenizer."""
    words = tokenizer_of(source)
    if words is None:
        raise PlanError(f"{source.index.folder}: has no tokenizer, which --task needs; put its tokenizer.json there.")
    name, data = given["task"], given["data"]
    questions = read_task(name, data, library(words), source.config.context, given["sequences"])
    asked = requests(questions)
    engine, device = ENGINES.get(given["engine"]), given["device"] or "cpu"
    parts = []
    for band in bands(asked):
        following = np.where(band.scored, band.next, -1)
        logits = engine(target, candidate, band.tokens) if engine else None
        _, found = run_both(source, candidate, (band.tokens, following), device, lambda count: None, logits)
        parts.append([answers(side, band.tokens.shape) for side in (found.reference, found.candidate)])
    sides = [[np.concatenate(column) for column in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
    scores = {side: score(name, questions, asked, *both) for side, both in zip(SIDES, sides, strict=True)}
    return Exam(name, data.name, scores)


def bands(asked: Requests) -> Iterator[Requests]:
    """The rows in groups that one pass takes."""
    step = max(1, TOGETHER // asked.tokens.shape[1])
    for start in range(0, len(asked.tokens), step):
        rows = slice(start, start + step)
        yield Requests(asked.tokens[rows], asked.next[rows], asked.scored[rows])


def answers(side: Running, shape: tuple[int, ...]) -> tuple[Doubles, Marks]:
    """The log-probability of each right word, 0 where none is asked for, and whether it is the likeliest."""
    chance = np.where(side.right.cpu().numpy() < 0, 0.0, as_array(side.log_probability))
    return chance.reshape(shape), (side.words[:, 0] == side.right).cpu().numpy().reshape(shape)

"""Both models' answers to a task's questions: how often each is right, as EleutherAI's evaluation harness counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Doubles
from neoxconv.errors import PlanError
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import Place
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.compare import run_both
from neoxconv.verify.logits.metrics import Softmax, as_array
from neoxconv.verify.logits.tokens import blamed, library
from neoxconv.verify.logits.trial import NATIVE, Engine, Task
from neoxconv.verify.tasks.questions import Marks, Requests, read_task, requests, score

TOGETHER = 1 << 14  # tokens that one pass over the weights serves; a stream of the 20B model is then 400 MB
_SIDES = ("reference", "candidate")


@dataclass(frozen=True)
class _Exam:
    """A task's metrics by side: accuracy and its standard error, and what else the task has."""

    task: str
    data: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A line for each metric: its name, and both sides' with their standard errors."""
        ours, theirs = (self.scores[side] for side in _SIDES)
        names = [name for name in ours if not name.endswith("_error")]
        return [(f"{self.task} {name}", *(_with_error(scores, name) for scores in (ours, theirs))) for name in names]


def _with_error(scores: Mapping[str, float], name: str) -> str:
    """A metric, with its standard error where it has one."""
    error = scores.get(f"{name}_error")
    return f"{scores[name]:.6g}" if error is None else f"{scores[name]:.4f} +- {error:.4f}"


def examine(
    source: Checkpoint,
    candidate: Checkpoint,
    task: Task,
    *,
    target: Place,
    engine: Engine = NATIVE,
    device: str = "cpu",
) -> _Exam:
    """Both sides' scores on a task, the candidate's, which lies at `target`, by `engine`.

    Raises PlanError where the source has no tokenizer, and what reading the task and asking the engine raise.
    """
    words = tokenizer_of(source)
    if words is None:
        raise PlanError(f"{source.index.folder}: has no tokenizer, which --task needs; put its tokenizer.json there.")
    made = library(words)
    with blamed(words):
        questions = read_task(task.name, task.data, made, context=source.config.context, limit=task.limit)
    asked = requests(questions)
    parts = []
    with nullcontext() if engine.native else program(engine, target, candidate) as ask:
        for band in bands(asked):
            following = np.where(band.scored, band.next, -1)
            logits = ask(band.tokens) if ask else None
            _, both = run_both(source, candidate, band.tokens, following, device=device, logits=logits)
            parts.append([answers(side, band.tokens.shape) for side in (both.reference, both.candidate)])
    scores = {}
    for side, found in zip(_SIDES, zip(*parts, strict=True), strict=True):
        logprob, greedy = (np.concatenate(column) for column in zip(*found, strict=True))
        scores[side] = score(task.name, questions, asked, logprob=logprob, greedy=greedy)
    return _Exam(task.name, task.data.name, scores)


def bands(asked: Requests) -> Iterator[Requests]:
    """The rows in groups that one pass takes."""
    step = max(1, TOGETHER // asked.tokens.shape[1])
    for start in range(0, len(asked.tokens), step):
        rows = slice(start, start + step)
        yield Requests(asked.tokens[rows], asked.next[rows], asked.scored[rows])


def answers(side: Softmax, shape: tuple[int, ...]) -> tuple[Doubles, Marks]:
    """The log-probability of each right word, 0 where none is asked for, and whether it is the likeliest."""
    chance = np.where(side.right.cpu().numpy() < 0, 0.0, as_array(side.log_probability))
    return chance.reshape(shape), (side.words[:, 0] == side.right).cpu().numpy().reshape(shape)

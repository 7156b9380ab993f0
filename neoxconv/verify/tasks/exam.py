"""All models' answers to a task's questions: how often each is right, as EleutherAI's evaluation harness counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Doubles, Numbers
from neoxconv.errors import PlanError
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import Place
from neoxconv.verify.engines.child import program
from neoxconv.verify.logits.alone import predicted
from neoxconv.verify.logits.compare import Logits
from neoxconv.verify.logits.metrics import Softmax, as_array
from neoxconv.verify.logits.tokens import blamed, library
from neoxconv.verify.logits.trial import NATIVE, Engine, Task
from neoxconv.verify.tasks.questions import Marks, Requests, read_task, requests
from neoxconv.verify.tasks.scores import score

TOGETHER = 1 << 14  # tokens that one pass over the weights serves; a stream of the 20B model is then 400 MB
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Exam:
    """A task's metrics by side: accuracy and its standard error, and what else the task has."""

    task: str
    data: str
    shots: int
    scores: Mapping[str, Scores]  # of the reference and the candidate

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A line for each metric: its name, and both sides' with their standard errors."""
        sides = list(self.scores.values())
        names = [name for name in sides[0] if not name.endswith("_error")]
        return [(f"{self.task} {name}", *(with_error(scores, name) for scores in sides)) for name in names]


def with_error(scores: Scores, name: str) -> str:
    """A metric, with its standard error where it has one."""
    error = scores.get(f"{name}_error")
    return f"{scores[name]:.6g}" if error is None else f"{scores[name]:.4f} +- {error:.4f}"


def examine(
    source: Checkpoint,
    candidates: Sequence[tuple[Place, Checkpoint]],
    task: Task,
    *,
    engine: Engine = NATIVE,
    device: str = "cpu",
) -> list[Exam]:
    """The source's scores on a task beside every candidate's; these, with where they lie, are run by `engine`.

    Raises PlanError where the source has no tokenizer, and what reading the task and asking the engine raise.
    """
    words = tokenizer_of(source)
    if words is None:
        raise PlanError(f"{source.index.folder}: has no tokenizer, which --task needs; put its tokenizer.json there.")
    made = library(words)
    with blamed(words):
        questions = read_task(task, made, context=source.config.context)
    asked = requests(questions)

    def scores(model: Checkpoint, ask: Callable[[Numbers], Logits] | None = None) -> Scores:
        logprob, greedy = _answers(model, asked, ask, device)
        return score(task.name, questions, asked, logprob=logprob, greedy=greedy)

    ours, found = scores(source), []
    for target, candidate in candidates:
        with nullcontext() if engine.native else program(engine, target, candidate) as ask:
            sides = {"reference": ours, "candidate": scores(candidate, ask)}
        found.append(Exam(task.name, task.data.name, task.shots, sides))
    return found


def _answers(
    model: Checkpoint, asked: Requests, ask: Callable[[Numbers], Logits] | None, device: str
) -> tuple[Doubles, Marks]:
    """A model's `answers` to all rows; another engine is asked by `ask`."""
    parts = []
    for band in bands(asked):
        following = np.where(band.scored, band.next, -1)
        logits = ask(band.tokens) if ask else None
        parts.append(answers(predicted(model, band.tokens, following, device=device, logits=logits), band.tokens.shape))
    logprob, greedy = zip(*parts, strict=True)
    return np.concatenate(logprob), np.concatenate(greedy)


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

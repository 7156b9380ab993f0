"""Questions in text, by the rules of EleutherAI's lm-evaluation-harness, with examples before them where asked for.

    lambada    {"text"}                            the last word: right where each of its tokens is the likeliest one
    piqa       {"goal", "sol1", "sol2", "label"}   two solutions: right where the right one is the likelier
    hellaswag  {"activity_label", "ctx_a", "ctx_b", "endings", "label"}    endings: likewise
    mmlu       {"subject", "question", "choices", "answer"}    four choices, of which the letter is asked: likewise

Source: lm_eval 0.4.13: the tasks lambada_openai, piqa, hellaswag and mmlu; api/task.py, api/samplers.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import NamedTuple

from neoxconv.errors import CheckpointError, PlanError
from neoxconv.verify.logits.trial import Task
from neoxconv.verify.tasks.lines import Line, lines
from neoxconv.words import plural

_SEED = 1234  # with which the harness draws examples
_LETTERS = "ABCD"


class Exercise(NamedTuple):
    """A question in text: what comes before, the continuations by their fields' names, and the right one's number.

    Of a `subject` are the examples before it, and the standard error is that within the subjects; `intro` stands first.
    """

    context: str
    choices: dict[str, str]
    answer: int
    subject: str = ""
    intro: str = ""


def _lambada(line: Line) -> Exercise:
    """All before the last space, and the word after it."""
    context, _, word = line.text("text").rpartition(" ")
    if not word:
        raise line.wrong("text", "a word", "has nothing after its last space")
    return Exercise(context, {"text": word}, 0)


def _piqa(line: Line) -> Exercise:
    """The goal as a question, and two solutions."""
    choices = {field: line.text(field) for field in ("sol1", "sol2")}
    return Exercise(f"Question: {line.text('goal', empty=True)}\nAnswer:", choices, line.number("label", 2))


def _hellaswag(line: Line) -> Exercise:
    """The activity and what has happened so far, and the endings. `ctx_b` gets one capital, the first, and no other."""
    activity, before, after = (line.text(field, empty=True) for field in ("activity_label", "ctx_a", "ctx_b"))
    endings = line.texts("endings")
    choices = {f"endings[{number}]": _cleaned(ending) for number, ending in enumerate(endings)}
    answer = line.number("label", len(endings))
    return Exercise(_cleaned(f"{activity}: {before} {after.capitalize()}"), choices, answer)


def _cleaned(text: str) -> str:
    """The text without WikiHow's marks in brackets, of which a title ends a sentence."""
    unmarked = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return unmarked.replace("  ", " ")


def _mmlu(line: Line) -> Exercise:
    """The question with its choices as a list, and their letters."""
    question, subject = line.text("question").strip(), line.text("subject")
    listed = zip(_LETTERS, line.texts("choices", len(_LETTERS)), strict=True)
    context = "\n".join([question, *(f"{letter}. {choice}" for letter, choice in listed), "Answer:"])
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    choices = {f"choices[{number}]": letter for number, letter in enumerate(_LETTERS)}
    return Exercise(context, choices, line.number("answer", len(_LETTERS)), subject, about)


class Rules(NamedTuple):
    """How a task's lines become exercises, what is counted (keys of `scores.METRICS`), and how examples are shown.

    They are drawn `by_lot` for each question, or the first of its subject. With a `spare` one more is drawn, and what
    equals the question is put away. `gap` stands before their answers.
    """

    read: Callable[[Line], Exercise]
    metrics: tuple[str, ...]
    by_lot: bool = True
    spare: int = 0
    gap: str = " "


_CHOICES = ("accuracy", "accuracy_norm")
TASKS = {
    "lambada": Rules(_lambada, ("exact", "perplexity"), gap="  "),  # the harness puts a space before one that is there
    "piqa": Rules(_piqa, _CHOICES, spare=1),
    "hellaswag": Rules(_hellaswag, _CHOICES, spare=1),
    "mmlu": Rules(_mmlu, ("accuracy",), by_lot=False),
}


def rules_of(task: Task) -> Rules:
    """The rules of a task. Raises PlanError for an unknown one, for an impossible limit, and without examples."""
    if task.name not in TASKS:
        raise PlanError(f"{task.name!r:.40} is no task; choose one of {', '.join(TASKS)}.")
    if task.limit is not None and task.limit < 1:
        raise PlanError(f"a limit of {task.limit} leaves no questions; give 1 or more, or no limit.")
    if task.shots and task.shots_data is None:
        raise PlanError(f"{plural(task.shots, 'example')} before each question: give a file to take them from.")
    return TASKS[task.name]


def exercises(task: Task) -> list[tuple[Line, Exercise]]:
    """The task's lines and what they ask, with the examples in the context.

    Raises PlanError as `rules_of`, CheckpointError where a line is not as the task has them or examples are missing.
    """
    rules = rules_of(task)
    found = [(line, rules.read(line)) for line in islice(lines(task.data), task.limit)]
    if not found:
        raise CheckpointError(f"{task.data}: holds no lines, expected questions of {task.name}; give another file.")
    examples = _examples(task, rules, found) if task.shots else [[]] * len(found)
    return [(line, _behind(each, before, rules.gap)) for (line, each), before in zip(found, examples, strict=True)]


def _behind(exercise: Exercise, examples: Sequence[Exercise], gap: str) -> Exercise:
    """The exercise with what stands before it in its context."""
    shown = [f"{each.context}{gap}{list(each.choices.values())[each.answer]}\n\n" for each in examples]
    return exercise._replace(context="".join([exercise.intro, *shown, exercise.context]))


_Read = tuple[Line, Exercise]


def _examples(task: Task, rules: Rules, asked: Sequence[_Read]) -> Iterator[list[Exercise]]:
    """The examples before each exercise, in the harness's order. Raises CheckpointError where there are too few."""
    assert task.shots_data
    pool: dict[str, list[_Read]] = defaultdict(list)
    for line in lines(task.shots_data):
        example = rules.read(line)
        pool[example.subject].append((line, example))
    lots = Random(_SEED)
    for line, exercise in asked:
        fitting = pool[exercise.subject]
        if len(fitting) < task.shots + rules.spare:
            of = f" of {exercise.subject}" if exercise.subject else ""
            raise CheckpointError(
                f"{task.shots_data}: has {plural(len(fitting), 'example')}{of}, expected {task.shots + rules.spare} "
                "or more; give another file, or fewer --shots."
            )
        found = _drawn(lots, rules, fitting, line, task.shots) if rules.by_lot else fitting[: task.shots]
        yield [example for _, example in found]


def _drawn(lots: Random, rules: Rules, pool: list[_Read], question: Line, count: int) -> list[_Read]:
    """Examples by lot, as the harness's sampler draws them."""

    def others(read: Sequence[_Read]) -> list[_Read]:
        return [each for each in read if each[0].fields != question.fields]

    drawn = lots.sample(pool, count + rules.spare)
    found = others(drawn)[:count] if rules.spare else drawn
    return found if len(found) == count else lots.sample(others(pool), count)

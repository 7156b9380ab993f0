"""Tasks: read, asked and scored as EleutherAI's lm-evaluation-harness does, and malformed data refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.synthetic import tiny
from neoxconv.verify.logits.trial import Task
from neoxconv.verify.tasks import questions as tasks
from neoxconv.verify.tasks.exercises import TASKS, exercises
from neoxconv.verify.tasks.scores import score
from tests.golden import make_tasks
from tests.golden.make_tasks import CONTEXT, GOLDEN, golden, golden_shots, jsonl, logits
from tests.toy import toy

NAMES = ("lambada", "piqa", "hellaswag")
SHOTS = tuple(make_tasks.SHOTS)
METRICS = {"accuracy": "acc", "accuracy_error": "acc_stderr", "accuracy_norm": "acc_norm"}
METRICS |= {"accuracy_norm_error": "acc_norm_stderr", "perplexity": "perplexity"}
GOOD = {
    "lambada": {"text": "It is what it is"},
    "piqa": {"goal": "sleep", "sol1": "lie down", "sol2": "run", "label": 0},
    "hellaswag": {"activity_label": "A", "ctx_a": "B.", "ctx_b": "", "endings": ["c", "d", "e"], "label": "2"},
    "mmlu": {"subject": "tea", "question": "Hot?", "choices": ["no", "yes", "a", "b"], "answer": 1},
}
each = pytest.mark.parametrize("name", NAMES)


def tokenizer() -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_str(tiny().data.decode())


def recorded(name: str, part: str = "tasks") -> dict[str, Any]:
    """What the harness made of our data."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))[part][name]
    return found


def read(name: str, text: str | bytes, folder: Path, *, context: int = CONTEXT, limit: int | None = None) -> Any:
    """The questions of data with this text."""
    data = folder / "data.jsonl"
    data.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tasks.read_task(Task(name, data, limit), tokenizer(), context=context)


def with_shots(name: str, folder: Path) -> Task:
    """A task with examples before its questions, as it was recorded."""
    task, count, _, pool = make_tasks.SHOTS[name]
    data, examples = folder / "data.jsonl", folder / "pool.jsonl"
    data.write_text(recorded(name, "shots")["data"], encoding="utf-8")
    examples.write_text(recorded(name, "shots")["pool"], encoding="utf-8")
    return Task(task, data, shots=count, shots_data=examples if pool else None)


def changed(name: str, **changes: Any) -> str:
    """A good line and then one with other values; None removes the field."""
    line = {field: value for field, value in {**GOOD[name], **changes}.items() if value is not None}
    return json.dumps(GOOD[name]) + "\n" + json.dumps(line)


def check_metrics(found: dict[str, float], metrics: dict[str, float]) -> None:
    """The harness names a metric with its filter, which is none."""
    expected = {ours: metrics[f"{theirs},none"] for ours, theirs in METRICS.items() if f"{theirs},none" in metrics}
    assert found == pytest.approx({"questions": metrics["sample_len"], **expected}, rel=1e-5)


@each
def test_the_harness_asks_the_same(name: str, tmp_path: Path) -> None:
    questions, theirs = read(name, recorded(name)["data"], tmp_path), recorded(name)
    ours = [(list(before), list(after)) for question in questions for before, after in question.pairs]
    assert recorded(name)["data"] == jsonl(make_tasks.TASKS[name][2])
    asked = zip(theirs["contexts"], theirs["continuations"], strict=True)
    assert ours == [(before[-(CONTEXT + 1 - len(after)) :], after) for before, after in asked]
    assert any(len(before) < len(whole) for (before, _), whole in zip(ours, theirs["contexts"], strict=True))


@each
def test_rows_are_those_that_the_harness_runs(name: str, tmp_path: Path) -> None:
    asked, theirs = tasks.requests(read(name, recorded(name)["data"], tmp_path)), recorded(name)
    for row, (before, after) in enumerate(zip(theirs["contexts"], theirs["continuations"], strict=True)):
        inputs = (before + after)[-(CONTEXT + 1) :][:-1]
        padding = [0] * (asked.tokens.shape[1] - len(inputs))
        assert asked.tokens[row].tolist() == inputs + padding
        assert asked.next[row].tolist() == [*inputs[1:], after[-1], *padding]
        assert asked.next[row][asked.scored[row]].tolist() == after
        assert not asked.scored[row, len(inputs) :].any()


@each
def test_the_harnesses_likelihoods_make_its_metrics(name: str, tmp_path: Path) -> None:
    questions, theirs = read(name, recorded(name)["data"], tmp_path), recorded(name)
    asked = tasks.requests(questions)
    first = asked.scored & (asked.scored.cumsum(axis=1) == 1)
    logprob = np.where(first, np.array(theirs["loglikelihoods"])[:, None], np.where(asked.scored, 0.0, np.nan))
    greedy = np.where(first, np.array(theirs["greedy"])[:, None], asked.scored)
    check_metrics(score(name, questions, asked, logprob=logprob, greedy=greedy), theirs["metrics"])


@each
def test_a_model_scores_as_in_the_harness(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    questions, theirs = read(name, recorded(name)["data"], tmp_path), recorded(name)
    asked = tasks.requests(questions)
    logprob, greedy = answered(asked)
    assert np.where(asked.scored, logprob, 0).sum(axis=1) == pytest.approx(theirs["loglikelihoods"], rel=1e-5)
    assert (greedy | ~asked.scored).all(axis=1).tolist() == theirs["greedy"]
    check_metrics(score(name, questions, asked, logprob=logprob, greedy=greedy), theirs["metrics"])


def answered(asked: tasks.Requests) -> tuple[Any, Any]:
    """The recorded model's answers: the log-probability of each right word, and whether it is the likeliest."""
    found = logits(asked.tokens)
    all_logprob = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
    logprob = np.take_along_axis(all_logprob, asked.next[..., None], axis=-1)[..., 0]
    return logprob, found.argmax(axis=-1) == asked.next


@pytest.mark.parametrize("name", SHOTS)
def test_the_harness_shows_the_same_examples_and_asks_the_same(name: str, tmp_path: Path) -> None:
    theirs, found = recorded(name, "shots"), [exercise for _, exercise in exercises(with_shots(name, tmp_path))]
    assert [exercise.context for exercise in found] == theirs["contexts"]
    assert [f" {choice}" for exercise in found for choice in exercise.choices.values()] == theirs["continuations"]


@pytest.mark.parametrize("name", SHOTS)
def test_a_model_with_examples_scores_as_in_the_harness(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    task, theirs = with_shots(name, tmp_path), recorded(name, "shots")
    questions = tasks.read_task(task, tokenizer(), context=CONTEXT)
    asked = tasks.requests(questions)
    logprob, greedy = answered(asked)
    assert np.where(asked.scored, logprob, 0).sum(axis=1) == pytest.approx(theirs["loglikelihoods"], rel=1e-5)
    check_metrics(score(task.name, questions, asked, logprob=logprob, greedy=greedy), theirs["metrics"])


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(GOOD["mmlu"]))
    with pytest.raises(CheckpointError, match="has 1 example of tea, expected 2 or more; give another file, or fewer"):
        exercises(Task("mmlu", data, shots=2, shots_data=data))
    with pytest.raises(PlanError, match="3 examples before each question: give a file"):
        exercises(Task("mmlu", data, shots=3))


@each
def test_the_recorded_metrics_tell_the_rules_apart(name: str) -> None:
    metrics = recorded(name)["metrics"]
    assert 0 < metrics["acc,none"] < 1
    assert metrics["acc,none"] != metrics.get("acc_norm,none")


@pytest.mark.oracle
@each
def test_the_harness_makes_the_same_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    found, before = golden(name, tmp_path), recorded(name)
    for key in ("data", "contexts", "continuations", "greedy"):
        assert found[key] == before[key]
    assert found["loglikelihoods"] == pytest.approx(before["loglikelihoods"], rel=1e-5)
    assert found["metrics"] == pytest.approx(before["metrics"], rel=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", SHOTS)
def test_the_harness_shows_the_same_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    found, before = golden_shots(name, tmp_path), recorded(name, "shots")
    assert found["contexts"] == before["contexts"]
    assert found["loglikelihoods"] == pytest.approx(before["loglikelihoods"], rel=1e-5)
    assert found["metrics"] == pytest.approx(before["metrics"], rel=1e-5)


def test_without_a_context_the_end_of_text_stands_for_it(tmp_path: Path) -> None:
    end = tokenizer().token_to_id("<|endoftext|>")
    for text in ("t", "  t"):
        (question,) = read("lambada", json.dumps({"text": text}), tmp_path)
        assert question.pairs[0][0] == (end,)
        assert tokenizer().decode(question.pairs[0][1]) == text.rjust(2)


def test_the_context_is_cut_to_what_the_model_holds(tmp_path: Path) -> None:
    line = json.dumps({"text": "a b c d e f xyz"})
    (whole,), (cut,) = (read("lambada", line, tmp_path, context=context) for context in (64, 4))
    (before, after), (kept, same) = whole.pairs[0], cut.pairs[0]
    assert len(after) == 4 and same == after
    assert kept == before[-1:]
    with pytest.raises(CheckpointError, match=r"line 1: text ends in a choice of 4 tokens, expected 1 to 3; "):
        read("lambada", line, tmp_path, context=3)


def test_limit_blank_lines_and_line_ends(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"count to {word}"}) for word in ("one", "two", "six")]
    text = b"\xef\xbb\xbf" + "\r\n".join([lines[0], " ", lines[1], "", lines[2], "not JSON"]).encode()
    assert read("lambada", text, tmp_path, limit=3) == read("lambada", "\n".join(lines), tmp_path)
    with pytest.raises(CheckpointError, match=r"data.jsonl: line 6: is not JSON"):
        read("lambada", text, tmp_path)


@pytest.mark.parametrize("label", [1, "1"])
@pytest.mark.parametrize("name", ["piqa", "hellaswag"])
def test_a_label_is_a_number_or_its_text(name: str, label: int | str, tmp_path: Path) -> None:
    assert read(name, changed(name, label=label), tmp_path)[1].answer == 1


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("lambada", {"text": None}, "text is missing, expected text, not empty"),
        ("lambada", {"text": 5}, "text is 5, expected text, not empty"),
        ("lambada", {"text": ""}, "text is '', expected text, not empty"),
        ("lambada", {"text": "so it ends "}, "text has nothing after its last space, expected a word"),
        ("lambada", {"text": "half a \ud83d"}, r"text is 'half a \ud83d', expected text, not empty"),
        ("piqa", {"goal": None}, "goal is missing, expected text"),
        ("piqa", {"goal": ["sleep"]}, "goal is ['sleep'], expected text"),
        ("piqa", {"sol2": ""}, "sol2 is '', expected text, not empty"),
        ("piqa", {"sol1": "x" * 65}, "sol1 ends in a choice of 66 tokens, expected 1 to 64"),
        ("piqa", {"label": None}, "label is missing, expected a number from 0 to 1"),
        ("piqa", {"label": 2}, "label is 2, expected a number from 0 to 1"),
        ("piqa", {"label": -1}, "label is -1, expected a number from 0 to 1"),
        ("piqa", {"label": 1.0}, "label is 1.0, expected a number from 0 to 1"),
        ("piqa", {"label": True}, "label is True, expected a number from 0 to 1"),
        ("piqa", {"label": "one"}, "label is 'one', expected a number from 0 to 1"),
        ("hellaswag", {"label": ""}, "label is '', expected a number from 0 to 2"),
        ("hellaswag", {"label": "3"}, "label is '3', expected a number from 0 to 2"),
        ("hellaswag", {"ctx_b": None}, "ctx_b is missing, expected text"),
        ("hellaswag", {"activity_label": 1}, "activity_label is 1, expected text"),
        ("hellaswag", {"endings": "abc"}, "endings is 'abc', expected a list of two or more texts, none empty"),
        ("hellaswag", {"endings": ["a"]}, "endings is ['a'], expected a list of two or more texts, none empty"),
        ("hellaswag", {"endings": ["a", ""]}, "endings is ['a', ''], expected a list of two or more texts, none empty"),
        ("mmlu", {"choices": ["a", "b"]}, "choices is ['a', 'b'], expected a list of 4 texts, none empty"),
        ("mmlu", {"answer": 4}, "answer is 4, expected a number from 0 to 3"),
        ("hellaswag", {"endings": ["a", 1]}, "endings is ['a', 1], expected a list of two or more texts, none empty"),
    ],
)
def test_a_malformed_field_is_named(name: str, changes: dict[str, Any], found: str, tmp_path: Path) -> None:
    message = f"{tmp_path / 'data.jsonl'}: line 2: {found}; correct the line, or give another file."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        read(name, changed(name, **changes), tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "data.jsonl: holds no lines, expected questions of lambada; "),
        (b"\n{", "data.jsonl: line 2: is not JSON ("),
        (b'{"text": "\xff"}', "data.jsonl: line 1: is not JSON ("),
        (b"[" * 100_000, "data.jsonl: line 1: is not JSON ("),
        (b'["text"]', "data.jsonl: line 1: is ['text'], expected a JSON object in UTF-8; "),
    ],
)
def test_what_is_no_jsonl_is_refused(text: bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(found)):
        read("lambada", text, tmp_path)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'arc' is no task; choose one of lambada, piqa, hellaswag, mmlu"):
        read("arc", "", tmp_path)
    with pytest.raises(PlanError, match="a limit of 0 leaves no questions"):
        read("piqa", changed("piqa"), tmp_path, limit=0)
    with pytest.raises(CheckpointError, match=r"absent\.jsonl: cannot be opened"):
        tasks.read_task(Task("piqa", tmp_path / "absent.jsonl"), tokenizer(), context=CONTEXT)


def test_extreme_scores(tmp_path: Path) -> None:
    questions = read("lambada", changed("lambada"), tmp_path, limit=1)
    asked = tasks.requests(questions)
    found = score("lambada", questions, asked, logprob=np.full(asked.next.shape, -1e3), greedy=asked.scored)
    assert (found["questions"], found["accuracy"], found["perplexity"]) == (1, 1.0, math.inf)
    assert math.isnan(found["accuracy_error"])
    with pytest.raises(CheckpointError, match="lambada: the likelihood of row 0 is nan, expected a number"):
        score("lambada", questions, asked, logprob=np.full(asked.next.shape, np.nan), greedy=asked.scored)


def test_both_sides_sit_the_exam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    target = run(make_plan(open_checkpoint(source), Recipe("hf", dtype="F32")), tmp_path / "hf")
    data = tmp_path / "data.jsonl"
    for name in TASKS:
        data.write_text("\n".join(json.dumps(GOOD[name]) for _ in range(3)))
        command = [
            "verify",
            str(source),
            str(target),
            "--level",
            "logits",
            "--task",
            name,
            "--data",
            str(data),
            "--json",
        ]
        assert main(command) == 0
        ours, theirs = json.loads(capsys.readouterr().out)["levels"][-1]["task"]["scores"].values()
        assert ours["questions"] == 3 and ours["accuracy"] == theirs["accuracy"]
        assert name != "lambada" or ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    assert main([*command[:5], "--task", "piqa"]) == 2
    assert "--task and --data belong together" in capsys.readouterr().err
    assert main([*command, "--shots", "1"]) == 2
    assert "--shots and --shots-data belong together" in capsys.readouterr().err

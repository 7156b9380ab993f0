"""Make tasks.json: questions of our own, and what EleutherAI's lm-evaluation-harness makes of them.

    python -m tests.golden.make_tasks      # where lm_eval and transformers are installed

The model is a random one whose weights any Python draws again; the tokenizer is `neoxconv.synthetic.tiny`.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neoxconv.formats.tokenizer import END
from neoxconv.synthetic import tiny

GOLDEN = Path(__file__).with_name("tasks.json")
CONTEXT = 64
HIDDEN = 64
LIKELY = {"Ġt": 4, "Ġa": 4, "Ġthe": 4, "Ġand": 4, "in": 2, "re": 2}

# What a line is there for stands behind it. Some last words are such as the model itself goes on with.
LAMBADA = [
    "The baker opened his door at five, long before the street was awake, and lit the oven",
    "She looked for the key in the drawer, under the mat tin",  # right, in two tokens
    "Nobody on the ferry had seen so much fog in March, and the captain least of all of the",  # too long, right
    "t",  # nothing before it, right
    "He counted the coins twice  and",  # two spaces before the last word
    "They left at noon\n\nand came back by night\nsinging",  # the last word begins in the line above
    "Zoë kept the café open — até às dez — for the naïve",  # characters of two and three bytes
    "\n <|endoftext|>A letter came for the old and",  # white space and a special token at its start, right
    "The rain beat on the roof, and we  \n the",  # white space of two kinds before the last word
    "In the end all that was left of the house was a",
    "The children ran down to the river, threw off their shoes and stood in andirons",  # only its first token right
    "It was the best of all the songs, he said, and he sang it to the end: tin",  # right
]
PIQA = [
    ("open a jar whose lid is stuck", "hold the lid under hot water", "hold the lid under cold sand", 0),
    ("keep cut apples from browning", "leave them in the sun", "sprinkle lemon juice on them", 1),
    ("dry a wet book", "stand it up", "iron it until the pages are quite dry", 0),
    ("", "do nothing", "do something", 1),  # no goal
    ("find a stud in a wall", "knock and listen for a bell that rings", "knock and listen", 1),
    ("mend a torn sail", " sew a patch on both sides", "glue it", 0),  # a choice that begins with a space
    ("cool a drink quickly", "wrap it in wool and put it by the fire", "put it on ice", 1),
    ("mark a path in snow\n", "drop flags", "drop flour, then sweep it up", 0),  # ends with a line break
    ("sharpen a pencil without a sharpener", "schneide mit dem Messer schräg", "bite it — gently", 0),  # 2-3 bytes
    ("weigh flour without scales", "use a cup whose weight you know", "use a cup", 0),  # one begins the other
    ("cross a stream on stones when the water is high and cold and fast", "wait", "jump", 0),  # too long
    ("light a candle deep in a jar", "light a stick of dry spaghetti first", "turn the jar over", 0),
]
WORDS = ("activity_label", "ctx_a", "ctx_b")
HELLASWAG = [
    ("Rowing", "Two men sit in a boat.", "they", ["pull at the oars.", "eat the oars.", "sing.", "drown."], 0),
    ("Baking", "A woman kneads dough.", "She", ["bakes it.", "wears it.", "paints it red.", "throws it away."], 0),
    ("Mowing", "A man pushes a mower.", "HE, of ALL men,", ["stops.", "flies.", "turns.", "reads."], 2),  # capitals
    ("Tea", "[header] How to brew tea [title] Boil water [step]", "", ["Pour.", "Sit.", "Cool it.", "Nap."], 0),
    ("Knots", "Hold the rope. [substeps] Cross it.", "", ["[step] Pull.", "[title] Cut.", "Let go.", "Burn it."], 0),
    ("Chess", "Black moves. [step]  ", "", ["White [title] mates.", "A fly", "  Both  sleep. ", "No"], 3),  # spaces
    ("Ski", "A man skis.", "il", ["tombe dans la neige épaisse.", "fällt — weich.", "jumps.", "waits."], 2),
    ("Golf", "She swings.", "the ball", ["[step]", "flies.", "melts.", "rolls."], 2),  # one of nothing but marks
    ("Dive", "He climbs up, looks down for a long, slow, long time and", "then", ["jumps.", "a", "b", "he cooks."], 3),
    ("Piano", "She sits.", "she", ["plays a long slow tune.", "plays.", "plays a tune.", "plays a long"], 2),
    ("Fish", "[a\nb] A boy waits.", "He [x [y] z]", ["reels.", "sings.", "[title] Then he sleeps.", "eats."], 0),
    ("Run", "They start.", "", ["They run.", "They run.", "They sit.", "They run."], 0),  # equal choices
]


# Examples that stand before a question are drawn from these; more than are asked for.
HELLASWAG_SHOTS = [
    ("Skating", "A girl laces her skates.", "she", ["glides off.", "eats them."], 0),
    ("Ice", "[header] How to cut ice [title] Saw it [step]", "", ["[step] Saw.", "Sing.", "Nap.  Then saw."], 2),
    ("Bread", "A man cuts bread.", "HE", ["weeps.", "butters it."], 1),
    ("Ladder", "Two boys lean a ladder on a wall.", "one", ["climbs — slowly.", "sleeps."], 0),
]
MMLU = [
    ("astronomy", "Which of these is a star?", ["Io", "Mars", "Vega", "Ceres"], 2),
    ("astronomy", "  The moon\n shows us ", ["one side", "two sides", "its back", " none "], 0),  # white space
    ("astronomy", "Light takes 8 minutes from", ["Sirius", "the sun", "Io", "the lamp"], 1),
    ("us_foreign_policy", "Who bought Alaska?", ["Texas", "Spain", "Zoë", "the United States"], 3),
    ("us_foreign_policy", "A treaty needs the", ["senate", "mayor", "press", "fleet"], 0),
]
MMLU_SHOTS = [  # the first of a subject are taken, in their order
    ("us_foreign_policy", "Containment was aimed at", ["trade", "the USSR", "Peru", "rain"], 1),
    ("astronomy", "A year is a turn around the", ["sun", "moon", "pole", "town"], 0),
    ("astronomy", " Rings are seen at ", ["Io", "Mars", "Vega", "Saturn"], 3),
    ("us_foreign_policy", "NATO was founded in", ["1949", "1812", "1776", "2001"], 0),
    ("astronomy", "Tides follow the", ["wind", "moon", "fish", "clock"], 1),
]


def documents(lines: list[Any], *names: str) -> list[dict[str, Any]]:
    """The lines with their fields named."""
    return [dict(zip(names, line, strict=True)) for line in lines]


def endings(lines: list[Any]) -> list[dict[str, Any]]:
    """Lines as hellaswag has them, whose labels are text."""
    return documents([(*line, str(label)) for *line, label in lines], *WORDS, "endings", "label")


MMLU_FIELDS = ("subject", "question", "choices", "answer")
# The harness's name of each task, the part of the data that it takes, and our data.
TASKS = {
    "lambada": ("lambada_openai", "test", [{"text": text} for text in LAMBADA]),
    "piqa": ("piqa", "validation", documents(PIQA, "goal", "sol1", "sol2", "label")),
    "hellaswag": ("hellaswag", "validation", endings(HELLASWAG)),
}


class Shots(NamedTuple):
    """A task with examples before each question: how many, our questions, and what the examples are taken from."""

    task: str
    count: int
    data: list[dict[str, Any]]
    pool: list[dict[str, Any]]


SHOTS = {
    "lambada-2": Shots("lambada", 2, TASKS["lambada"][2][:3], TASKS["lambada"][2][:3]),
    "piqa-1": Shots("piqa", 1, TASKS["piqa"][2][:6], TASKS["piqa"][2][:3]),  # questions among the examples
    "hellaswag-2": Shots("hellaswag", 2, TASKS["hellaswag"][2][:5], endings(HELLASWAG_SHOTS)),
    "mmlu-0": Shots("mmlu", 0, documents(MMLU, *MMLU_FIELDS), []),
    "mmlu-2": Shots("mmlu", 2, documents(MMLU, *MMLU_FIELDS), documents(MMLU_SHOTS, *MMLU_FIELDS)),
}


def jsonl(documents: list[dict[str, Any]]) -> str:
    """Data as it stands in a file."""
    return "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in documents)


def model() -> Any:
    """A transformers model with weights that do not depend on versions: Python's own generator draws them.

    The rows of a few tokens are longer, so that one of them is often the likeliest.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    vocabulary = tiny().parsed["model"]["vocab"]
    config = GPTNeoXConfig(
        vocab_size=288,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    made = GPTNeoXForCausalLM(config).float().eval()
    for name, values in made.named_parameters():
        values.requires_grad_(False)
        values.copy_(drawn(name, tuple(values.shape)))
    for text, row in vocabulary.items():
        made.get_output_embeddings().weight[row] *= LIKELY.get(text, 1)
    return made


def drawn(name: str, shape: tuple[int, ...]) -> Any:
    """A parameter's values: near 1 for a norm's weight, near 0 for all else."""
    import torch

    source = random.Random(name)
    values = np.array([source.random() for _ in range(int(np.prod(shape)))]).reshape(shape) - 0.5
    return torch.from_numpy(values + 1.0 if "norm" in name and name.endswith("weight") else values * 0.5)


def logits(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The model's logits for rows of tokens."""
    import torch

    with torch.no_grad():
        found: npt.NDArray[np.float64] = model()(torch.from_numpy(tokens)).logits.double().numpy()
    return found


@contextmanager
def watched(lm: Any) -> Iterator[dict[str, list[Any]]]:
    """What the harness asks `lm` for, what it answers, and the rows that its model is given one by one."""
    seen: dict[str, list[Any]] = {"texts": [], "asked": [], "answers": [], "rows": []}
    ask, call = lm._loglikelihood_tokens, lm._model_call

    def answer(requests: Any, **options: Any) -> Any:
        found = ask(requests, **options)
        seen["texts"] += [texts for texts, _, _ in requests]
        seen["asked"] += [(list(before), list(after)) for _, before, after in requests]
        seen["answers"] += found
        return found

    def run(inputs: Any, **options: Any) -> Any:
        seen["rows"] += inputs.tolist()
        return call(inputs, **options)

    lm._loglikelihood_tokens, lm._model_call = answer, run
    yield seen
    lm._loglikelihood_tokens, lm._model_call = ask, call


def harness(folder: Path, **options: Any) -> Any:
    """The harness's way to our model and its tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    words = folder / "tokenizer.json"
    words.write_bytes(tiny().data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(words), bos_token=END, eos_token=END)
    return HFLM(pretrained=model(), tokenizer=tokenizer, backend="causal", device="cpu", **options)


def here(task: str, folder: Path, **parts: str) -> str:
    """The harness's own task as `task`_here, on data of ours: each part of the data by its name."""
    import lm_eval

    files = {part: folder / f"{task}_{part}.jsonl" for part in parts}
    for part, file in files.items():
        file.write_text(parts[part], encoding="utf-8")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    theirs = next(chain(tasks.glob(f"*/{task}.yaml"), tasks.glob(f"*/default/{task}.yaml")))
    source = {"dataset_path": "json", "dataset_name": None}
    source |= {"dataset_kwargs": {"data_files": {part: str(file) for part, file in files.items()}}}
    training = "train" if "train" in parts else None
    settings = {"include": str(theirs), "task": f"{task}_here", **source, "training_split": training}
    (folder / f"{task}_here.yaml").write_text(json.dumps(settings))
    return f"{task}_here"


def evaluated(lm: Any, folder: Path, task: str, shots: int | None = None) -> dict[str, Any]:
    """What the harness asks for a task of `folder`, what is answered, and its metrics."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with watched(lm) as seen:
        found = lm_eval.simple_evaluate(
            lm, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=2, log_samples=False
        )
    assert found
    metrics = (found["groups"] if task in found.get("groups", {}) else found["results"])[task]
    drawn_by_lot = "perplexity_stderr,none"
    kept = {key: value for key, value in metrics.items() if isinstance(value, float | int) and key != drawn_by_lot}
    return {**seen, "metrics": kept}


def oracle(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """The harness's own task on our data: its requests and answers in order, the rows it ran, and its metrics."""
    task, split, data = TASKS[name]
    return evaluated(harness(folder, **options), folder, here(task, folder, **{split: jsonl(data)}))


def golden(name: str, folder: Path) -> dict[str, Any]:
    """The harness's results; asserts that neither batches nor its cache of logits change them."""
    found = oracle(name, folder, batch_size=1, logits_cache=False)
    other = oracle(name, folder, batch_size=5)
    assert other["metrics"].keys() == found["metrics"].keys() and other["asked"] == found["asked"]
    assert np.allclose([*other["metrics"].values()], [*found["metrics"].values()], rtol=1e-6)
    whole = [(before + after)[-CONTEXT - 1 : -1] for before, after in found["asked"]]
    assert sorted(whole) == sorted(found["rows"])
    return {
        "data": jsonl(TASKS[name][2]),
        "contexts": [before for before, _ in found["asked"]],
        "continuations": [after for _, after in found["asked"]],
        **told(found),
    }


def golden_shots(name: str, folder: Path) -> dict[str, Any]:
    """The harness's results with examples; the texts that it asks, each context once for all its continuations."""
    task, count, data, pool = SHOTS[name]
    lm = harness(folder, batch_size=1, logits_cache=False)
    if task == "mmlu":
        asked = subjects(folder, data, pool)
    else:
        theirs, split, _ = TASKS[task]
        parts = {"train": jsonl(pool)} if task != "lambada" else {}
        asked = here(theirs, folder, **{split: jsonl(data)}, **parts)
    found = evaluated(lm, folder, asked, count)
    contexts, continuations = zip(*found["texts"], strict=True)
    return {
        "data": jsonl(data),
        "pool": jsonl(pool),
        "contexts": list(dict.fromkeys(contexts)),
        "continuations": continuations,
        **told(found),
    }


def subjects(folder: Path, data: list[dict[str, Any]], pool: list[dict[str, Any]]) -> str:
    """mmlu: a task for each subject, and their group, as the harness's own `mmlu` is one."""
    members = []
    for subject in dict.fromkeys(fields["subject"] for fields in data):
        test, dev = ([fields for fields in part if fields["subject"] == subject] for part in (data, pool or data))
        members.append(here(f"mmlu_{subject}", folder, test=jsonl(test), dev=jsonl(dev)))
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "mmlu_here", "task": members, "aggregate_metric_list": metrics, "metadata": {"version": 2}}
    (folder / "mmlu_here.yaml").write_text(json.dumps(group))
    return "mmlu_here"


def told(found: dict[str, Any]) -> dict[str, Any]:
    """What was answered, and what that comes to."""
    return {
        "loglikelihoods": [total for total, _ in found["answers"]],
        "greedy": [exact for _, exact in found["answers"]],
        "metrics": found["metrics"],
    }


def made_in(folder: Path, make: Callable[[str, Path], dict[str, Any]]) -> dict[str, Any]:
    """The results of the task that a new folder is named for."""
    folder.mkdir()
    return make(folder.name, folder)


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        tasks = {name: made_in(Path(folder, name), golden) for name in TASKS}
        shots = {name: made_in(Path(folder, name), golden_shots) for name in SHOTS}
    made = {"lm_eval": version("lm_eval"), "context": CONTEXT, "tasks": tasks, "shots": shots}
    GOLDEN.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The options that the commands share, and how their values are read; plain names only, as in cli.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from neoxconv.names import NORMS, PRESETS, TYPES, WEIGHTS
from neoxconv.words import parse_size

if TYPE_CHECKING:
    from neoxconv.storage.remote import Place

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def location(text: str) -> Place:
    """The path or the URL that an argument means."""
    from neoxconv.storage.address import place

    return place(text)


def byte_count(text: str) -> int:
    """The bytes that an option's value means."""
    count = parse_size(text)
    if not count:
        raise click.BadParameter(f"{text!r} is no size; write it as 5GB, 500MB, 2GiB or a number of bytes.")
    return count


def limit(text: str) -> float:
    """The number from 0 on that an option's value is."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise click.BadParameter(f"{text!r} is no number from 0 on.")
    return number


def override(text: str) -> tuple[str, str]:
    """The pattern and the type that `--tensor-type` joins with `=`."""
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals) or name.upper() not in TYPES:
        raise click.BadParameter(f"{text!r} is no PATTERN=TYPE; TYPE is one of {', '.join(TYPES)}.")
    return pattern, name.upper()


def scheduler(text: str) -> str:
    """The address of a Dask scheduler."""
    if not re.fullmatch(r"dask://[^/\s]+:\d+", text):
        raise click.BadParameter(f"{text!r} is no scheduler; write it as dask://HOST:PORT.")
    return text


def size_option(name: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes a number of bytes."""
    return click.option(name, type=byte_count, metavar="SIZE", **settings)


def choice_option(*names: str, choices: Sequence[str], **settings: Any) -> Callable[[Command], Command]:
    """An option that takes one of `choices`, in any case."""
    shown = {"metavar": "|".join(choices)} | settings
    return click.option(*names, type=click.Choice(choices, case_sensitive=False), **shown)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` lists them."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Note in what `main` shares with every command whether tracebacks are wanted."""
    if value and context.obj is not None:
        context.obj["verbose"] = True


verbose = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
)
as_json = click.option("--json", is_flag=True, help="Print one JSON object for machines.")
configuration = options(
    click.option("--config", type=PATH, multiple=True, metavar="FILE", help="The training YAML; repeat for several."),
    choice_option("--preset", choices=PRESETS, metavar="NAME", help="A released model, such as 20B or pythia-1b."),
    choice_option("--weights", choices=WEIGHTS, help="SRC's weights: as stored (default), or the optimizer's fp32."),
)
norms = choice_option("--norms", choices=NORMS, help="Ranks' norms: mean (default), exact fold, or rank 0's.")
jobs = click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Threads; the processors, 8 at most.")
check = click.option("--check", is_flag=True, help="Read every byte of SRC first, and compare its checksums.")
of_logits = options(
    click.option("--text", type=PATH, metavar="FILE", help="logits: a text to compare on.  [default: a built-in one]"),
    click.option("--tokens", type=PATH, metavar="FILE", help="logits: token ids [batch, time] in a .npy file."),
    click.option(
        "--length", type=click.IntRange(min=2), metavar="N", help="logits: tokens in a sequence.  [default: 256]"
    ),
    click.option(
        "--sequences", type=click.IntRange(min=1), metavar="N", help="logits: sequences, and questions, at most."
    ),
    choice_option(
        "--task", choices=("lambada", "piqa", "hellaswag"), help="logits: also answer questions, both sides."
    ),
    click.option(
        "--data", type=PATH, metavar="FILE", help="logits: the task's questions, .jsonl with the task's fields."
    ),
    choice_option(
        "--engine",
        choices=("native", "transformers", "llama.cpp"),
        default="native",
        show_default=True,
        metavar="NAME",
        help="logits: what runs TARGET: native, transformers or llama.cpp.",
    ),
    click.option("--device", metavar="NAME", help="logits: cpu or cuda, for native.  [default: cpu]"),
    click.option(
        "--max-kl",
        type=limit,
        metavar="X",
        help="logits: mean KL divergence.  [default: by TARGET's type]",
    ),
    click.option("--max-kl-p99", type=limit, metavar="X", help="logits: its 99th percentile."),
    click.option("--min-top1", type=limit, metavar="X", help="logits: share of equal first choices."),
    click.option("--max-ppl-ratio", type=limit, metavar="X", help="logits: TARGET's perplexity over SRC's."),
    click.option("--bisect", is_flag=True, help="logits: find the tensor that breaks the first broken layer."),
    click.option("--html", type=PATH, metavar="FILE", help="logits: write a report as one page."),
)

LOGITS_ONLY = (
    "text", "tokens", "length", "sequences", "task", "data", "device",
    "max_kl", "max_kl_p99", "min_top1", "max_ppl_ratio", "bisect", "html",
)  # fmt: skip


def check_logits_options(level: str, given: dict[str, Any]) -> None:
    """Raise UsageError for options of the logits level where another is run, and for two sources of tokens."""
    idle = [name for name in LOGITS_ONLY if given[name] not in (None, False)]
    if level != "logits" and (idle or given["engine"] != "native"):
        name = (idle or ["engine"])[0].replace("_", "-")
        raise click.UsageError(f"--{name} is for --level logits.")
    if given["text"] and given["tokens"]:
        raise click.UsageError("--text and --tokens exclude each other; give one of them.")
    if given["bisect"] and given["engine"] != "native":
        raise click.UsageError("--bisect needs the native engine, which sees the layers; leave --engine out.")
    if bool(given["task"]) != bool(given["data"]):
        raise click.UsageError("--task and --data belong together; give both.")

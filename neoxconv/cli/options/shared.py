"""What options are made of, and those that several commands share. Plain names only, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from neoxconv.cli.values import COUNT, LOCATION, PATH, among, byte_count
from neoxconv.names import NORMS, PRESETS, QKV_LAYOUTS, RMSNORMS, STAND_INS, WEIGHTS

Command = TypeVar("Command", bound=Callable[..., Any])


def size_option(name: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes a number of bytes."""
    return click.option(name, type=byte_count, metavar="SIZE", **settings)


def choice_option(*names: str, choices: Sequence[str], **settings: Any) -> Callable[[Command], Command]:
    """An option that takes one of `choices`, in any case."""
    shown: dict[str, Any] = {"metavar": "|".join(choices), "shell_complete": among(choices)} | settings
    return click.option(*names, type=click.Choice(choices, case_sensitive=False), **shown)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` lists them."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Note in what `main` shares with every command whether tracebacks are wanted."""
    if value and context.obj is not None:
        context.obj["verbose"] = True


verbose = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember, help="Show the traceback of an error."
)
as_json = click.option("--json", is_flag=True, help="Print one JSON object for machines.")
quiet = click.option("--quiet", is_flag=True, help="Print errors only.")
source = click.argument("source", type=LOCATION, metavar="SRC")
configuration = options(
    click.option("--config", type=PATH, multiple=True, metavar="FILE", help="The training YAML; repeat for several."),
    choice_option("--preset", choices=PRESETS, metavar="NAME", help="A released model, such as 20B or pythia-1b."),
    choice_option("--weights", choices=WEIGHTS, help="SRC's weights: as stored (default), or the optimizer's fp32."),
    choice_option("--qkv-layout", choices=QKV_LAYOUTS, help="gpt-neox's rows of grouped queries, if files don't tell."),
    choice_option("--rmsnorm", choices=RMSNORMS, help="Where gpt-neox's RMSNorm has its epsilon, if files don't tell."),
)
norms = choice_option("--norms", choices=NORMS, help="Ranks' norms: mean (default), exact fold, or rank 0's.")
jobs = click.option("--jobs", type=COUNT, metavar="N", help="Threads; the processors, 8 at most.")
check = click.option("--check", is_flag=True, help="Read every byte of SRC first, and compare its checksums.")
as_family = choice_option(
    "--as", "as_family", choices=STAND_INS, metavar="NAME",
    help="gguf, slim: write SRC as another family where the format lacks its own (docs/formats.md).",
)  # fmt: skip

"""SRC as a command's options ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.core.model import Checkpoint
from neoxconv.engine.memory import threads_for
from neoxconv.sources import integrity
from neoxconv.sources.checkpoint import open_checkpoint
from neoxconv.storage import Place

Given = Mapping[str, Any]  # the options by name; None where one was not given
Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Reading:
    """How SRC is to be read, each by the option of that name; None leaves it to us."""

    config: tuple[Path, ...] = ()
    preset: str | None = None
    norms: str | None = None
    weights: str | None = None
    qkv_layout: str | None = None
    rmsnorm: str | None = None

    @property
    def words(self) -> list[str]:
        """What a command line says to read it so, but for norms and weights, which a manifest tells."""
        found = [word for path in self.config for word in ("--config", str(path))]
        named = {"--preset": self.preset, "--qkv-layout": self.qkv_layout, "--rmsnorm": self.rmsnorm}
        return found + [word for name, value in named.items() if value for word in (name, value)]


def chosen(kind: type[Chosen], given: Given) -> Chosen:
    """A dataclass whose fields are named as options: with the values of those that were given, else its defaults."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if given.get(name) is not None})


def opened(source: Place, how: Reading) -> Checkpoint:
    """The checkpoint at `source`, its norms averaged and its weights as stored unless told otherwise.

    Raises UsageError for options that exclude each other, and what `open_checkpoint` raises.
    """
    if how.config and how.preset:
        raise click.UsageError("--config and --preset exclude each other; give one of them.")
    checkpoint = open_checkpoint(
        source,
        config=how.config,
        preset=how.preset,
        norms=how.norms or "mean",
        weights=how.weights or "stored",
        qkv_layout=how.qkv_layout,
        rmsnorm=how.rmsnorm,
    )
    if how.config and checkpoint.index.format != "neox":
        raise click.UsageError(f"--config is for gpt-neox checkpoints; {source} has its own settings. Leave it out.")
    return checkpoint


def checked(checkpoint: Checkpoint, *, jobs: int | None, quiet: bool) -> integrity.Integrity:
    """What reading every byte of the source finds, with a bar."""
    with progress_bar(integrity.work(checkpoint), "checking", quiet) as progress:
        return integrity.check(checkpoint, jobs=threads_for(checkpoint, jobs), progress=progress)

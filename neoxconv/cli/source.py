"""SRC as a command's options ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.core.model import Checkpoint
from neoxconv.engine.memory import threads_for
from neoxconv.sources import integrity
from neoxconv.sources.checkpoint import open_checkpoint
from neoxconv.storage.remote import Place

Given = Mapping[str, Any]  # the options by name; None where one was not given


def opened(source: Place, given: Given, norms: str = "mean", weights: str | None = None) -> Checkpoint:
    """The checkpoint at `source` with the configuration, and unless told here the weights, that the options give."""
    if given["config"] and given["preset"]:
        raise click.UsageError("--config and --preset exclude each other; give one of them.")
    weights = weights or given["weights"] or "stored"
    checkpoint = open_checkpoint(source, config=given["config"], preset=given["preset"], norms=norms, weights=weights)
    if given["config"] and checkpoint.index.format != "neox":
        raise click.UsageError(f"--config is for gpt-neox checkpoints; {source} has its own settings. Leave it out.")
    return checkpoint


def checked(checkpoint: Checkpoint, given: Given, quiet: bool) -> integrity.Integrity | None:
    """What reading every byte of the source finds, with a bar; None where --check is not given."""
    if not given["check"]:
        return None
    with progress_bar(integrity.work(checkpoint), "checking", quiet) as progress:
        return integrity.check(checkpoint, jobs=threads_for(checkpoint, given["jobs"]), progress=progress)

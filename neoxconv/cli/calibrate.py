"""`neoxconv calibrate`: an importance matrix from a text, by the same streamed forward pass that verifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, Reading, chosen, opened
from neoxconv.engine.side_file import check_side_file, whole
from neoxconv.errors import escaped
from neoxconv.formats.imatrix import write
from neoxconv.storage import Place
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.tokens import tokens_for
from neoxconv.verify.logits.trial import Sample


@dataclass(frozen=True)
class _Calibration:
    """What `calibrate` is asked to do."""

    source: Place
    output: Path
    reading: Reading
    sample: Sample
    device: str
    as_family: str | None
    overwrite: bool
    quiet: bool


def asked_for(source: Place, given: Given) -> _Calibration:
    """The request that the options make. Raises UsageError unless they name one source of tokens."""
    if bool(given["text"]) == bool(given["tokens"]):
        raise click.UsageError("give either --text FILE or --tokens FILE.")
    plain = {name: given[name] for name in ("output", "device", "as_family", "overwrite", "quiet")}
    return _Calibration(source, reading=chosen(Reading, given), sample=chosen(Sample, given), **plain)


def make_matrix(asked: _Calibration) -> str:
    """Write the matrix; returns what was made. Raises PlanError where the output may not be written."""
    output, sample = asked.output, asked.sample
    check_side_file(output, (asked.source, sample.text, sample.tokens), asked.overwrite)
    checkpoint = opened(asked.source, asked.reading)
    tokens, text = tokens_for(checkpoint, sample)
    with progress_bar(checkpoint.config.layers, "layers", asked.quiet, "layer") as progress:
        sums = calibrate(checkpoint, tokens, device=asked.device, as_family=asked.as_family, progress=progress)
    with whole(output) as partial:
        write(partial, sums, tokens, text)
    return f"{escaped(output)}: importances of {len(sums)} tensors from {tokens.size} tokens of {escaped(text)}"

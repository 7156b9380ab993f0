"""`neoxconv calibrate`: an importance matrix from a text, by the same streamed forward pass that verifies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from neoxconv.cli.printing import say
from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, Reading, chosen, opened
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.engine.side_file import check_side_file, whole
from neoxconv.errors import escaped
from neoxconv.formats.calibration.names import SOURCE, source_digest
from neoxconv.formats.imatrix import facts, write
from neoxconv.storage import Place
from neoxconv.targets.stand_in import written_as
from neoxconv.verify.logits import moments
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.needs import Needs, needs
from neoxconv.verify.logits.through import through_of
from neoxconv.verify.logits.tokens import mixed
from neoxconv.verify.logits.trial import Sample
from neoxconv.words import size


@dataclass(frozen=True)
class _Calibration:
    """What `calibrate` is asked to do."""

    source: Place
    output: Path
    reading: Reading
    samples: tuple[Sample, ...]  # mixed
    covariance: bool
    gradients: bool
    through: str | None  # the type that layers are quantized to, one after the other
    outputs: bool
    as_family: str | None  # that it will be written as, where GGUF lacks its own
    device: str
    overwrite: bool
    quiet: bool


_PLAIN = "output", "covariance", "gradients", "outputs", "through", "as_family", "device", "overwrite", "quiet"


def asked_for(source: Place, given: Given) -> _Calibration:
    """The request that the options make. Raises UsageError for options that exclude each other."""
    if given["text"] and given["tokens"]:
        raise click.UsageError("--text and --tokens exclude each other; give one of them.")
    if given["outputs"] and given["through"]:
        raise click.UsageError("--outputs and --through exclude each other; give one of them.")
    texts = given["text"] or (None,)
    samples = tuple(chosen(Sample, {**given, "text": text}) for text in texts)
    return _Calibration(
        source, reading=chosen(Reading, given), samples=samples, **{name: given[name] for name in _PLAIN}
    )


def make_matrix(asked: _Calibration) -> str:
    """Write the matrix or calibration; returns what was made. Raises PlanError where it may not be written."""
    output, samples = asked.output, asked.samples
    read = [path for sample in samples for path in (sample.text, sample.tokens)]
    check_side_file(output, (asked.source, *read), asked.overwrite)
    checkpoint, _ = written_as(opened(asked.source, asked.reading), "gguf", asked.as_family)
    tokens, text = mixed(checkpoint, samples, _PLENTY * _widest(checkpoint))
    made = f"from {tokens.size} tokens of {escaped(text)}{_advice(checkpoint, tokens.size)}"
    backwards = asked.gradients or asked.outputs
    passes = 3 if backwards else 1  # over the layers: forwards, and for gradients forwards and back
    total = passes * checkpoint.config.layers * len(tokens)
    with progress_bar(total, "calibrating", asked.quiet, " sequences") as progress:
        if asked.covariance or backwards or asked.through:
            keys = facts(text, tokens) | {SOURCE: source_digest(checkpoint)}
            keys |= {"neoxconv.through": asked.through} if asked.through else {}
            count = _with_moments(asked, checkpoint, tokens, keys, progress)
            return f"{escaped(output)}: second moments of the inputs of {count} tensors {made}"
        sums = calibrate(checkpoint, tokens, device=asked.device, progress=progress)
    with whole(output) as partial:
        write(partial, sums, tokens, text)
    return f"{escaped(output)}: importances of {len(sums)} tensors {made}"


def _with_moments(
    asked: _Calibration,
    checkpoint: Checkpoint,
    tokens: Numbers,
    keys: Mapping[str, Any],
    progress: Callable[[int], None],
) -> int:
    """Write a calibration, what it takes told before; returns how many matrices it is of."""
    through = through_of(checkpoint, asked.through) if asked.through else None
    if not asked.quiet:
        taken = needs(checkpoint, tokens.size, gradients=asked.gradients, outputs=asked.outputs, through=through)
        say(_told(asked.output, taken), err=True)
    try:
        return moments.calibrate(
            checkpoint,
            tokens,
            asked.output,
            keys,
            gradients=asked.gradients,
            outputs=asked.outputs,
            through=through,
            device=asked.device,
            progress=progress,
        )
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{asked.output}: not finished; run the same command again to continue.") from stop


def _told(output: Path, taken: Needs) -> str:
    """What a calibration takes, told before it begins."""
    disk = f"{output}: {size(taken.file)}, {size(taken.disk)} of disk while it is made"
    return f"  {disk}; up to {size(taken.memory)} of memory"


# Tokens for each column of the widest matrix: on a real model 1.3, 5 and 21 brought the KL divergence to 0.87, 0.71 and
# 0.62 of that of codes chosen one by one (docs/calibration.md).
_FEW, _PLENTY = 5, 20


def _advice(checkpoint: Checkpoint, tokens: int) -> str:
    """A word on tokens that are few for the model."""
    each = tokens / _widest(checkpoint)
    if each >= _PLENTY:
        return ""
    found = f"{each:.2g} tokens for each of the {_widest(checkpoint)} columns of the widest matrix"
    if each >= _FEW:
        return f"; {found}: {_PLENTY} would bring some more"
    return f"; {found} are few: {_FEW} bring most of what can be had, {_PLENTY} some more"


def _widest(checkpoint: Checkpoint) -> int:
    """Columns of the widest matrix in the layers."""
    return max(checkpoint.config.hidden, checkpoint.config.ff)

"""`neoxconv calibrate`: an importance matrix from a text, by the same streamed forward pass that verifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from neoxconv.cli.printing import say
from neoxconv.cli.progress import progress_bar
from neoxconv.cli.source import Given, Reading, chosen, opened
from neoxconv.core.model import Checkpoint
from neoxconv.engine.side_file import check_side_file, whole
from neoxconv.errors import escaped
from neoxconv.formats.imatrix import facts, write
from neoxconv.storage import Place
from neoxconv.targets.stand_in import written_as
from neoxconv.verify.logits import moments
from neoxconv.verify.logits.importance import calibrate
from neoxconv.verify.logits.moments import source_digest
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
    outputs: bool
    as_family: str | None  # that it will be written as, where GGUF lacks its own
    device: str
    overwrite: bool
    quiet: bool


def asked_for(source: Place, given: Given) -> _Calibration:
    """The request that the options make. Raises UsageError for two kinds of tokens."""
    if given["text"] and given["tokens"]:
        raise click.UsageError("--text and --tokens exclude each other; give one of them.")
    plain = {
        name: given[name]
        for name in ("output", "covariance", "gradients", "outputs", "as_family", "device", "overwrite", "quiet")
    }
    texts = given["text"] or (None,)
    samples = tuple(chosen(Sample, {**given, "text": text}) for text in texts)
    return _Calibration(source, reading=chosen(Reading, given), samples=samples, **plain)


def make_matrix(asked: _Calibration) -> str:
    """Write the matrix or calibration; returns what was made. Raises PlanError where it may not be written."""
    output, samples = asked.output, asked.samples
    read = [path for sample in samples for path in (sample.text, sample.tokens)]
    check_side_file(output, (asked.source, *read), asked.overwrite)
    checkpoint, _ = written_as(opened(asked.source, asked.reading), "gguf", asked.as_family)
    tokens, text = mixed(checkpoint, samples)
    made = f"from {tokens.size} tokens of {escaped(text)}{_advice(checkpoint, tokens.size)}"
    backwards = asked.gradients or asked.outputs
    passes = 3 if backwards else 1  # over the layers: forwards, and for gradients forwards and back
    with progress_bar(passes * checkpoint.config.layers, "layers", asked.quiet, "layer") as progress:
        if asked.covariance or backwards:
            memory, disk = moments.needed(checkpoint, len(tokens), tokens.shape[1], backwards, asked.outputs)
            if not asked.quiet:
                say(f"  {output}: {size(disk)}; up to {size(memory)} of memory besides the model's slabs", err=True)
            keys = facts(text, tokens) | {"neoxconv.source": source_digest(checkpoint)}
            count = moments.calibrate(
                checkpoint,
                tokens,
                output,
                keys,
                gradients=backwards,
                outputs=asked.outputs,
                device=asked.device,
                progress=progress,
            )
            return f"{escaped(output)}: second moments of the inputs of {count} tensors {made}"
        sums = calibrate(checkpoint, tokens, device=asked.device, progress=progress)
    with whole(output) as partial:
        write(partial, sums, tokens, text)
    return f"{escaped(output)}: importances of {len(sums)} tensors {made}"


_ENOUGH = 5  # tokens for each column of the widest matrix: fewer cost more than they save (docs/numerics.md)


def _advice(checkpoint: Checkpoint, tokens: int) -> str:
    """A word on tokens that are few for the model."""
    widest = max(checkpoint.config.hidden, checkpoint.config.ff)
    if tokens >= _ENOUGH * widest:
        return ""
    return f"; that is little for a model of this width, {_ENOUGH * widest} or more would make it better"

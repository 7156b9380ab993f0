"""A calibration by the same streamed forward pass that verifies: layer after layer, and resumed where it stopped.

After each layer its second moments are in the calibration, and the tokens' streams in a file beside it: a run that was
interrupted, asked for the same again, goes on with the next layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neoxconv.core.encoding import Gradients
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.dtypes import Floats, Numbers
from neoxconv.errors import NeoxconvError
from neoxconv.formats.calibration.names import Inputs
from neoxconv.formats.calibration.write import Writer
from neoxconv.verify.logits.gradients import squares_of_gradients
from neoxconv.verify.logits.needs import (
    EMBEDDING,
    GRADIENT_TOKENS,
    HEAD,
    OUTPUT_TOKENS,
    check_room,
    inputs_of,
    matrices_of,
    needs,
)
from neoxconv.verify.logits.stream import running, side
from neoxconv.verify.logits.through import Encodings, Through
from neoxconv.verify.logits.unfinished import Progress, key_of, refuse_strangers

_BAND = 2048  # rows of sums that are made at a time, from their diagonal on
_Owners = Mapping[str, Inputs]  # by the unified name of the first weight of each layer that they multiply


@dataclass
class _Sums:
    """The sums of x x^T of one layer's inputs, by the unified name of the first weight that they multiply.

    Only the upper triangle is made, and what lies beside it in bands.
    """

    owners: _Owners
    device: str
    found: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, name: str, x: Tensor) -> None:
        """Add what a weight is multiplied with."""
        if name not in self.owners:
            return
        flat = x.reshape(-1, x.shape[-1])
        columns = flat.shape[1]
        if name not in self.found:
            self.found[name] = torch.zeros(columns, columns, device=self.device)
        for start in range(0, columns, _BAND):
            rows = slice(start, start + _BAND)
            self.found[name][rows, start:].addmm_(flat[:, rows].T, flat[:, start:])


class _Alone:
    """Runs layers of the model by itself, and writes the moments of what their matrices are multiplied with."""

    sides = 1  # models whose streams pass

    def __init__(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor, device: str, writer: Writer) -> None:
        self.sums, self.writer = _Sums({}, device), writer
        self.model = side(checkpoint, pool, merged=True, device=device, watch=lambda name, x: self.sums.watch(name, x))

    def embed(self, ids: Tensor) -> list[Tensor]:
        """The streams before the first layer."""
        return self.model.embed(ids)

    def layer(
        self, number: int, inputs: _Owners, streams: list[Tensor], progress: Callable[[int], None]
    ) -> list[Tensor]:
        """The streams after a layer, in the place of those before it."""
        self.sums = _Sums(inputs, self.sums.device)
        streams = self.model.layer(number, streams, into=streams, progress=progress)
        for name, each in inputs.items():
            self.writer.add(each, self.sums.found.pop(name).cpu().numpy())
        return streams

    def final(self, streams: list[Tensor]) -> list[Tensor]:
        """What the head is multiplied with."""
        return self.model.final(streams)


def calibrate(
    checkpoint: Checkpoint,
    tokens: Numbers,
    path: Path,
    keys: Mapping[str, Any],
    *,
    gradients: bool = False,
    through: Encodings | None = None,
    outputs: bool = False,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the calibration of tokens [batch, time] to `path`; returns how many matrices it is of.

    With `gradients` also how much each matrix moves predictions, by tokens from all over them; with `outputs` that too,
    and the second moments of gradients at what matrices put out. With `through` layers are quantized as they are run,
    to these encodings by unified names, and later matrices make up for earlier ones. The ranks are joined first, as a
    GGUF file holds them. `progress` is told of sequences, once for each layer. Unfinished work lies in `path`.partial
    and `path`.streams. Raises NeoxconvError where the disk does not take it.
    """
    checkpoint.refuse_doubts()
    gradients = gradients or outputs
    layers, matrices = inputs_of(checkpoint, through), matrices_of(checkpoint)
    partial, beside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".streams")
    last = checkpoint.architecture.gguf_logits(checkpoint.config)
    head = _head_inputs(checkpoint, last, gradients)
    inputs = (*(each for layer in layers for each in layer.values()), *head)
    extents = _extents(checkpoint, matrices) if gradients else {}
    rows = {weight.gguf: extents[weight.gguf][0] for weight in matrices if weight.linear and outputs}
    writer = Writer(partial, inputs, keys, tokens.size, extents, rows)
    state = Progress(beside, key_of(checkpoint, tokens, {**keys, "gradients": gradients, "outputs": outputs}))
    taken = needs(checkpoint, tokens.size, gradients=gradients, outputs=outputs, through=through)
    check_room(path, taken.disk, partial, beside)
    try:
        square, found = _forward(checkpoint, layers, tokens, writer, state, device, progress, through), {}
        if gradients:
            found = _backward(checkpoint, tokens, writer, device, lambda count: progress(count * len(tokens)))
            if last.role == EMBEDDING:
                found, square = _of_tied(checkpoint, found, square)
        for each in head:
            writer.add(each, square * np.float32(tokens.size))
        writer.finish({w.gguf: _in_order(found[w.unified], w, checkpoint) for w in matrices if found})
        os.replace(partial, path)
        beside.unlink()
    except OSError as error:
        raise NeoxconvError(
            f"{error.filename or partial}: {error.strerror or error}; what is done is kept, run the same command again "
            "to go on."
        ) from error
    finally:
        writer.close()
    return sum(len(each.names) for each in inputs)


def _forward(
    checkpoint: Checkpoint,
    layers: Sequence[dict[str, Inputs]],
    tokens: Numbers,
    writer: Writer,
    state: Progress,
    device: str,
    progress: Callable[[int], None],
    through: Encodings | None,
) -> Floats:
    """Write the moments of every layer from the first that is not done; returns those of what the head multiplies."""
    with running(tokens, device) as (pool, ids):
        alone = _Alone(checkpoint, pool, device, writer)
        stage = Through(checkpoint, pool, device, through, writer) if through else alone
        known = state.load((stage.sides * len(tokens), tokens.shape[1], checkpoint.config.hidden), 1, len(layers))
        if known and writer.resume(known[2]):
            done, streams = known[0], [x.to(device) for x in known[1]]
            progress(done * len(tokens))
        else:
            if not known:
                refuse_strangers(writer.path, state.path)
            done, streams = 0, stage.embed(ids)
            state.save(0, streams, writer.digests)
            writer.begin(again=bool(known))
        for number in range(done, len(layers)):
            streams = stage.layer(number, layers[number], streams, progress)
            state.save(number + 1, streams, writer.digests)
        return _of_head(stage.final, [x[: len(tokens)] for x in streams], checkpoint.config.hidden)


def _of_head(final: Callable[[list[Tensor]], list[Tensor]], streams: Sequence[Tensor], hidden: int) -> Floats:
    """The second moments of what the head multiplies in the model's own stream, sequence after sequence."""
    sums = torch.zeros(hidden, hidden, device=streams[0].device)
    for i in range(len(streams[0])):
        normed = final([x[i : i + 1] for x in streams])[0].flatten(0, 1)
        sums.addmm_(normed.T, normed)
    square: Floats = (sums / streams[0].shape[:2].numel()).cpu().numpy()
    return square


def _backward(
    checkpoint: Checkpoint, tokens: Numbers, writer: Writer, device: str, progress: Callable[[int], None]
) -> dict[str, Gradients]:
    """Gradients by unified name; their second moments are written, where the calibration is to have them."""
    weights = {weight.unified: weight for weight in matrices_of(checkpoint)}

    def add(name: str, square: Floats) -> None:
        order = _gguf_rows(weights[name], checkpoint)
        writer.add_outputs(weights[name].gguf, square[order][:, order])

    few = _spread(tokens, OUTPUT_TOKENS if writer.outputs else GRADIENT_TOKENS)
    outputs = add if writer.outputs else None
    return squares_of_gradients(checkpoint, few, device=device, progress=progress, outputs=outputs)


def _spread(tokens: Numbers, most: int) -> Numbers:
    """Sequences at equal distances from tokens [batch, time], of so many tokens in all at most; one at least."""
    count = min(len(tokens), max(1, most // tokens.shape[1]))
    found: Numbers = tokens[np.arange(count) * len(tokens) // count]
    return found


def _extents(checkpoint: Checkpoint, matrices: Sequence[Weight]) -> dict[str, tuple[int, int]]:
    """Rows and columns by GGUF name."""
    sizes = checkpoint.config.sizes
    return {weight.gguf: (sizes[weight.shape[0]], sizes[weight.shape[1]]) for weight in matrices}


def _head_inputs(checkpoint: Checkpoint, last: Weight, gradients: bool) -> tuple[Inputs, ...]:
    """What the head is multiplied with. A tied one has moments only with the gradients that weigh both of its uses."""
    return (Inputs((last.gguf,), checkpoint.config.hidden),) if gradients or last.role == HEAD else ()


def _of_tied(
    checkpoint: Checkpoint, found: Mapping[str, Gradients], square: Floats
) -> tuple[dict[str, Gradients], Floats]:
    """Gradients with those of a tied embedding, which is the head too, and the moments that stand for both.

    A lookup costs by column alone, as if its inputs were independent: their part is added to the diagonal.
    """
    ((head, embedding),) = checkpoint.architecture.tied_head.items()
    above, below = found[head], found[embedding]
    part = below.rows.sum(dtype=np.float64) / above.rows.sum(dtype=np.float64)
    columns = above.columns + part * below.columns
    rows = (above.rows * above.columns.mean() + below.rows * below.columns.mean()) / columns.mean()
    both = Gradients(rows.astype(np.float32), columns.astype(np.float32))
    square = square + np.diag(part * below.columns).astype(np.float32)
    return {name: both if name == embedding else gradients for name, gradients in found.items()}, square


def _gguf_rows(weight: Weight, checkpoint: Checkpoint) -> Numbers | slice:
    """Which row of a weight each row of a GGUF file is."""
    return weight.gguf_order(checkpoint.config) if weight.gguf_order else slice(None)


def _in_order(gradients: Gradients, weight: Weight, checkpoint: Checkpoint) -> Gradients:
    """Gradients with the rows in GGUF's order."""
    return replace(gradients, rows=gradients.rows[_gguf_rows(weight, checkpoint)])

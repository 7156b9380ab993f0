"""A calibration by the same streamed forward pass that verifies: layer after layer, and resumed where it stopped.

After each layer its second moments are in the calibration, and the tokens' streams in a file beside it: a run that was
interrupted, asked for the same again, goes on with the next layer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
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
from neoxconv.engine.side_file import whole
from neoxconv.errors import NeoxconvError, PlanError
from neoxconv.formats.calibration import Inputs, Writer, source_digest, triangle
from neoxconv.verify.logits.gradients import squares_of_gradients
from neoxconv.verify.logits.stream import INSIDE, running, side
from neoxconv.verify.logits.through import Encodings, Through, gets_aim, held_through
from neoxconv.words import size

_GRADIENT_TOKENS = 8192  # at most: the streams before all layers are kept at once, and means need no more
_OUTPUT_TOKENS = 32768  # at most: second moments do need more
_BAND = 2048  # rows of sums that are made at a time, from their diagonal on
_MAX_TOLD = 16 << 20  # bytes of the first line of unfinished work
_EMBEDDING, _HEAD = "embedding", "head"  # roles
_Owners = Mapping[str, Inputs]  # by the unified name of the first weight of each layer that they multiply


def inputs_of(checkpoint: Checkpoint, through: Encodings | None = None) -> tuple[dict[str, Inputs], ...]:
    """For each layer what its matrices are multiplied with, by the unified name of the first of them that has it.

    `through`: the encodings of matrices by their unified names, where those that write to the stream get an aim.
    """
    layers: list[dict[str, Inputs]] = [{} for _ in range(checkpoint.config.layers)]
    first: dict[str, str] = {}  # by the norm that makes it
    for layer, weight in checkpoint.architecture.names(checkpoint.config):
        if layer is None or not weight.linear:
            continue
        owner = first.setdefault(weight.norm or weight.unified, weight.unified)
        before = layers[layer][owner].names if owner in layers[layer] else ()
        rows, columns = (checkpoint.config.sizes[size] for size in weight.shape)
        encoding = through[weight.unified].name if through and gets_aim(weight, through) else ""
        layers[layer][owner] = Inputs((*before, weight.gguf), columns, rows if encoding else 0, encoding)
    return tuple(layers)


_PROGRAM = 640 << 20  # bytes: Python, torch, slabs of weights (measured: docs/calibration.md)
_INSIDES = 3  # of an MLP at once: before its activation, behind it, and what is on its way between them


@dataclass(frozen=True)
class Needs:
    """Bytes that a calibration takes at most: of memory, of its file, of disk while it is made."""

    memory: int
    file: int
    disk: int


def needs(checkpoint: Checkpoint, tokens: int, outputs: bool = False, through: Encodings | None = None) -> Needs:
    """What a calibration takes.

    Held are the moments of a layer's inputs and the tokens' streams, which are on disk too, twice while they are saved.
    With `outputs` these are instead two sums for each matrix of a layer, the largest three times more while it is put
    in order and packed, and the streams before all layers, of fewer tokens. What `through` adds is in through.py.
    """
    layers, config = inputs_of(checkpoint, through), checkpoint.config
    moments = max(sum(4 * each.columns**2 for each in layer.values()) for layer in layers)
    streams, inside = 4 * tokens * config.hidden, min(INSIDE, 4 * tokens * config.ff)
    head = 4 * Inputs((), config.hidden).packed
    every = [each for layer in layers for each in layer.values()]
    file = head + sum(4 * (each.packed + each.rows * each.columns) for each in every)
    if through:
        return Needs(_PROGRAM + held_through(config, tokens), file, file + 4 * streams)
    held, disk = moments + streams, file + 2 * streams
    if outputs:
        sides = [config.sizes[weight.shape[0]] for weight in _matrices(checkpoint) if weight.linear]
        kept = (config.layers + 2) * 4 * min(tokens, _OUTPUT_TOKENS) * config.hidden
        squares = sum(2 * 4 * side**2 for side in sides) // config.layers + 3 * 4 * max(sides) ** 2
        more = sum(4 * triangle(side) for side in sides)
        held, file, disk = max(held, streams + kept + squares), file + more, disk + more
    return Needs(_PROGRAM + held + _INSIDES * inside, file, disk)


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


@dataclass(frozen=True)
class Progress:
    """How far a calibration has come: the layers that are done, the streams after them and the digests so far.

    A line of JSON, then the streams as float32.
    """

    path: Path
    key: str  # of all that decides the calibration

    def save(self, layers: int, streams: list[Tensor], digests: Mapping[str, str]) -> None:
        """Write it whole, in place of what was there."""
        data = [x.cpu().numpy().reshape(-1) for x in streams]
        told = {"key": self.key, "layers": layers, "sha256": _sha256(data), "digests": dict(digests)}
        with whole(self.path) as partial, open(partial, "wb") as file:
            file.write(json.dumps(told).encode() + b"\n")
            for values in data:
                file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

    def load(self, shape: tuple[int, ...], ranks: int, layers: int) -> tuple[int, list[Tensor], dict[str, str]] | None:
        """What was saved by a run that was asked for the same, of so many layers and streams of a shape.

        None where there is none, or it cannot be read or is damaged.
        """
        count = math.prod(shape)
        try:
            with open(self.path, "rb") as file:
                line = file.readline(_MAX_TOLD)
                told = json.loads(line)
                if told["key"] != self.key or self.path.stat().st_size != len(line) + 4 * count * ranks:
                    return None
                data = [np.fromfile(file, np.float32, count) for _ in range(ranks)]
            done, digests = told["layers"], told["digests"]
            if told["sha256"] != _sha256(data) or type(done) is not int or not 0 <= done <= layers:
                return None
            return done, [torch.from_numpy(values.reshape(shape)) for values in data], dict(digests)
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None


def _sha256(data: list[Floats]) -> str:
    """The SHA-256 of the bytes of arrays, one after the other."""
    digest = hashlib.sha256()
    for values in data:
        digest.update(values.data)
    return digest.hexdigest()


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
    layers, matrices = inputs_of(checkpoint, through), _matrices(checkpoint)
    partial, beside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".streams")
    last = next(weight for weight in reversed(matrices) if not weight.linear)  # the head, or the embedding that is one
    head = _head_inputs(checkpoint, last, gradients)
    inputs = (*(each for layer in layers for each in layer.values()), *head)
    extents = _extents(checkpoint, matrices) if gradients else {}
    rows = {weight.gguf: extents[weight.gguf][0] for weight in matrices if weight.linear and outputs}
    writer = Writer(partial, inputs, keys, tokens.size, extents, rows)
    state = Progress(beside, _key(checkpoint, tokens, {**keys, "gradients": gradients, "outputs": outputs}))
    _check_room(path, needs(checkpoint, tokens.size, outputs, through).disk, partial, beside)
    try:
        square, found = _forward(checkpoint, layers, tokens, writer, state, device, progress, through), {}
        if gradients:
            found = _backward(checkpoint, tokens, writer, device, lambda count: progress(count * len(tokens)))
            if last.role == _EMBEDDING:
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
                _refuse_strangers(writer.path, state.path)
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


def _check_room(path: Path, needed: int, *unfinished: Path) -> None:
    """Raise PlanError where the disk has no room for what is still to be written."""
    written = sum(512 * each.stat().st_blocks for each in unfinished if each.is_file())
    free = shutil.disk_usage(path.resolve().parent).free
    if needed - written > free:
        raise PlanError(
            f"{path}: takes {size(needed - written)} of disk while it is made, {size(free)} are free; make room, or "
            "give another place."
        )


def _backward(
    checkpoint: Checkpoint, tokens: Numbers, writer: Writer, device: str, progress: Callable[[int], None]
) -> dict[str, Gradients]:
    """Gradients by unified name; their second moments are written, where the calibration is to have them."""
    weights = {weight.unified: weight for weight in _matrices(checkpoint)}

    def add(name: str, square: Floats) -> None:
        order = _gguf_rows(weights[name], checkpoint)
        writer.add_outputs(weights[name].gguf, square[order][:, order])

    few = _spread(tokens, _OUTPUT_TOKENS if writer.outputs else _GRADIENT_TOKENS)
    outputs = add if writer.outputs else None
    return squares_of_gradients(checkpoint, few, device=device, progress=progress, outputs=outputs)


def _spread(tokens: Numbers, most: int) -> Numbers:
    """Sequences at equal distances from tokens [batch, time], of so many tokens in all at most; one at least."""
    count = min(len(tokens), max(1, most // tokens.shape[1]))
    found: Numbers = tokens[np.arange(count) * len(tokens) // count]
    return found


def _matrices(checkpoint: Checkpoint) -> list[Weight]:
    """The weights of a GGUF file that have gradients: matrices of the layers, embedding and head."""
    weights = [weight for _, weight in checkpoint.architecture.in_gguf(checkpoint.config)]
    return [weight for weight in weights if weight.linear or weight.role in (_EMBEDDING, _HEAD)]


def _extents(checkpoint: Checkpoint, matrices: Sequence[Weight]) -> dict[str, tuple[int, int]]:
    """Rows and columns by GGUF name."""
    sizes = checkpoint.config.sizes
    return {weight.gguf: (sizes[weight.shape[0]], sizes[weight.shape[1]]) for weight in matrices}


def _head_inputs(checkpoint: Checkpoint, last: Weight, gradients: bool) -> tuple[Inputs, ...]:
    """What the head is multiplied with. A tied one has moments only with the gradients that weigh both of its uses."""
    return (Inputs((last.gguf,), checkpoint.config.hidden),) if gradients or last.role == _HEAD else ()


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


def _refuse_strangers(*paths: Path) -> None:
    """Raise PlanError where a file of ours would take the place of one that is not known to be ours."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise PlanError(
                f"{path}: is there already, of another calibration or not ours; remove it, or give another -o."
            )


def _key(checkpoint: Checkpoint, tokens: Numbers, keys: Mapping[str, Any]) -> str:
    """SHA-256 over all that decides a calibration: the source, how it was opened, the tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens).data)
    digest.update(source_digest(checkpoint).encode())
    digest.update(json.dumps({**keys, **checkpoint.config.facts}, sort_keys=True).encode())
    return digest.hexdigest()

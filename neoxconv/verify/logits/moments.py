"""A calibration by the same streamed forward pass that verifies: layer after layer, and resumed where it stopped.

After each layer its second moments are in the calibration, and the tokens' streams in a file beside it: a run that was
interrupted, asked for the same again, goes on with the next layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from neoxconv.core.encoding import Gradients
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.dtypes import Floats, Numbers
from neoxconv.engine.side_file import whole
from neoxconv.errors import PlanError
from neoxconv.formats.calibration import Inputs, Writer
from neoxconv.verify.logits.gradients import squares_of_gradients
from neoxconv.verify.logits.stream import running, side
from neoxconv.verify.logits.through import Encodings, Through, gets_aim, held_through

_GRADIENT_TOKENS = 8192  # at most: the streams before all layers are kept at once, and means need no more
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


def needed(checkpoint: Checkpoint, tokens: int, through: Encodings | None = None) -> tuple[int, int]:
    """Bytes that a calibration holds at most, and those that its file will have but for the header.

    Held are the moments of a layer, the largest of them once more while it is packed, and the tokens' streams before
    and after the layer. What `through` adds is in through.py.
    """
    layers = inputs_of(checkpoint, through)
    every = [Inputs((), checkpoint.config.hidden), *(each for layer in layers for each in layer.values())]
    disk = sum(4 * (each.packed + each.rows * each.columns) for each in every)
    if through:
        return held_through(checkpoint.config, tokens), disk
    moments = max(sum(4 * each.columns**2 for each in layer.values()) for layer in layers)
    largest = max(4 * each.packed for layer in layers for each in layer.values())
    streams = 2 * 4 * tokens * checkpoint.config.hidden
    return moments + 2 * largest + streams, disk


@dataclass
class _Sums:
    """The sums of x x^T of one layer's inputs, by the unified name of the first weight that they multiply."""

    owners: _Owners
    device: str
    found: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, name: str, x: Tensor) -> None:
        """Add what a weight is multiplied with."""
        if name not in self.owners:
            return
        flat = x.reshape(-1, x.shape[-1])
        if name not in self.found:
            self.found[name] = torch.zeros(flat.shape[1], flat.shape[1], device=self.device)
        self.found[name].addmm_(flat.T, flat)


class _Alone:
    """Runs layers of the model by itself, and writes the moments of what their matrices are multiplied with."""

    def __init__(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor, device: str, writer: Writer) -> None:
        self.sums, self.writer = _Sums({}, device), writer
        self.model = side(checkpoint, pool, merged=True, device=device, watch=lambda name, x: self.sums.watch(name, x))

    def embed(self, ids: Tensor) -> list[Tensor]:
        """The streams before the first layer."""
        return self.model.embed(ids)

    def layer(self, number: int, inputs: _Owners, streams: list[Tensor]) -> list[Tensor]:
        """The streams after a layer."""
        self.sums = _Sums(inputs, self.sums.device)
        streams = self.model.layer(number, streams)
        for name, each in inputs.items():
            self.writer.add(each, (self.sums.found.pop(name) / self.writer.tokens).cpu().numpy())
        return streams

    def final(self, streams: list[Tensor]) -> list[Tensor]:
        """What the head is multiplied with."""
        return self.model.final(streams)


@dataclass(frozen=True)
class Progress:
    """How far a calibration has come: the layers that are done, the streams after them and the digests so far."""

    path: Path
    key: str  # of all that decides the calibration

    def save(self, layers: int, streams: list[Tensor], digests: Mapping[str, str]) -> None:
        """Write it whole, in place of what was there."""
        told = json.dumps({"key": self.key, "layers": layers, "digests": dict(digests)})
        arrays: dict[str, Any] = {f"stream{i}": x.cpu().numpy() for i, x in enumerate(streams)}
        with whole(self.path) as partial, open(partial, "wb") as stream:
            np.savez(stream, told=np.array(told), **arrays)

    def load(self, device: str) -> tuple[int, list[Tensor], dict[str, str]] | None:
        """What was saved by a run that was asked for the same; None where there is none, or it cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as found:
                told = json.loads(str(found["told"]))
                if told["key"] != self.key:
                    return None
                count = sum(name.startswith("stream") for name in found.files)
                streams = [torch.from_numpy(found[f"stream{i}"]).to(device) for i in range(count)]
            return told["layers"], streams, told["digests"]
        except (OSError, ValueError, TypeError, LookupError, EOFError, BadZipFile):
            return None


def calibrate(
    checkpoint: Checkpoint,
    tokens: Numbers,
    path: Path,
    keys: Mapping[str, Any],
    *,
    gradients: bool = False,
    through: Encodings | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the calibration of tokens [batch, time] to `path`; returns how many matrices it is of.

    With `gradients` also how much each matrix moves predictions, by tokens from all over them. With `through` layers
    are quantized as they are run, to these encodings by unified names, and later matrices make up for earlier ones. The
    ranks are joined first, as a GGUF file holds them. Unfinished work lies in `path`.partial and `path`.streams.
    """
    checkpoint.refuse_doubts()
    layers, matrices = inputs_of(checkpoint, through), _matrices(checkpoint)
    partial, beside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".streams")
    last = next(weight for weight in reversed(matrices) if not weight.linear)  # the head, or the embedding that is one
    head = _head_inputs(checkpoint, last, gradients)
    inputs = (*(each for layer in layers for each in layer.values()), *head)
    writer = Writer(partial, inputs, keys, tokens.size, _extents(checkpoint, matrices) if gradients else {})
    state = Progress(beside, _key(checkpoint, tokens, {**keys, "gradients": gradients}))
    square, found = _forward(checkpoint, layers, tokens, writer, state, device, progress, through), {}
    if gradients:
        found = squares_of_gradients(checkpoint, _spread(tokens), device=device, progress=progress)
        if last.role == _EMBEDDING:
            found, square = _of_tied(checkpoint, found, square)
    for each in head:
        writer.add(each, square)
    writer.finish({weight.gguf: _in_order(found[weight.unified], weight, checkpoint) for weight in matrices if found})
    os.replace(partial, path)
    beside.unlink()
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
        if (known := state.load(device)) and writer.path.exists():
            done, streams, writer.digests = known
            progress(done)
        else:
            _refuse_strangers(writer.path, state.path)
            done, streams = 0, stage.embed(ids)
            writer.begin()
        for number in range(done, len(layers)):
            streams = stage.layer(number, layers[number], streams)
            state.save(number + 1, streams, writer.digests)
            progress(1)
        normed = stage.final(streams)[0].flatten(0, 1)
        square: Floats = (normed.T @ normed / tokens.size).cpu().numpy()
        return square


def _spread(tokens: Numbers) -> Numbers:
    """Sequences at equal distances from tokens [batch, time], of `_GRADIENT_TOKENS` in all at most; one at least."""
    count = min(len(tokens), max(1, _GRADIENT_TOKENS // tokens.shape[1]))
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


def _in_order(gradients: Gradients, weight: Weight, checkpoint: Checkpoint) -> Gradients:
    """Gradients with the rows in GGUF's order."""
    if weight.gguf_order is None:
        return gradients
    return replace(gradients, rows=gradients.rows[weight.gguf_order(checkpoint.config)])


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
    for part in _source_facts(checkpoint):
        digest.update(repr(part).encode())
    digest.update(json.dumps(dict(keys), sort_keys=True).encode())
    return digest.hexdigest()


def _source_facts(checkpoint: Checkpoint) -> Iterator[Any]:
    """What a source is: its files' names, sizes and headers, its configuration, and how its ranks were joined."""
    for file in checkpoint.index.files:
        yield file.storage.name, file.storage.size, file.checksum
    yield sorted(checkpoint.config.facts.items(), key=lambda item: item[0])
    yield checkpoint.norms, checkpoint.unusual


def source_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of what a source is, for the keys of a calibration."""
    return hashlib.sha256(repr(list(_source_facts(checkpoint))).encode()).hexdigest()

"""A calibration by the same streamed forward pass that verifies: layer after layer, and resumed where it stopped.

After each layer its second moments are in the calibration, and the tokens' streams in a file beside it: a run that was
interrupted, asked for the same again, goes on with the next layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from neoxconv.formats.calibration import Inputs, Writer, triangle
from neoxconv.verify.logits.gradients import squares_of_gradients
from neoxconv.verify.logits.stream import running, side

_GRADIENT_TOKENS = 8192  # at most: the streams before all layers are kept at once, and means need no more
_OUTPUT_TOKENS = 32768  # at most: second moments do need more
_EMBEDDING, _HEAD = "embedding", "head"  # roles
_Owners = Mapping[str, Inputs]  # by the unified name of the first weight of each layer that they multiply


def inputs_of(checkpoint: Checkpoint) -> tuple[dict[str, Inputs], ...]:
    """For each layer what its matrices are multiplied with, by the unified name of the first of them that has it."""
    layers: list[dict[str, Inputs]] = [{} for _ in range(checkpoint.config.layers)]
    first: dict[str, str] = {}  # by the norm that makes it
    for layer, weight in checkpoint.architecture.names(checkpoint.config):
        if layer is None or not weight.linear:
            continue
        owner = first.setdefault(weight.norm or weight.unified, weight.unified)
        before = layers[layer][owner].names if owner in layers[layer] else ()
        columns = checkpoint.config.sizes[weight.shape[1]]
        layers[layer][owner] = Inputs((*before, weight.gguf), columns)
    return tuple(layers)


def needed(
    checkpoint: Checkpoint, sequences: int, length: int, gradients: bool = False, outputs: bool = False
) -> tuple[int, int]:
    """Bytes that a calibration holds at most, and those that its file will have but for the header.

    Held are the moments of a layer, the largest of them once more while it is packed, and the tokens' streams before
    and after the layer. For gradients the streams before all layers are held, of fewer tokens, and for the outputs two
    sums of a layer, and the largest three times more while it is put in order and packed.
    """
    layers = inputs_of(checkpoint)
    moments = max(sum(4 * each.columns**2 for each in layer.values()) for layer in layers)
    largest = max(4 * each.packed for layer in layers for each in layer.values())
    stream = 4 * length * checkpoint.config.hidden
    held = moments + 2 * largest + 2 * sequences * stream
    disk = 4 * triangle(checkpoint.config.hidden) + sum(4 * each.packed for layer in layers for each in layer.values())
    if gradients or outputs:
        kept = (checkpoint.config.layers + 2) * _few(sequences, length, outputs) * stream
        rows = [checkpoint.config.sizes[w.shape[0]] for w in _matrices(checkpoint) if w.linear and outputs]
        squares = sum(2 * 4 * side**2 for side in rows) // checkpoint.config.layers + 3 * 4 * max(rows, default=0) ** 2
        held, disk = max(held, kept + squares), disk + sum(4 * triangle(side) for side in rows)
    return held, disk


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
    outputs: bool = False,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the calibration of tokens [batch, time] to `path`; returns how many matrices it is of.

    With `gradients` also how much each matrix moves predictions, by tokens from all over them; with `outputs` that too,
    and the second moments of gradients at what matrices put out. The ranks are joined first, as a GGUF file holds them.
    Unfinished work lies in `path`.partial and `path`.streams.
    """
    checkpoint.refuse_doubts()
    gradients = gradients or outputs
    layers, matrices = inputs_of(checkpoint), _matrices(checkpoint)
    partial, beside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".streams")
    last = next(weight for weight in reversed(matrices) if not weight.linear)  # the head, or the embedding that is one
    head = _head_inputs(checkpoint, last, gradients)
    inputs = (*(each for layer in layers for each in layer.values()), *head)
    extents = _extents(checkpoint, matrices) if gradients else {}
    rows = {weight.gguf: extents[weight.gguf][0] for weight in matrices if weight.linear and outputs}
    writer = Writer(partial, inputs, keys, tokens.size, extents, rows)
    state = Progress(beside, _key(checkpoint, tokens, {**keys, "gradients": gradients, "outputs": outputs}))
    square, found = _forward(checkpoint, layers, tokens, writer, state, device, progress), {}
    if gradients:
        found = _backward(checkpoint, tokens, writer, device, progress)
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
) -> Floats:
    """Write the moments of every layer from the first that is not done; returns those of what the head multiplies."""
    with running(tokens, device) as (pool, ids):
        sums = _Sums({}, device)
        model = side(checkpoint, pool, merged=True, device=device, watch=lambda name, x: sums.watch(name, x))
        if (known := state.load(device)) and writer.path.exists():
            done, streams, writer.digests = known
            progress(done)
        else:
            _refuse_strangers(writer.path, state.path)
            done, streams = 0, model.embed(ids)
            writer.begin()
        for number in range(done, len(layers)):
            sums = _Sums(layers[number], device)
            streams = model.layer(number, streams)
            for name, each in layers[number].items():
                writer.add(each, (sums.found.pop(name) / tokens.size).cpu().numpy())
            state.save(number + 1, streams, writer.digests)
            progress(1)
        normed = model.final(streams)[0].flatten(0, 1)
        square: Floats = (normed.T @ normed / tokens.size).cpu().numpy()
        return square


def _backward(
    checkpoint: Checkpoint, tokens: Numbers, writer: Writer, device: str, progress: Callable[[int], None]
) -> dict[str, Gradients]:
    """Gradients by unified name; their second moments are written, where the calibration is to have them."""
    weights = {weight.unified: weight for weight in _matrices(checkpoint)}

    def add(name: str, square: Floats) -> None:
        order = _gguf_rows(weights[name], checkpoint)
        writer.add_outputs(weights[name].gguf, square[order][:, order])

    few = _few(len(tokens), tokens.shape[1], bool(writer.outputs))
    return squares_of_gradients(
        checkpoint,
        tokens[np.arange(few) * len(tokens) // few],
        device=device,
        progress=progress,
        outputs=add if writer.outputs else None,
    )


def _few(sequences: int, length: int, outputs: bool) -> int:
    """How many of the sequences gradients are taken of."""
    return min(sequences, max(1, (_OUTPUT_TOKENS if outputs else _GRADIENT_TOKENS) // length))


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

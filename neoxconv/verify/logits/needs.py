"""What a calibration is of, and what it takes: the inputs of a model's matrices, memory and disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from neoxconv.core.model import Checkpoint
from neoxconv.core.table import Weight
from neoxconv.errors import PlanError
from neoxconv.formats.calibration.names import Inputs, triangle
from neoxconv.verify.logits.stream import INSIDE
from neoxconv.verify.logits.through import Encodings, gets_aim, held_through
from neoxconv.words import size

EMBEDDING, HEAD = "embedding", "head"  # roles
# Tokens of a backward pass at most, as the streams before all layers are kept at once. Means need few, second moments
# more.
GRADIENT_TOKENS, OUTPUT_TOKENS = 8192, 32768
_PROGRAM = 640 << 20  # bytes: Python, torch, slabs of weights (measured: docs/calibration.md)
_INSIDES = 3  # of an MLP at once: before its activation, behind it, and what is on its way between them
_INSIDES_BACK = 10  # and of a backward pass, gradients and their squares among them (measured on SmolLM2-135M)


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


def matrices_of(checkpoint: Checkpoint) -> list[Weight]:
    """The weights of a GGUF file that have gradients: matrices of the layers, embedding and head."""
    weights = [weight for _, weight in checkpoint.architecture.in_gguf(checkpoint.config)]
    return [weight for weight in weights if weight.linear or weight.role in (EMBEDDING, HEAD)]


@dataclass(frozen=True)
class Needs:
    """Bytes that a calibration takes at most: of memory, of its file, of disk while it is made."""

    memory: int
    file: int
    disk: int


def needs(
    checkpoint: Checkpoint,
    tokens: int,
    *,
    gradients: bool = False,
    outputs: bool = False,
    through: Encodings | None = None,
) -> Needs:
    """What a calibration takes.

    Held are the moments of a layer's inputs and the tokens' streams, which are on disk too, twice while they are saved.
    With `gradients` and `outputs` the streams before all layers are held besides, of fewer tokens; with `outputs` two
    sums for each matrix of a layer, the largest three times more while it is put in order and packed. What `through`
    adds is in through.py.
    """
    layers, config = inputs_of(checkpoint, through), checkpoint.config
    moments = max(sum(4 * each.columns**2 for each in layer.values()) for layer in layers)
    streams, inside = 4 * tokens * config.hidden, min(INSIDE, 4 * tokens * config.ff)
    head = 4 * Inputs((), config.hidden).packed
    every = [each for layer in layers for each in layer.values()]
    file = head + sum(4 * (each.packed + each.rows * each.columns) for each in every)
    if through:
        return Needs(_PROGRAM + held_through(config, tokens), file, file + 4 * streams)
    memory, disk = moments + streams + _INSIDES * inside, file + 2 * streams
    few = OUTPUT_TOKENS if outputs else GRADIENT_TOKENS if gradients else 0
    back = streams + (config.layers + 2) * 4 * min(tokens, few) * config.hidden
    back += _INSIDES_BACK * min(inside, 4 * few * config.ff)
    if outputs:
        sides = [config.sizes[weight.shape[0]] for weight in matrices_of(checkpoint) if weight.linear]
        back += sum(2 * 4 * side**2 for side in sides) // config.layers + 3 * 4 * max(sides) ** 2
        more = sum(4 * triangle(side) for side in sides)
        file, disk = file + more, disk + more
    return Needs(_PROGRAM + max(memory, back), file, disk)


def check_room(path: Path, needed: int, *unfinished: Path) -> None:
    """Raise PlanError where the disk has no room for what is still to be written."""
    written = sum(512 * each.stat().st_blocks for each in unfinished if each.is_file())
    free = shutil.disk_usage(path.resolve().parent).free
    if needed - written > free:
        raise PlanError(
            f"{path}: takes {size(needed - written)} of disk while it is made, {size(free)} are free; make room, or "
            "give another place."
        )

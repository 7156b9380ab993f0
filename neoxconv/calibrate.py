"""`neoxconv calibrate`: an importance matrix from a text, by the same streamed forward pass that verifies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from neoxconv.errors import CheckpointError
from neoxconv.imatrix import COUNTS, SUMS
from neoxconv.model import Checkpoint
from neoxconv.publish import check_side_file, whole
from neoxconv.remote import Place
from neoxconv.request import Given, opened
from neoxconv.terminal import progress_bar
from neoxconv.verify.forward import running, side
from neoxconv.verify.metrics import Doubles, Numbers
from neoxconv.verify.text import tokens_for


def make_matrix(source: Place, given: Given) -> str:
    """Carry the command out; returns what was made. Raises PlanError where the output may not be written."""
    output = given["output"]
    check_side_file(output, (source, given["text"], given["tokens"]), given["overwrite"])
    checkpoint = opened(source, given, given["norms"] or "mean")
    tokens, text = tokens_for(checkpoint, given["text"], given["tokens"], given["length"], given["sequences"])
    with progress_bar(checkpoint.config.layers, "layers", given["quiet"], "layer") as progress:
        sums = calibrate(checkpoint, tokens, device=given["device"], progress=progress)
    write(output, sums, tokens, text)
    return f"{output}: importances of {len(sums)} tensors from {tokens.size} tokens of {text}"


def calibrate(
    checkpoint: Checkpoint,
    tokens: Numbers,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Doubles]:
    """By the GGUF name of each matrix in the layers: the sum over tokens [batch, time] of its squared inputs [columns].

    The ranks are joined first, as a GGUF file holds them; `progress` is told of every layer.
    """
    names = {weight.unified: weight.gguf for _, weight in checkpoint.architecture.names(checkpoint.config)}
    sums: dict[str, Doubles] = {}

    def watch(name: str, x: Tensor) -> None:
        squares = x.reshape(-1, x.shape[-1]).double().square().sum(0).cpu().numpy()
        sums[names[name]] = sums.get(names[name], 0) + squares

    with running(tokens, device) as (pool, ids):
        model = side(checkpoint, pool, merged=True, device=device, watch=watch)
        streams = model.embed(ids)
        for number in range(checkpoint.config.layers):
            streams = model.layer(number, streams)
            progress(1)
    with np.errstate(over="ignore"):
        bad = [name for name, values in sums.items() if not np.isfinite(values.astype(np.float32)).all()]
    if bad:
        raise CheckpointError(
            f"{checkpoint.index.folder}: what {bad[0]} is multiplied with is not finite; check the weights."
        )
    return sums


def write(path: Path, sums: dict[str, Doubles], tokens: Numbers, text: str) -> None:
    """Write the GGUF form that llama.cpp's tools read. Raises NeoxconvError where the disk does not take it."""
    from gguf import GGUFWriter

    with whole(path) as partial:
        writer = GGUFWriter(partial, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [text])
        writer.add_uint32("imatrix.chunk_count", len(tokens))
        writer.add_uint32("imatrix.chunk_size", tokens.shape[1])
        for name in sorted(sums):
            writer.add_tensor(name + SUMS, sums[name].astype(np.float32))
            writer.add_tensor(name + COUNTS, np.array([tokens.size], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

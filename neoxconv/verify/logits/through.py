"""Layer after layer: what is rounded wrong is made up for by the matrices behind it that write to the stream.

Every layer is run on two streams at once, the model's own and that of the model as quantized so far. Let x be what such
a matrix W [rows, columns] is multiplied with in the second, y what it would have to put out for the streams to be equal
behind it: what it puts out in the first, and all that the second lacks before it. Rounded is not W but its aim

    W + E[(y - W x) x^T] (E[x x^T] + r I)^-1        r = RIDGE of the mean diagonal of E[x x^T]

which is the ridge regression of y on x, drawn towards W instead of 0. Its codes are chosen together by E[x x^T] of the
second stream. All other matrices are rounded as they are, by what they are multiplied with in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neoxconv.arch.forward import forward_of
from neoxconv.core.encoding import Encoding, Moments
from neoxconv.core.layout import FACTORS
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig, Weight
from neoxconv.core.tensor import slabs
from neoxconv.dtypes import Floats
from neoxconv.errors import PlanError
from neoxconv.formats.calibration.names import Inputs
from neoxconv.formats.calibration.write import Writer
from neoxconv.quant.feedback import encode as feedback
from neoxconv.quant.feedback.encode import Factors, factors_of
from neoxconv.targets.gguf import gguf_entries
from neoxconv.targets.recipe import Recipe
from neoxconv.verify.logits.stream import SLAB, StreamedRank, read

RIDGE = 0.1  # better than 1 on held-out text (docs/calibration.md, "Layer after layer")
_WRITING = ("attn_out", "mlp_out")  # roles of the matrices whose output is added to the stream
Encodings = Mapping[str, Encoding]  # by the unified names of matrices


def through_of(checkpoint: Checkpoint, mix: str) -> Encodings:
    """What a mix stores the matrices of a model as, if it is given a calibration.

    Raises PlanError where that leaves nothing to make up for.
    """
    recipe = Recipe("gguf", type=mix, calibration=Path())  # of which there will be one is all that matters
    entries = gguf_entries(checkpoint, recipe)
    if not any(entry.grid for entry in entries):
        raise PlanError(f"--through {mix}: has no codes to choose; give the quantized type that you will convert to.")
    return {entry.unified: entry.encoding for entry in entries if isinstance(entry.encoding, Encoding)}


def gets_aim(weight: Weight, through: Encodings) -> bool:
    """Whether a weight of a layer makes up for what was rounded before it: its codes must be chosen together."""
    return weight.role in _WRITING and through[weight.unified].grid is not None


def held_through(config: ModelConfig, tokens: int) -> int:
    """Bytes that are held at most: streams and the inside of an MLP of both models, a matrix, its moments and factors.

    Beside the float32 of a matrix stand its aim, what is made of it, and float64 of the regression.
    """
    widest = max(config.hidden, config.ff)
    streams = 2 * 4 * tokens * (4 * config.hidden + 4 * widest)  # 2.3 GB at most for 24 k tokens of a 135M model
    return streams + (FACTORS + 8) * (widest**2 + 2 * config.hidden**2) + 8 * 4 * widest * config.hidden


@dataclass(frozen=True)
class _Both(StreamedRank):
    """A rank that is multiplied with both streams' inputs, the first half of a batch its own, the second the quantized.

    No slabs of rows pass: a matrix is chosen as a whole.
    """

    stage: Through | None = None

    def linear(self, x: Tensor, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        assert self.stage and (start, stop) == (0, None), "layers multiply with whole matrices"
        own, quantized = (half.flatten(0, -2) for half in x.chunk(2))
        results = self.stage.products(name + ".weight", own, quantized)
        return torch.cat(results).reshape(*x.shape[:-1], -1)


class Through:
    """Runs layers on both streams, one batch behind the other, and writes moments and aims as it quantizes them."""

    sides = 2  # models whose streams pass

    def __init__(
        self, checkpoint: Checkpoint, pool: ThreadPoolExecutor, device: str, through: Encodings, writer: Writer
    ) -> None:
        self.config, self.forward = checkpoint.config, forward_of(checkpoint.architecture)
        self.rank = _Both(checkpoint.tensors, device, pool, lambda count: None, stage=self)
        self.through, self.writer = through, writer
        names = checkpoint.architecture.names(checkpoint.config)
        self.weights = {weight.unified: weight for _, weight in names if weight.linear}

    def embed(self, ids: Tensor) -> list[Tensor]:
        """Both streams before the first layer: what embeddings are rounded to is left out."""
        return [torch.cat([x, x]) for x in self.forward.embed([self.rank], ids, self.config)]

    def layer(
        self, number: int, inputs: Mapping[str, Inputs], streams: list[Tensor], progress: Callable[[int], None]
    ) -> list[Tensor]:
        """Both streams after a layer, whose `inputs` are as `inputs_of` gives them.

        All tokens at once, as no matrix can be used before all of what it is multiplied with is known.
        """
        self.inputs = {name: each for each in inputs.values() for name in each.names}
        self.found: dict[str, tuple[Tensor, Factors]] = {}
        own, quantized = (half.flatten(0, -2) for half in streams[0].chunk(2))
        self.lacking = own - quantized
        streams = self.forward.block([self.rank], number, streams, self.config)
        progress(len(streams[0]) // self.sides)
        return streams

    def final(self, streams: list[Tensor]) -> list[Tensor]:
        """What the head is multiplied with, for any of the streams."""
        return self.forward.final([self.rank], streams, self.config)

    def products(self, name: str, own: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix times inputs [tokens, columns] of its own stream, and as rounded times those of the other."""
        weight = self.weights[name]
        rows = self._rows(name)
        exact = own @ rows.T
        inputs = self.inputs[weight.gguf]
        moments, factors = self._measured(inputs, name, quantized if inputs.encoding else own)
        if inputs.encoding:
            rows = aim(rows, exact + self.lacking, quantized, moments)
            self.writer.add_aim(inputs, rows.cpu().numpy())
        result = quantized @ self._rounded(name, rows, factors).T
        if weight.role in _WRITING:
            self.lacking += exact - result
        return exact, result

    def _rows(self, name: str) -> Tensor:
        """A whole matrix."""
        tensor = self.rank.tensors[name]
        return self.rank.on_device(read(tensor, 0, tensor.rows))

    def _measured(self, inputs: Inputs, name: str, x: Tensor) -> tuple[Tensor, Factors]:
        """The moments of inputs [tokens, columns] and their factors; they are written when they are first met."""
        if inputs.owner not in self.found:
            sums = x.T @ x
            self.writer.add(inputs, sums.cpu().numpy())
            upper = torch.triu(sums / self.writer.tokens)
            moments = upper + torch.triu(upper, 1).T  # as the file holds them, or `convert` would find other codes
            values = moments.cpu().numpy()
            self.found[inputs.owner] = moments, factors_of(Moments(len(values), "", values.copy), name)
        return self.found[inputs.owner]

    def _rounded(self, name: str, rows: Tensor, factors: Factors) -> Tensor:
        """What `convert` stores of rows, decoded."""
        encoding, values = self.through[name], rows.cpu().numpy()
        grid = encoding.grid

        def rounded(start: int, stop: int) -> Floats:
            band = values[start:stop]
            return encoding.decode(feedback.encode(grid, band, factors) if grid else encoding.encode(band))

        bands = list(slabs(self.rank.tensors[name], SLAB))
        return self.rank.on_device(np.concatenate(list(self.rank.pool.map(lambda band: rounded(*band), bands))))


def aim(rows: Tensor, wanted: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """Rows near `rows` [rows, columns] whose product with x [tokens, columns], of these moments, is near `wanted`."""
    damped = moments.double()
    damped.diagonal().add_(RIDGE * damped.diagonal().mean())
    missed = (wanted - x @ rows.T).T @ x / len(x)
    return rows + torch.cholesky_solve(missed.T.double(), torch.linalg.cholesky(damped)).T.float()

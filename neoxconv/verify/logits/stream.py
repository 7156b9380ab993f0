"""A model run layer by layer from disk: no more of its weights in memory than a few slabs of rows.

The tokens' streams are kept, and one pass over the weights serves all of them. Each thread reads a slab of a weight,
widens it and multiplies with it, so that nothing waits for a disk or for another thread, and the sums are in the same
order for any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from neoxconv.arch.forward import Forward, across_stages, forward_of
from neoxconv.core.model import Checkpoint
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import LazyTensor, band
from neoxconv.dtypes import Floats, Numbers
from neoxconv.errors import PlanError
from neoxconv.formats.neox import folder as neox
from neoxconv.formats.neox.numbers import FIRST_LAYER
from neoxconv.quant import floats

SLAB = 16 << 20  # bytes of float32
_AHEAD = 2  # slabs
INSIDE = 256 << 20  # bytes that the inside of an MLP may take; 2730 tokens of the 20B model
_Watch = Callable[[str, Tensor], None]  # told a weight's name and what it is multiplied with


@dataclass(frozen=True)
class StreamedRank:
    """One rank's tensors by unified name, read when they are asked for."""

    tensors: dict[str, LazyTensor]
    device: str
    pool: ThreadPoolExecutor
    progress: Callable[[int], None]
    watch: _Watch | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name + ".weight"].shape

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        tensor = self.tensors[name + ".weight"]
        return self.on_device(np.concatenate([read(tensor, n, n + 1) for n in numbers]))

    def vector(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self.on_device(read(tensor, 0, tensor.rows).reshape(-1))

    def linear(self, x: Tensor, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if self.watch:
            self.watch(name + ".weight", x)
        tensor = self.part(name, start, stop)
        flat = x.reshape(-1, tensor.columns)
        result = torch.empty(len(flat), tensor.rows, device=x.device)
        list(self.pool.map(partial(self._multiply, flat, tensor, result), *_bands(tensor)))
        self.progress(tensor.nbytes)
        return result.reshape(*x.shape[:-1], tensor.rows)

    def _multiply(self, flat: Tensor, tensor: LazyTensor, result: Tensor, start: int, stop: int) -> None:
        """Fill the columns of `result` that are `flat` times rows `start` to `stop` of a weight."""
        with torch.inference_mode():
            torch.mm(flat, self.on_device(read(tensor, start, stop)).T, out=result[:, start:stop])

    def part(self, name: str, start: int, stop: int | None) -> LazyTensor:
        """Rows `start` to `stop`, to the end by default, of a weight."""
        tensor = self.tensors[name + ".weight"]
        return band(tensor, start, tensor.rows if stop is None else stop)

    def slabs(self, tensor: LazyTensor) -> Iterator[Tensor]:
        """The tensor's rows in float32, in bands, read ahead."""
        waiting: deque[Future[Floats]] = deque()
        for start, stop in zip(*_bands(tensor), strict=True):
            waiting.append(self.pool.submit(read, tensor, start, stop))
            if len(waiting) > _AHEAD:
                yield self.on_device(waiting.popleft().result())
        while waiting:
            yield self.on_device(waiting.popleft().result())
        self.progress(tensor.nbytes)

    def on_device(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)


def read(tensor: LazyTensor, start: int, stop: int) -> Floats:
    """Rows as float32, whatever they are stored as."""
    return floats(tensor.read(start, stop), tensor.dtype)


def _bands(tensor: LazyTensor) -> tuple[list[int], list[int]]:
    """Where slabs of a tensor's rows begin and end."""
    step = max(1, SLAB // (4 * tensor.columns))
    starts = list(range(0, tensor.rows, step))
    return starts, [*starts[1:], tensor.rows]


@dataclass(frozen=True)
class Side:
    """A model that can be run: its ranks as they were trained, or one merged rank."""

    config: ModelConfig
    forward: Forward  # the architecture's forward pass
    ranks: list[StreamedRank] = field(repr=False)
    stages: tuple[int, ...] = ()  # the layers that a pipeline stage after the first begins with

    def embed(self, tokens: Tensor) -> list[Tensor]:
        """The streams before the first layer, for tokens [batch, time]."""
        return self.forward.embed(self.ranks, tokens, self.config)

    def layer(
        self,
        number: int,
        streams: list[Tensor],
        into: list[Tensor] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[Tensor]:
        """The streams after a layer; the sequences pass in groups, and the weights once for each group.

        Where memory is short the result can be had in place of other streams, as of those before the layer. `progress`
        is told of sequences.
        """
        if number in self.stages:
            streams = across_stages(streams)
        batch, time, _ = streams[0].shape
        group = max(1, INSIDE // (4 * self.config.ff * time))
        parts = []
        for start in range(0, batch, group):
            band = [x[start : start + group] for x in streams]
            after = self.forward.block(self.ranks, number, band, self.config)
            progress(len(after[0]))
            if into is None:
                parts.append(after)
                continue
            for stream, x in zip(into, after, strict=True):
                stream[start : start + group] = x
        if into is not None:
            return into
        return [torch.cat(found) for found in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def final(self, streams: list[Tensor]) -> list[Tensor]:
        """The normalised streams before the head."""
        return self.forward.final(self.ranks, streams, self.config)

    def logits(self, normed: list[Tensor], start: int, stop: int) -> Tensor:
        """The logits [batch, time, stop - start] of the words from `start` to `stop`."""
        return self.forward.logits(self.ranks, normed, start, stop, self.config)


def _as_trained(checkpoint: Checkpoint) -> list[dict[str, LazyTensor]]:
    """Each rank's own tensors by unified name; of a source without ranks the model's."""
    return checkpoint.ranks if len(checkpoint.ranks) > 1 else [checkpoint.tensors]


def side(
    checkpoint: Checkpoint,
    pool: ThreadPoolExecutor,
    *,
    merged: bool = False,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
    watch: _Watch | None = None,
) -> Side:
    """The model of a checkpoint, rank by rank as it was trained unless `merged`."""
    tensors = [checkpoint.tensors] if merged else _as_trained(checkpoint)
    stages = tuple(start - FIRST_LAYER for start in neox.stage_starts(checkpoint.index))
    ranks = [StreamedRank(rank, device, pool, progress, watch) for rank in tensors]
    return Side(checkpoint.config, forward_of(checkpoint.architecture), ranks, stages)


@contextmanager
def running(tokens: Numbers, device: str) -> Iterator[tuple[ThreadPoolExecutor, Tensor]]:
    """The readers that sides share, and tokens [batch, time] where the sides compute.

    Raises PlanError where torch cannot compute on the device.
    """
    _check_device(device)
    with torch.inference_mode(), multipliers() as pool:
        yield pool, torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(device)


def multipliers() -> ThreadPoolExecutor:
    """As many threads as torch would use, each of which multiplies by itself."""
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))


def _check_device(device: str) -> None:
    """Raise PlanError where torch cannot compute on it."""
    name, _, number = device.partition(":")
    number = number or "0"
    if device == "cpu" or (name == "cuda" and number.isdigit() and int(number) < torch.cuda.device_count()):
        return
    found = "torch finds no CUDA device of that number" if name == "cuda" else "expected cpu, cuda or cuda:N"
    raise PlanError(f"--device {device}: {found}; leave the option out to use the CPU.")

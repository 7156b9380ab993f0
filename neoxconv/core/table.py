"""A model's hyperparameters, and the rows of an architecture's table: its weights, and how files hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import Floats


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyperparameters that change the function, in one spelling."""

    layers: int
    hidden: int
    heads: int
    ff: int
    rows: int  # of the embedding: the vocabulary with its padding
    context: int
    rotary_pct: float  # part of each head that is rotated
    rotary_base: float
    norm_eps: float
    parallel_residual: bool  # attention and MLP read the same stream (gpt_j_residual)
    activation: str  # "gelu" (erf), "gelu_tanh", or "silu" of a gated MLP
    tied: bool  # the head is the embedding
    kv_heads: int | None = None  # of keys and values, each for a group of queries; None: as many as `heads`
    norm: str = "layernorm"  # or "rmsnorm", or "rmsnorm_outside": x / (rms + eps), as gpt-neox had it until 2025-05
    attention_bias: bool = True  # whether attention's matrices have biases
    mlp_bias: bool = True  # whether the MLP's have
    window: int | None = None  # how many tokens a token attends to, itself included; None: all before it
    positions: str = "rotary"  # or "learned", a row for each place added to the embedding; "alibi"
    unwindowed: tuple[int, ...] = ()  # the layers in which tokens attend to all before them, whatever `window` is
    scaled_scores: bool = True  # attention divides its scores by the root of a head's size
    shared_norm: bool = False  # attention and MLP read one norm's output, in gpt-neox: gpt_j_tied

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def sizes(self) -> dict[str, int]:
        """What the words in a weight's `shape` stand for."""
        kv = self.key_heads * self.head_size
        qkv = self.hidden + 2 * kv
        return {
            "rows": self.rows, "hidden": self.hidden, "kv": kv, "qkv": qkv, "ff": self.ff, "context": self.context
        }  # fmt: skip

    @property
    def rotary_dims(self) -> int:
        """Numbers of each head that are rotated, as every implementation rounds them: down."""
        return int(self.head_size * self.rotary_pct)

    @property
    def facts(self) -> dict[str, Any]:
        """The hyperparameters as plain values by name, for manifests and tables."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


Ranks = Sequence[LazyTensor]  # one tensor as each rank holds it
RankTensors = list[dict[str, LazyTensor]]  # each rank's tensors by unified name


@dataclass(frozen=True)
class Join:
    """How the tensor-parallel ranks' parts become one tensor, and how one tensor becomes parts."""

    name: str
    join: Callable[[Ranks, ModelConfig], LazyTensor]
    split: Callable[[LazyTensor, int, ModelConfig], list[LazyTensor]]


_Order = Callable[[ModelConfig], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Weight:
    """One row of an architecture's table; `{i}` in a name stands for the layer."""

    stage: str  # embed, layer, norm, head: which layer file holds it
    source: tuple[str, ...]  # names in a layer file of what holds it, alone or with others: first the one to write
    join: Join
    unified: str  # its Hugging Face name, used in every message
    gguf: str  # empty where GGUF has no such family
    _: KW_ONLY
    # What a mix asks for: qkv, or attn_q, attn_k, attn_v; attn_out, mlp_in, mlp_out, embedding, positions, head, norm,
    # bias.
    role: str
    shape: tuple[str, ...]  # of the unified tensor, in words of `ModelConfig.sizes`
    gguf_order: _Order | None = None  # the order of rows in GGUF, as indices of unified rows
    norm: str | None = None  # the norm (unified, without .weight) whose output it multiplies
    also: tuple[str, ...] = ()  # its other names in Hugging Face's files
    when: Callable[[ModelConfig], bool] = lambda config: True  # whether a model has it, apart from a tied head
    transposed: bool = False  # whether Hugging Face's files hold it [inputs, outputs] (transformers' Conv1D)

    @property
    def linear(self) -> bool:
        """Whether it is a matrix of a layer, which quantized folders quantize."""
        return self.stage == "layer" and len(self.shape) == 2

    def unified_at(self, layer: int) -> str:
        """Its unified name in one layer; outside of the layers every number gives the same."""
        return self.unified.replace("{i}", str(layer))

    def at(self, layer: int) -> Weight:
        """The weight of one layer: its unified names and its GGUF name with the number in them."""
        number = str(layer)
        norm = self.norm.replace("{i}", number) if self.norm else None
        return replace(self, unified=self.unified_at(layer), gguf=self.gguf.replace("{i}", number), norm=norm)


@dataclass(frozen=True)
class Fused:
    """A tensor of gpt-neox's layer files that holds several weights, its rows in an order of its own.

    `order(config, degree)`, int64 [rows], is for one of `degree` ranks: row i of its parts, one below the other in the
    order of `parts`, is row order[i] of its tensor.
    """

    source: str  # its name in a layer file
    parts: tuple[str, ...]  # the weights in it, by their unified names with `{i}`
    order: Callable[[ModelConfig, int], npt.NDArray[np.int64]]
    layout: str | None = None  # where one name has had several orders: what --qkv-layout calls this one

    def name_at(self, layer: int) -> str:
        """What it is called among unified names until it is taken apart."""
        return f"{self.source} of layer {layer}"

    def parts_at(self, layer: int) -> tuple[str, ...]:
        """The unified names of its parts in one layer."""
        return tuple(part.replace("{i}", str(layer)) for part in self.parts)


@dataclass(frozen=True)
class Buffer:
    """A tensor of every layer that gpt-neox stored until 2024, though it follows from the hyperparameters."""

    source: str  # its name in a layer file
    after: str  # the oldest name of the weight that it follows there
    values: Callable[[ModelConfig], Floats]

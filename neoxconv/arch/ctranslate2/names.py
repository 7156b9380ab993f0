"""What CTranslate2 calls the tensors of each family that it runs, and the order of their rows.

Source: ctranslate2 4.8.5, specs/transformer_spec.py and converters/transformers.py (its loaders).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from neoxconv.arch.gpt_neox.weights import qkv_apart
from neoxconv.arch.gptj.rotation import halves_first
from neoxconv.core.table import ModelConfig
from neoxconv.dtypes import Numbers

_Order = Callable[[ModelConfig], Numbers]
_LAYER = "decoder/layer_{i}/"
ATTENTION, MLP = _LAYER + "self_attention/", _LAYER + "ffn/"
EMBEDDING, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"
POSITIONS = "decoder/position_encodings/encodings"
SHARED, GATE, PARALLEL = _LAYER + "shared_layer_norm", MLP + "linear_0_noact", _LAYER + "input_layer_norm"


@dataclass(frozen=True)
class Row:
    """A tensor of a model.bin: its name, the weights in it one below the other by their unified names, and the order of
    rows, as indices of theirs. `{i}` in names stands for the layer."""

    name: str
    parts: tuple[str, ...]
    order: _Order | None = None

    def at(self, layer: int) -> Row:
        """The row of one layer; outside of the layers every number gives the same."""
        number = str(layer)
        return replace(
            self,
            name=self.name.replace("{i}", number),
            parts=tuple(part.replace("{i}", number) for part in self.parts),
        )


def _linear(name: str, *modules: str, order: _Order | None = None) -> tuple[Row, Row]:
    """A matrix of one module, or of several, and its bias."""
    kinds = ("weight", "bias")
    weight, bias = (Row(f"{name}/{kind}", tuple(f"{each}.{kind}" for each in modules), order) for kind in kinds)
    return weight, bias


def _norm(name: str, module: str) -> tuple[Row, Row]:
    """A norm's gain and bias."""
    return Row(f"{name}/gamma", (f"{module}.weight",)), Row(f"{name}/beta", (f"{module}.bias",))


def _serial_norms(first: str, second: str) -> tuple[Row, ...]:
    """The norms before attention and before the MLP, where these follow each other."""
    return *_norm(ATTENTION + "layer_norm", first), *_norm(MLP + "layer_norm", second)


def _halves_first(config: ModelConfig) -> Numbers:
    """Queries and keys of each head in the order in which halves are rotated; values as they are."""
    heads = np.arange(config.heads)[:, None] * config.head_size + halves_first(config)
    rows = heads.reshape(-1)
    return np.concatenate([rows, config.hidden + rows, 2 * config.hidden + np.arange(config.hidden)])


def _gpt_neox(config: ModelConfig) -> tuple[Row, ...]:
    layer = "gpt_neox.layers.{i}."
    norms = layer + "input_layernorm", layer + "post_attention_layernorm"
    side_by_side = (*_norm(PARALLEL, norms[0]), *_norm(_LAYER + "post_attention_layer_norm", norms[1]))
    return (
        Row(EMBEDDING, ("gpt_neox.embed_in.weight",)),
        *_linear(ATTENTION + "linear_0", layer + "attention.query_key_value", order=qkv_apart),
        *_linear(ATTENTION + "linear_1", layer + "attention.dense"),
        *_linear(MLP + "linear_0", layer + "mlp.dense_h_to_4h"),
        *_linear(MLP + "linear_1", layer + "mlp.dense_4h_to_h"),
        *(side_by_side if config.parallel_residual else _serial_norms(*norms)),
        *_norm("decoder/layer_norm", "gpt_neox.final_layer_norm"),
        Row(HEAD, ("embed_out.weight",)),
    )


def _gptj(config: ModelConfig) -> tuple[Row, ...]:
    layer = "transformer.h.{i}."
    return (
        Row(EMBEDDING, ("transformer.wte.weight",)),
        *_linear(ATTENTION + "linear_0", *(f"{layer}attn.{x}_proj" for x in "qkv"), order=_halves_first),
        *_linear(ATTENTION + "linear_1", layer + "attn.out_proj"),
        *_linear(MLP + "linear_0", layer + "mlp.fc_in"),
        *_linear(MLP + "linear_1", layer + "mlp.fc_out"),
        *_norm(SHARED, layer + "ln_1"),
        *_norm("decoder/layer_norm", "transformer.ln_f"),
        *_linear("decoder/projection", "lm_head"),
    )


def _gpt2(config: ModelConfig) -> tuple[Row, ...]:
    layer = "transformer.h.{i}."
    return (
        Row(EMBEDDING, ("transformer.wte.weight",)),
        Row(POSITIONS, ("transformer.wpe.weight",)),
        *_linear(ATTENTION + "linear_0", layer + "attn.c_attn"),
        *_linear(ATTENTION + "linear_1", layer + "attn.c_proj"),
        *_linear(MLP + "linear_0", layer + "mlp.c_fc"),
        *_linear(MLP + "linear_1", layer + "mlp.c_proj"),
        *_serial_norms(layer + "ln_1", layer + "ln_2"),
        *_norm("decoder/layer_norm", "transformer.ln_f"),
        Row(HEAD, ("lm_head.weight",)),
    )


def _llama(config: ModelConfig) -> tuple[Row, ...]:
    layer = "model.layers.{i}."
    return (
        Row(EMBEDDING, ("model.embed_tokens.weight",)),
        *_linear(ATTENTION + "linear_0", *(f"{layer}self_attn.{x}_proj" for x in "qkv")),
        *_linear(ATTENTION + "linear_1", layer + "self_attn.o_proj"),
        *_linear(MLP + "linear_0", layer + "mlp.gate_proj"),
        *_linear(GATE, layer + "mlp.up_proj"),
        *_linear(MLP + "linear_1", layer + "mlp.down_proj"),
        *_serial_norms(layer + "input_layernorm", layer + "post_attention_layernorm"),
        *_norm("decoder/layer_norm", "model.norm"),
        Row(HEAD, ("lm_head.weight",)),
    )


FAMILIES: dict[str, Callable[[ModelConfig], tuple[Row, ...]]] = {
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,  # whose window is no shorter than its context
}


def rows_of(family: str, config: ModelConfig) -> Iterator[Row]:
    """Every tensor that a model of a family may have, its names spelled for its layer."""
    for row in FAMILIES[family](config):
        numbers = range(config.layers) if "{i}" in row.name else (0,)
        yield from map(row.at, numbers)

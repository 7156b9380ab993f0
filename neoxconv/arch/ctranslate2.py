"""CTranslate2's words: what it calls the tensors of each family that it runs, and the numbers that say the function.

Source: ctranslate2 4.8.5, specs/transformer_spec.py and attention_spec.py, converters/transformers.py (its loaders).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neoxconv.arch.gguf_keys import share
from neoxconv.arch.gpt_neox.weights import qkv_apart
from neoxconv.arch.gptj.rotation import halves_first
from neoxconv.core.table import ModelConfig
from neoxconv.dtypes import Numbers
from neoxconv.errors import CheckpointError, raise_all

_Order = Callable[[ModelConfig], Numbers]
_LAYER = "decoder/layer_{i}/"
_ATTENTION, _MLP = _LAYER + "self_attention/", _LAYER + "ffn/"
EMBEDDING, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"
_POSITIONS = "decoder/position_encodings/encodings"
_SHARED, _GATE, _PARALLEL = _LAYER + "shared_layer_norm", _MLP + "linear_0_noact", _LAYER + "input_layer_norm"
_ACTIVATIONS = {"gelu_tanh": 1, "silu": 2, "gelu": 3}  # Activation in specs/common_spec.py
_EPSILON = 1e-5  # where config.json has null
EPSILON_KEY, CONTEXT_KEY = "layer_norm_epsilon", "max_position_embeddings"  # in config.json; the latter is ours
_CONTEXT = 2048  # where nothing tells it, as in files of ctranslate2's own converter


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
    return *_norm(_ATTENTION + "layer_norm", first), *_norm(_MLP + "layer_norm", second)


def _halves_first(config: ModelConfig) -> Numbers:
    """Queries and keys of each head in the order in which halves are rotated; values as they are."""
    heads = np.arange(config.heads)[:, None] * config.head_size + halves_first(config)
    rows = heads.reshape(-1)
    return np.concatenate([rows, config.hidden + rows, 2 * config.hidden + np.arange(config.hidden)])


def _gpt_neox(config: ModelConfig) -> tuple[Row, ...]:
    layer = "gpt_neox.layers.{i}."
    norms = layer + "input_layernorm", layer + "post_attention_layernorm"
    side_by_side = (*_norm(_PARALLEL, norms[0]), *_norm(_LAYER + "post_attention_layer_norm", norms[1]))
    return (
        Row(EMBEDDING, ("gpt_neox.embed_in.weight",)),
        *_linear(_ATTENTION + "linear_0", layer + "attention.query_key_value", order=qkv_apart),
        *_linear(_ATTENTION + "linear_1", layer + "attention.dense"),
        *_linear(_MLP + "linear_0", layer + "mlp.dense_h_to_4h"),
        *_linear(_MLP + "linear_1", layer + "mlp.dense_4h_to_h"),
        *(side_by_side if config.parallel_residual else _serial_norms(*norms)),
        *_norm("decoder/layer_norm", "gpt_neox.final_layer_norm"),
        Row(HEAD, ("embed_out.weight",)),
    )


def _gptj(config: ModelConfig) -> tuple[Row, ...]:
    layer = "transformer.h.{i}."
    return (
        Row(EMBEDDING, ("transformer.wte.weight",)),
        *_linear(_ATTENTION + "linear_0", *(f"{layer}attn.{x}_proj" for x in "qkv"), order=_halves_first),
        *_linear(_ATTENTION + "linear_1", layer + "attn.out_proj"),
        *_linear(_MLP + "linear_0", layer + "mlp.fc_in"),
        *_linear(_MLP + "linear_1", layer + "mlp.fc_out"),
        *_norm(_SHARED, layer + "ln_1"),
        *_norm("decoder/layer_norm", "transformer.ln_f"),
        *_linear("decoder/projection", "lm_head"),
    )


def _gpt2(config: ModelConfig) -> tuple[Row, ...]:
    layer = "transformer.h.{i}."
    return (
        Row(EMBEDDING, ("transformer.wte.weight",)),
        Row(_POSITIONS, ("transformer.wpe.weight",)),
        *_linear(_ATTENTION + "linear_0", layer + "attn.c_attn"),
        *_linear(_ATTENTION + "linear_1", layer + "attn.c_proj"),
        *_linear(_MLP + "linear_0", layer + "mlp.c_fc"),
        *_linear(_MLP + "linear_1", layer + "mlp.c_proj"),
        *_serial_norms(layer + "ln_1", layer + "ln_2"),
        *_norm("decoder/layer_norm", "transformer.ln_f"),
        Row(HEAD, ("lm_head.weight",)),
    )


def _llama(config: ModelConfig) -> tuple[Row, ...]:
    layer = "model.layers.{i}."
    return (
        Row(EMBEDDING, ("model.embed_tokens.weight",)),
        *_linear(_ATTENTION + "linear_0", *(f"{layer}self_attn.{x}_proj" for x in "qkv")),
        *_linear(_ATTENTION + "linear_1", layer + "self_attn.o_proj"),
        *_linear(_MLP + "linear_0", layer + "mlp.gate_proj"),
        *_linear(_GATE, layer + "mlp.up_proj"),
        *_linear(_MLP + "linear_1", layer + "mlp.down_proj"),
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


def scalars_of(family: str, config: ModelConfig) -> dict[str, np.generic]:
    """The single numbers of a model, as its specification stores them."""
    attention: dict[str, np.generic] = {}
    if config.positions == "rotary":
        dims = 0 if config.norm == "rmsnorm" else config.rotary_dims  # 0 stands for all, as its converter has it
        attention |= {"rotary_dim": np.int32(dims), "rotary_base": np.float32(config.rotary_base)}
        attention |= {"rotary_interleave": np.int8(0)}
    if config.kv_heads:
        attention |= {"num_heads_kv": np.int32(config.kv_heads)}
    return {
        "decoder/activation": np.int8(_ACTIVATIONS[config.activation]),
        "decoder/alibi": np.int8(0),
        "decoder/alibi_use_positive_positions": np.int8(0),
        "decoder/alignment_heads": np.int16(1),
        "decoder/alignment_layer": np.int16(-1),
        "decoder/num_heads": np.int16(config.heads),
        "decoder/pre_norm": np.int8(1),
        "decoder/scale_alibi": np.int8(0),
        "decoder/scale_embeddings": np.int8(0),
        "decoder/start_from_zero_embedding": np.int8(0),
        **{
            f"{_ATTENTION.replace('{i}', str(layer))}{name}": value
            for layer in range(config.layers)
            for name, value in attention.items()
        },
    }


@dataclass(frozen=True)
class Said:
    """What a folder of CTranslate2's says of its model: `where` it says it, its single numbers and its config.json's
    settings, the shapes of its tensors, and whether its head is its embedding."""

    where: str
    scalars: Mapping[str, float]
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}.")

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of a matrix. Raises CheckpointError where there is none."""
        found = self.shapes.get(name.replace("{i}", "0"), ())
        if len(found) != 2:
            raise self.error(f"{name.replace('{i}', '0')} is {list(found)}; expected a matrix")
        return found[0], found[1]

    def has(self, name: str) -> bool:
        """Whether it holds a tensor; of one of the layers' whether the first has it."""
        return name.replace("{i}", "0") in self.shapes

    def count(self, name: str, default: int | None = None) -> int:
        """A single number that counts something. Raises CheckpointError where it does not."""
        value = self.scalars.get(name.replace("{i}", "0"), default)
        if value is None or not 1 <= value < 1 << 31 or value != int(value):
            raise self.error(f"{name.replace('{i}', '0')} is {value}; expected a whole number above zero")
        return int(value)


def family_of(said: Said) -> str:
    """The family of a model, by the tensors that others lack."""
    marks = {"gptj": f"{_SHARED}/gamma", "gpt2": _POSITIONS, "llama": f"{_GATE}/weight"}
    return next((family for family, name in marks.items() if said.has(name)), "gpt_neox")


def config_of(said: Said, family: str) -> ModelConfig:
    """The hyperparameters. Raises CheckpointError where a number is missing, or says another function than ours."""
    (rows, hidden), (_, ff) = said.shape(EMBEDDING), said.shape(_MLP + "linear_1/weight")
    heads = said.count("decoder/num_heads")
    if hidden % heads:
        raise said.error(f"decoder/num_heads is {heads}, which does not divide the {hidden} columns of {EMBEDDING}")
    kv_heads = said.count(_ATTENTION + "num_heads_kv", heads)
    config = ModelConfig(
        layers=sum(bool(re.fullmatch(r"decoder/layer_\d+/ffn/linear_1/weight", name)) for name in said.shapes),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads if kv_heads != heads else None,
        ff=ff,
        rows=rows,
        **_placed(said, family, hidden // heads),
        norm="rmsnorm" if family == "llama" else "layernorm",
        norm_eps=_epsilon(said),
        parallel_residual=said.has(f"{_PARALLEL}/gamma") or family == "gptj",
        activation=_activation(said),
        tied=said.tied,
        attention_bias=said.has(_ATTENTION + "linear_0/bias"),
        mlp_bias=said.has(_MLP + "linear_0/bias"),
        shared_norm=family == "gptj",
    )
    raise_all(CheckpointError, (f"{said.where}: {problem}." for problem in _contradictions(said, family, config)))
    return config


def _placed(said: Said, family: str, head: int) -> dict[str, Any]:
    """The hyperparameters that tell tokens' places: a table's rows, or how much of a head is rotated by which base."""
    if family == "gpt2":
        return {"positions": "learned", "context": said.shape(_POSITIONS)[0], "rotary_pct": 0.0, "rotary_base": 1e4}
    context = said.settings.get(CONTEXT_KEY, _CONTEXT)
    dims = head if family == "llama" else said.count(_ATTENTION + "rotary_dim")
    base = said.scalars.get(f"{_ATTENTION}rotary_base".replace("{i}", "0"), 0.0)
    if dims > head or not 0 < base < float("inf"):
        raise said.error(f"{dims} numbers of a head of {head} are rotated by the base {base}, which cannot be")
    return {
        "context": context if type(context) is int and context > 0 else _CONTEXT,
        "rotary_pct": share(dims, head),
        "rotary_base": float(str(np.float32(base))),  # the shortest number that float32 rounds so
    }


def _epsilon(said: Said) -> float:
    """What norms add to the variance. Raises CheckpointError where it is no number above zero."""
    found = said.settings.get(EPSILON_KEY)
    value = _EPSILON if found is None else found
    if type(value) not in (int, float) or not 0 < value < 1:
        raise said.error(f"{EPSILON_KEY} in its config.json is {str(found)[:60]!r}; expected a number between 0 and 1")
    return float(value)


def _activation(said: Said) -> str:
    """The activation of the MLP. Raises CheckpointError for one that we do not have."""
    number = said.scalars.get("decoder/activation")
    name = next((name for name, each in _ACTIVATIONS.items() if each == number), None)
    if name is None:
        known = ", ".join(f"{each} ({name})" for name, each in _ACTIVATIONS.items())
        raise said.error(f"decoder/activation is {number}; expected one of {known}")
    return name


def _contradictions(said: Said, family: str, config: ModelConfig) -> Iterator[str]:
    """Single numbers that are not those of the function that we compute, as far as the hyperparameters tell it."""
    expected = {name: float(value) for name, value in scalars_of(family, config).items()}
    for name in {**expected, **said.scalars}:
        found, wanted = said.scalars.get(name), expected.get(name)
        if found is None:
            yield f"{name} is missing; expected {wanted:g}"
        elif wanted is None:
            yield f"{name} is {found:g}, which changes the function and is not supported; expected no such number"
        elif found != wanted:
            yield f"{name} is {found:g}, which is not supported here; expected {wanted:g}"


def unsayable(family: str, config: ModelConfig) -> str | None:
    """Why CTranslate2 cannot run a model; None where it can."""
    if family not in FAMILIES:
        return f"CTranslate2 has no {family}"
    if config.window is not None and config.window < config.context:
        return f"tokens attend to the {config.window} before them, which CTranslate2 was not seen to do"
    if config.positions == "rotary" and not config.rotary_dims:
        return "no number of a head is rotated, and CTranslate2 takes 0 for all of them"
    return None


def epsilon_setting(config: ModelConfig) -> float | None:
    """What config.json says of the norms' epsilon: nothing of the usual one, as its converter has it."""
    return None if config.norm == "layernorm" and config.norm_eps == _EPSILON else config.norm_eps

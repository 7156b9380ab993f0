"""The numbers of a model.bin, and the settings beside it, that say a model's function: written and read.

Source: ctranslate2 4.8.5, specs/transformer_spec.py, attention_spec.py, common_spec.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neoxconv.arch.ctranslate2.names import ATTENTION, EMBEDDING, FAMILIES, GATE, MLP, PARALLEL, POSITIONS, SHARED
from neoxconv.arch.gguf_keys import share
from neoxconv.core.table import ModelConfig
from neoxconv.errors import CheckpointError, raise_all

_ACTIVATIONS = {"gelu_tanh": 1, "silu": 2, "gelu": 3}  # Activation in specs/common_spec.py
_EPSILON = 1e-5  # where config.json has null
EPSILON_KEY, CONTEXT_KEY = "layer_norm_epsilon", "max_position_embeddings"  # in config.json; the latter is ours
_CONTEXT = 2048  # where nothing tells it, as in files of ctranslate2's own converter


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
            f"{ATTENTION.replace('{i}', str(layer))}{name}": value
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
    marks = {"gptj": f"{SHARED}/gamma", "gpt2": POSITIONS, "llama": f"{GATE}/weight"}
    return next((family for family, name in marks.items() if said.has(name)), "gpt_neox")


def config_of(said: Said, family: str) -> ModelConfig:
    """The hyperparameters. Raises CheckpointError where a number is missing, or says another function than ours."""
    (rows, hidden), (_, ff) = said.shape(EMBEDDING), said.shape(MLP + "linear_1/weight")
    heads = said.count("decoder/num_heads")
    if hidden % heads:
        raise said.error(f"decoder/num_heads is {heads}, which does not divide the {hidden} columns of {EMBEDDING}")
    kv_heads = said.count(ATTENTION + "num_heads_kv", heads)
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
        parallel_residual=said.has(f"{PARALLEL}/gamma") or family == "gptj",
        activation=_activation(said),
        tied=said.tied,
        attention_bias=said.has(ATTENTION + "linear_0/bias"),
        mlp_bias=said.has(MLP + "linear_0/bias"),
        shared_norm=family == "gptj",
    )
    raise_all(CheckpointError, (f"{said.where}: {problem}." for problem in _contradictions(said, family, config)))
    return config


def _placed(said: Said, family: str, head: int) -> dict[str, Any]:
    """The hyperparameters that tell tokens' places: a table's rows, or how much of a head is rotated by which base."""
    if family == "gpt2":
        return {"positions": "learned", "context": said.shape(POSITIONS)[0], "rotary_pct": 0.0, "rotary_base": 1e4}
    context = said.settings.get(CONTEXT_KEY, _CONTEXT)
    dims = head if family == "llama" else said.count(ATTENTION + "rotary_dim")
    base = said.scalars.get(f"{ATTENTION}rotary_base".replace("{i}", "0"), 0.0)
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

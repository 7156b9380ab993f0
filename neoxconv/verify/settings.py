"""The settings of two models that must agree for the two to be one function."""

from __future__ import annotations

from collections.abc import Iterator

from neoxconv.core.model import Checkpoint
from neoxconv.verify.report import Finding

# GGUF does not say which GELU (llama.cpp computes the tanh form), nor
# of a window (llama.cpp has none). CTranslate2 is given models whose window is no shorter than their context.
_COMPARED = (
    "layers",
    "hidden",
    "heads",
    "key_heads",
    "ff",
    "rows",
    "context",
    "rotary_dims",
    "rotary_base",
    "norm",
    "norm_eps",
    "parallel_residual",
    "activation",
    "tied",
    "window",
)
_UNSAID = {"gguf": ("activation", "tied", "window"), "ctranslate2": ("window",)}


def compare_settings(source: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Hyperparameters that differ, as far as the target's format can say the source's."""
    own, made = source.config, target.config
    if target.index.format != "neox":
        own = source.architecture.sayable(own)
    for name in _COMPARED:
        ours, theirs = getattr(own, name), getattr(made, name)
        if ours != theirs and name not in _UNSAID.get(target.index.format, ()):
            yield Finding("configuration", f"{name} is {theirs} in the target and {ours} in the source")

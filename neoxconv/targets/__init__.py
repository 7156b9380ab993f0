"""The targets: how a checkpoint becomes the files of each format. One row each in TARGETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neoxconv.core.layout import Content
from neoxconv.core.model import Checkpoint
from neoxconv.targets import bnb, float8, gguf, hf, slim
from neoxconv.targets.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """A format that can be written; `single` where the target is a file and not a folder."""

    name: str
    single: bool
    make: Callable[[Checkpoint, Recipe], Content]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        #      name           one file  content
        Target("hf",          False,    hf.to_hf),
        Target("safetensors", True,     hf.to_safetensors),
        Target("slim",        False,    slim.to_slim),
        Target("gguf",        True,     gguf.to_gguf),
        Target("bnb",         False,    bnb.to_bnb),
        Target("float8",      False,    float8.to_float8),
    )
}  # fmt: skip

"""A weight whose codes and scales are tensors of their own: its module, what must stand there, how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from neoxconv.core.encoding import Part, Scaled
from neoxconv.core.tensor import LazyTensor, Misfits
from neoxconv.dtypes import FLOATS, DType
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.quant.scaled.fourbit import STATE
from neoxconv.quant.scaled.int8 import FORMAT
from neoxconv.storage import Place


@dataclass(frozen=True)
class Module:
    """A weight and what stands beside it, by what follows the module's name; `native` is what others are stored in,
    `settings` are the source's."""

    where: Place
    name: str
    tensors: Mapping[str, LazyTensor]
    native: DType
    settings: Mapping[str, Any]

    def error(self, part: str, problem: str) -> CheckpointError:
        """What to raise about one of the tensors."""
        return CheckpointError(f"{self.where}: {self.name}{part} {problem}")


@dataclass(frozen=True)
class Joined:
    """A weight that can be read, and which tensors of its module it is read from."""

    tensor: LazyTensor
    parts: tuple[str, ...]


def joined(module: Module, encoding: Scaled, shape: tuple[int, ...], native: DType) -> Joined:
    """The weight with its parts to read from. Raises CheckpointError where one is missing or does not fit."""

    def unread(start: int, stop: int) -> Any:
        raise AssertionError(f"rows {start} to {stop} of a tensor without its parts")

    weight = LazyTensor(shape, encoding.dtype, unread, native)
    parts, tensors = encoding.parts(weight), module.tensors
    raise_all(CheckpointError, (
        f"{module.where}: lacks {module.name}{part.name}, which belongs to {module.name}weight; download it again."
        for part in parts
        if part.name not in tensors and part.name != FORMAT
    ))  # fmt: skip
    raise_all(CheckpointError, (
        f"{module.where}: {module.name}{part.name} is {type_and_shape(tensors[part.name])}; "
        f"expected {part.dtype.name} {list(part.shape)} for a weight {list(shape)} of {encoding.name}."
        for part in parts
        if part.name in tensors and not fits(part, tensors[part.name])
    ))  # fmt: skip
    names = tuple(part.name for part in parts if part.name in tensors)
    return Joined(replace(weight, read=encoding.decode(tensors, shape)), names)


def fits(part: Part, tensor: LazyTensor) -> bool:
    """Whether a stored tensor can be this part; scales may be of any float type, a state of any length."""
    alike = tensor.dtype.name == part.dtype.name or {tensor.dtype.name, part.dtype.name} <= set(FLOATS)
    return alike and (tensor.shape == part.shape or (part.name.startswith(STATE) and len(tensor.shape) == 1))


def type_and_shape(tensor: LazyTensor) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def judged(found: Joined, misfits: Misfits | None) -> Joined:
    """The same, to be judged by the scales that are stored where another program chose them."""
    return replace(found, tensor=replace(found.tensor, misfits=misfits))

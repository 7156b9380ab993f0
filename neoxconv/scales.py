"""Quantized weights whose scales lie in tensors of their own, as bitsandbytes and compressed-tensors store them: found
among the tensors of a source, checked against what their encoding stores, and read as numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from neoxconv.dtypes import F16, FLOATS, PLAIN, DType
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.model import Index, Part, Scaled
from neoxconv.quant import SCALED
from neoxconv.quant.fourbit import BLOCK, NESTED, TORCH
from neoxconv.tensor import LazyTensor

Tensors = dict[str, LazyTensor]
KINDS = ("nf4", "fp4")
LARGEST_STATE = 4096  # bytes of JSON
DTYPES = {name: PLAIN[dtype] for dtype, name in TORCH.items()}


def assembled(index: Index) -> Index:
    """The index with one tensor for each weight and its scales. Raises CheckpointError where they do not fit."""
    if index.format not in ("hf", "safetensors"):
        return index
    where = str(index.folder if index.format == "hf" else index.files[0].storage.path)
    return replace(index, ranks=tuple(gathered(tensors, where) for tensors in index.ranks))


def gathered(tensors: Tensors, where: str) -> Tensors:
    """The tensors under the names of weights; whatever belongs to one is part of it."""
    native = usual(tensors)
    result, used = dict(tensors), set()
    for name in tensors:
        module = name.removesuffix("weight")
        for marker, find in MARKERS.items():
            if name != module and module + marker in tensors:
                whole, names = find(tensors, module, native, where)
                result[name] = whole
                used |= names - {name}
                break
    return {name: plainly(tensor, native) for name, tensor in result.items() if name not in used}


def plainly(tensor: LazyTensor, native: DType) -> LazyTensor:
    """The tensor, its writers' default a type that is not quantized."""
    return replace(tensor, native=native) if tensor.native.quantized else tensor


def usual(tensors: Mapping[str, LazyTensor]) -> DType:
    """The type in which most numbers are that are not quantized."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.name in FLOATS and len(tensor.shape) == 2:
            sizes[tensor.dtype.name] += tensor.nbytes
    return PLAIN[sizes.most_common(1)[0][0]] if sizes else F16


def four_bit(tensors: Tensors, module: str, native: DType, where: str) -> tuple[LazyTensor, set[str]]:
    """A weight of bitsandbytes' 4-bit types: its state tells the shape."""
    kind = next(kind for kind in KINDS if f"{module}weight.quant_state.bitsandbytes__{kind}" in tensors)
    part = f"weight.quant_state.bitsandbytes__{kind}"
    state = read_state(tensors[module + part], f"{where}: {module}{part}")
    encoding = SCALED[kind.upper() + "_DQ" * ("nested_blocksize" in state)]
    shape: Any = state.get("shape")
    dtype = DTYPES.get(str(state.get("dtype")))
    fits = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    blocks = state.get("blocksize"), state.get("nested_blocksize", NESTED)
    if not fits or not dtype or blocks != (BLOCK, NESTED) or type(state.get("nested_offset", 0.0)) is not float:
        raise CheckpointError(
            f"{where}: {module}{part} is {json.dumps(state):.300}; expected a shape of two sizes, a dtype among "
            f"{', '.join(DTYPES)} and blocks of {BLOCK} weights and {NESTED} scales."
        )
    return joined(encoding, like(tuple(shape), encoding, dtype), tensors, module, where)


def read_state(part: LazyTensor, where: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes."""
    size = math.prod(part.shape)
    try:
        value = json.loads(part.read(0, part.rows).tobytes()) if size <= LARGEST_STATE else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is no JSON object of up to {LARGEST_STATE} bytes; download it again.")
    return value


def like(shape: tuple[int, ...], encoding: Scaled, native: DType) -> LazyTensor:
    """A weight that cannot be read yet."""

    def read(start: int, stop: int) -> Any:
        raise AssertionError(f"rows {start} to {stop} of a tensor without its parts")

    return LazyTensor(shape, encoding.dtype, read, native)


def eight_bit(tensors: Tensors, module: str, native: DType, where: str) -> tuple[LazyTensor, set[str]]:
    """A weight of LLM.int8, whose codes have its shape."""
    encoding = SCALED["INT8"]
    return joined(encoding, like(tensors[module + "weight"].shape, encoding, native), tensors, module, where)


def float8(tensors: Tensors, module: str, native: DType, where: str) -> tuple[LazyTensor, set[str]]:
    """A weight of float8 with one scale, or one for each row."""
    codes, scale = tensors[module + "weight"], tensors[module + "weight_scale"]
    by = "CHANNEL" if len(scale.shape) == 2 else "TENSOR"
    encoding = SCALED.get(f"{codes.dtype.name.removeprefix('F8_')}_{by}")
    if encoding is None:
        raise CheckpointError(
            f"{where}: {module}weight is of type {codes.dtype.name} with scales; expected F8_E4M3 or F8_E5M2."
        )
    return joined(encoding, like(codes.shape, encoding, native), tensors, module, where)


def joined(
    encoding: Scaled, weight: LazyTensor, tensors: Tensors, module: str, where: str
) -> tuple[LazyTensor, set[str]]:
    """The weight with its parts to read from, and their names. Raises CheckpointError where one does not fit."""
    parts = encoding.parts(weight)
    found = {part.name: tensors[module + part.name] for part in parts if module + part.name in tensors}
    raise_all(CheckpointError, (
        f"{where}: lacks {module}{part.name}, which belongs to {module}weight; download it again."
        for part in parts
        if part.name not in found
    ))  # fmt: skip
    raise_all(CheckpointError, (
        f"{where}: {module}{part.name} is {describe(found[part.name])}; expected {part.dtype.name} {list(part.shape)} "
        f"for a weight {list(weight.shape)} of {encoding.name}."
        for part in parts
        if not fits(part, found[part.name])
    ))  # fmt: skip
    whole = replace(weight, read=encoding.decode(found, weight.shape))
    return whole, {module + name for name in found}


def fits(part: Part, tensor: LazyTensor) -> bool:
    """Whether a stored tensor can be this part; scales may be of any float type, a state of any length."""
    alike = tensor.dtype.name == part.dtype.name or {tensor.dtype.name, part.dtype.name} <= set(FLOATS)
    return alike and (tensor.shape == part.shape or (part.late and len(tensor.shape) == 1))


def describe(tensor: LazyTensor) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


# What stands beside a quantized weight, after the module's name, and how the two are found.
MARKERS: dict[str, Callable[[Tensors, str, DType, str], tuple[LazyTensor, set[str]]]] = {
    **{f"weight.quant_state.bitsandbytes__{kind}": four_bit for kind in KINDS},
    "SCB": eight_bit,
    "weight_scale": float8,
}

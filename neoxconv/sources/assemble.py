"""Quantized weights whose scales lie in tensors of their own, as bitsandbytes, compressed-tensors, GPTQ and MLX have
them: found among the tensors of a source, checked against what their encoding stores, and read as numbers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from neoxconv.core.model import Index
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F16, FLOATS, I32, I64, PLAIN, TORCH_NAMES, U8, Array, DType
from neoxconv.quant import SCALED
from neoxconv.quant.scaled import fourbit, gptq
from neoxconv.quant.scaled.affine import SCALES
from neoxconv.quant.scaled.float8 import FORM_E4M3, FORM_E5M2
from neoxconv.quant.scaled.float8 import misfits as misfits_of_float8
from neoxconv.quant.scaled.fourbit import BLOCK, STATE
from neoxconv.quant.scaled.int8 import FORMAT
from neoxconv.quant.scaled.mlx import MLX
from neoxconv.quant.scaled.nested import NESTED
from neoxconv.quant.scaled.packed import BITS, ORDER, PACKED, ROW, TENSOR, PackedForm, misfits, packed
from neoxconv.sources import SOURCES
from neoxconv.sources.modules import Joined, Module, joined, judged, type_and_shape
from neoxconv.sources.naming import home

# A module, and what may belong to its weight.
NAME = re.compile(r"(.*\.)(weight(?:[._].+)?|SCB|scales|biases|qweight|qzeros|g_idx)")
_KINDS = ("nf4", "fp4")
_LARGEST_STATE = 4096  # bytes of JSON
_LARGEST_MEAN = 3.4e38  # what float32 holds
_DTYPES = {name: PLAIN[dtype] for dtype, name in TORCH_NAMES.items()}


def assembled(index: Index) -> Index:
    """The index with one tensor for each weight and its scales. Raises CheckpointError where they do not fit."""
    if SOURCES[index.format].naming != "unified":
        return index
    (tensors,) = index.ranks
    native, where = usual(tensors), home(index, 0, "")
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := NAME.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
    weights: dict[str, LazyTensor] = {}
    parts: set[str] = set()
    for name, found in modules.items():
        if weight := _joined_weight(Module(where, name, found, native, index.settings)):
            weights[name + "weight"] = weight.tensor
            parts |= {name + part for part in weight.parts}
    kept = {name: t for name, t in tensors.items() if name in weights or name not in parts} | weights
    plain = {name: replace(t, native=native) if t.native.quantized else t for name, t in kept.items()}
    return replace(index, ranks=(plain,))


def usual(tensors: Mapping[str, LazyTensor]) -> DType:
    """The type in which most numbers are that are not quantized."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.name in FLOATS and len(tensor.shape) == 2:
            sizes[tensor.dtype.name] += tensor.nbytes
    return PLAIN[sizes.most_common(1)[0][0]] if sizes else F16


def _joined_weight(module: Module) -> Joined | None:
    """The weight of a module with its scales; None where it has none."""
    for marker, find in _MARKERS.items():
        if marker in module.tensors and (marker in (PACKED, gptq.CODES) or "weight" in module.tensors):
            return find(module)
    weight = module.tensors.get("weight")
    if weight is None or not weight.dtype.quantized:
        return None
    if isinstance(module.settings.get("quantization_config"), dict):
        raise module.error(
            "weight", f"is of type {weight.dtype.name}, but has no weight_scale that can be read; download it again."
        )
    return None


def _four_bit(module: Module) -> Joined:
    """A weight of bitsandbytes' 4-bit types: its state tells the shape."""
    kind = next((kind for kind in _KINDS if STATE + kind in module.tensors), None)
    if kind is None:
        raise module.error(f"{STATE}nf4", "is missing, or that of fp4; download it again.")
    state = _read_state(module, STATE + kind)
    shape: Any = state.get("shape")
    dtype = _DTYPES.get(str(state.get("dtype")))
    numbers = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    blocks = state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize", NESTED)
    double = "nested_blocksize" in state
    mean: Any = state.get("nested_offset") if double else 0
    finite = type(mean) in (int, float) and abs(mean) <= _LARGEST_MEAN
    if not numbers or not dtype or blocks != (kind, BLOCK, NESTED) or not finite:
        raise module.error(
            STATE + kind,
            f"is {json.dumps(state):.300}; expected {kind}, a shape of two sizes, a dtype among {', '.join(_DTYPES)}, "
            f"blocks of {BLOCK} weights and {NESTED} scales, and with the latter a nested_offset.",
        )
    return joined(module, SCALED[kind.upper() + ("_DQ" if double else "")], tuple(shape), dtype)


def _read_state(module: Module, part: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes."""
    tensor = module.tensors[part]
    try:
        value = fourbit.read_state(tensor) if math.prod(tensor.shape) <= _LARGEST_STATE else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise module.error(part, f"is no JSON object of up to {_LARGEST_STATE} bytes; download it again.")
    return value


def _eight_bit(module: Module) -> Joined:
    """A weight of LLM.int8, whose codes have its shape."""
    order = module.tensors.get(FORMAT)
    if order and order.dtype is U8 and (math.prod(order.shape) != 1 or order.read(0, 1).any()):
        raise module.error(FORMAT, "is not 0: the codes are in a GPU's order; load and save it with bitsandbytes.")
    return joined(module, SCALED["INT8"], module.tensors["weight"].shape, module.native)


def float8(module: Module) -> Joined:
    """A weight of float8 with one scale, or one for each row."""
    codes, scale = module.tensors["weight"], module.tensors["weight_scale"]
    by = "CHANNEL" if len(scale.shape) == 2 else "TENSOR"
    encoding = SCALED.get(f"{codes.dtype.name.removeprefix('F8_')}_{by}")
    if encoding is None:
        raise module.error("weight", f"is of type {codes.dtype.name} with scales; expected F8_E4M3 or F8_E5M2.")
    form = FORM_E4M3 if codes.dtype is FORM_E4M3.dtype else FORM_E5M2
    found = joined(module, encoding, codes.shape, module.native)
    return judged(found, misfits_of_float8(form, module.tensors, module.native))


def _packed(module: Module) -> Joined:
    """A weight of packed whole numbers: its shape lies beside it, by which the other tensors' tell bits and groups."""
    shape, codes = _read_shape(module), module.tensors[PACKED]
    if "weight" in module.tensors:
        raise module.error(PACKED, "lies beside a weight of the same name; keep the one that is right.")
    if codes.dtype is not I32 or len(codes.shape) != 2:
        raise module.error(
            PACKED, f"is {type_and_shape(codes)}; expected I32 of two axes, as compressed-tensors' pack-quantized has."
        )
    symmetric, order = "weight_zero_point" not in module.tensors, _order(module, ORDER, shape[1])
    ordered = len(order) > 0 and bool((order >= 0).all())  # compressed-tensors leaves -1 where it says nothing
    form = PackedForm(_bits_of(module, shape[1]), _columns_of(module, shape[1]), symmetric, ordered)
    if ordered and order.max() >= form.groups(shape[1]):
        raise module.error(ORDER, f"has groups beyond the {form.groups(shape[1])} that have scales; download it again.")
    found = judged(joined(module, packed(form), shape, module.native), misfits(form, module.tensors, module.native))
    return replace(found, parts=(*found.parts, ORDER)) if len(order) and not ordered else found


def _gptq(module: Module) -> Joined:
    """A weight of GPTQ's: the configuration tells its bits, and whether zeros are stored less one."""
    told: Any = module.settings.get("quantization_config")
    bits = told.get("bits") if isinstance(told, dict) and told.get("quant_method") == "gptq" else None
    scale, codes = module.tensors.get(SCALES), module.tensors[gptq.CODES]
    matrices = scale is not None and len(scale.shape) == len(codes.shape) == 2
    if scale is None or not matrices or bits not in gptq.BITS or "weight" in module.tensors:
        raise module.error(
            gptq.CODES,
            f"is {type_and_shape(codes)}; expected two axes, scales of two axes, no weight beside it, and in "
            f"config.json a quantization_config of gptq with bits among {', '.join(map(str, gptq.BITS))}.",
        )
    columns, groups = codes.rows * 32 // bits, scale.rows
    if not groups or columns % groups:
        raise module.error(SCALES, f"has {groups} groups, which do not divide {columns} columns.")
    order = _order(module, gptq.ORDER, columns)
    ordered = bool((order != np.arange(len(order)) // (columns // groups)).any())
    if ordered and not 0 <= order.min() <= order.max() < groups:
        raise module.error(gptq.ORDER, f"has groups beyond the {groups} that have scales; download it again.")
    form = PackedForm(bits, columns // groups if groups > 1 else ROW, symmetric=False, ordered=ordered)
    reading = gptq.Reading(form, less_one=told.get("checkpoint_format") != "gptq_v2", indexed=len(order) > 0)
    found = joined(module, gptq.encoding(reading), (scale.columns, columns), scale.dtype)
    return judged(found, misfits(form, gptq.as_packed(reading, module.tensors), scale.dtype))


def _order(module: Module, name: str, columns: int) -> Array:
    """The group of every column as an index tells it; empty where there is none."""
    tensor = module.tensors.get(name)
    if tensor is None:
        return np.empty(0, np.int32)
    if tensor.dtype is not I32 or tensor.shape != (columns,):
        raise module.error(name, f"is {type_and_shape(tensor)}; expected I32 {[columns]}.")
    return tensor.read(0, columns)


def _read_shape(module: Module) -> tuple[int, int]:
    """The sizes of a packed weight."""
    tensor = module.tensors.get("weight_shape")
    if tensor is None:
        raise module.error("weight_shape", "is missing, without which weight_packed cannot be read; download it again.")
    sizes = tensor.read(0, 2).tolist() if tensor.dtype in (I64, I32) and tensor.shape == (2,) else []
    if len(sizes) != 2 or not all(0 < size < 1 << 40 for size in sizes):
        raise module.error("weight_shape", f"is {type_and_shape(tensor)} {sizes}; expected two sizes above 0.")
    return sizes[0], sizes[1]


def _bits_of(module: Module, columns: int) -> int:
    """The bits of packed numbers: those with which so many columns take the words that are there, and where several do
    (below 32 columns), those that the configuration names."""
    words = module.tensors[PACKED].shape[1]
    found = [bits for bits in BITS if PackedForm(bits, 0).words(columns) == words]
    said = json.dumps(module.settings.get("quantization_config"))
    found = found if len(found) == 1 else [bits for bits in found if f'"num_bits": {bits},' in said]
    if len(found) != 1:
        raise module.error(
            PACKED,
            f"has rows of {words} words for {columns} columns; expected numbers of {BITS[0]} to {BITS[-1]} bits.",
        )
    return found[0]


def _columns_of(module: Module, columns: int) -> int:
    """The columns that share a scale, as `PackedForm` has them."""
    scale = module.tensors.get("weight_scale")
    groups = scale.shape[1] if scale and len(scale.shape) == 2 else 1
    if not groups or columns % groups:
        raise module.error("weight_scale", f"has {groups} groups, which do not divide {columns} columns.")
    if groups == 1:
        return TENSOR if scale and scale.shape == (1,) else ROW
    return columns // groups


def mlx(module: Module) -> Joined:
    """A weight of MLX's types: the configuration tells mode, bits and group, of all or of this one by its name."""
    told: Any = module.settings.get("quantization")
    own: Any = told.get(module.name.removesuffix("."), told) if isinstance(told, dict) else None
    kind = (own.get("mode", "affine"), own.get("bits"), own.get("group_size")) if isinstance(own, dict) else None
    bits, found = next(((each[1], encoding) for each, encoding in MLX.items() if each == kind), (0, None))
    codes, scales = module.tensors["weight"], module.tensors[SCALES]
    if found is None or len(codes.shape) != 2:
        modes = ", ".join(dict.fromkeys(mode for mode, *_ in MLX))
        raise module.error(
            "weight",
            f"is {type_and_shape(codes)} with scales; config.json's quantization of it is {json.dumps(own):.200}, "
            f"expected a matrix, bits and group_size of MLX's, and a mode among {modes}.",
        )
    shape = codes.rows, codes.columns * 32 // bits
    return joined(module, found, shape, module.native if scales.dtype is U8 else scales.dtype)


# What stands beside a quantized weight, and how the two are read together.
_MARKERS: dict[str, Callable[[Module], Joined]] = {
    PACKED: _packed,
    gptq.CODES: _gptq,
    **{STATE + kind: _four_bit for kind in _KINDS},
    "weight.absmax": _four_bit,
    "SCB": _eight_bit,
    FORMAT: _eight_bit,
    "weight_scale": float8,
    SCALES: mlx,
}

"""The bnb, float8 and compressed-tensors targets of a small model, for tests: made, edited, compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.errors import NeoxconvError
from neoxconv.quant import floats
from neoxconv.verify.engines import child
from neoxconv.verify.logits.compare import Logits
from neoxconv.verify.logits.trial import Engine
from neoxconv.verify.report import Report
from tests.oracles import program, skip, vllm_python
from tests.toy import toy

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]
BNB = {
    name: Recipe("bnb", type=name.split()[0], double_quant="double" in name)
    for name in ("INT8", "NF4", "NF4 double", "FP4", "FP4 double")
}
FLOAT8 = {
    f"{kind} {scale}": Recipe("float8", type=kind, scale=scale)
    for kind in ("E4M3", "E5M2")
    for scale in ("channel", "tensor", "none")
}
PACKED = {
    "W4A16 64": Recipe("compressed-tensors", type="W4A16", group="64"),
    "W4A16 32 asymmetric": Recipe("compressed-tensors", type="W4A16", group="32", asymmetric=True),
    "W8A16 channel": Recipe("compressed-tensors", type="W8A16", group="channel"),
    "W8A16 64 asymmetric": Recipe("compressed-tensors", type="W8A16", group="64", asymmetric=True),
}
ALL = BNB | FLOAT8 | PACKED
SCALE = {"INT8": "SCB", "NF4": "weight.absmax", "FP4": "weight.absmax"} | {
    name: "weight.nested_absmax" if name in BNB else "weight_scale" for name in ALL if name[5:] not in ("", "none")
}
CODES = {name: "weight_packed" if name in PACKED else "weight" for name in ALL}
L0, L1 = (f"gpt_neox.layers.{i}.attention.dense." for i in (0, 1))
UP = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
FILE, CONFIG = "model.safetensors", "config.json"
every = pytest.mark.parametrize("name", ALL)


def small(folder: Path, **changes: Any) -> Path:
    return toy(folder, rows=288, **changes)


def made(source: Path, target: Path, recipe: Recipe, norms: str = "mean", **options: Any) -> Path:
    return run(make_plan(open_checkpoint(source, norms=norms), recipe), target, **options)


def compared(source: Path, target: Path, norms: str = "mean", *, foreign: bool = False) -> Report:
    return verify_weights(open_checkpoint(source, norms=norms), open_checkpoint(target), foreign=foreign)


def edited(target: Path, folder: Path, change: Change) -> Path:
    """A copy of a target with other tensors and without manifest."""
    shutil.copytree(target, folder, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
    tensors = load_file(target / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def planted(source: Path, weight: str, values: Any) -> Path:
    """The source with other first numbers in a weight of the first layer of rank 0."""
    for file in source.glob("*/layer_02-model_00*"):
        state = torch.load(file, weights_only=True)
        numbers = state[weight].view(-1)
        numbers[: len(values)] = torch.as_tensor(values)[: len(numbers)]
        torch.save(state, file)
    return source


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The values of a model's quantized weights."""
    opened = open_checkpoint(path).tensors
    return {name: floats(t.read(0, t.rows), t.dtype) for name, t in opened.items() if t.dtype.quantized}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """Equal names, types, shapes and bytes."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), name


def assert_bitsandbytes_reads(name: str, target: Path, dtype: torch.dtype) -> None:
    """What bitsandbytes makes of a folder of a type, in the `dtype` that it says, is what is read here."""
    functional = program("bitsandbytes").functional
    tensors, found = load_file(target / FILE), weights(target)
    assert len(found) == 8
    for weight, values in found.items():
        module, codes = weight.removesuffix("weight"), tensors[weight]
        if name == "INT8":
            theirs = functional.int8_vectorwise_dequant(codes, tensors[module + "SCB"]).numpy()
            np.testing.assert_allclose(values, theirs, rtol=1.2e-7)  # ours are rounded once, theirs twice
            continue
        facts = {part.removeprefix(module): tensor for part, tensor in tensors.items() if part.startswith(weight + ".")}
        read = functional.dequantize_4bit(codes, functional.QuantState.from_dict(facts, torch.device("cpu")))
        assert read.dtype == dtype and torch.from_numpy(values.copy()).to(dtype).equal(read), weight


def put(part: str, make: Callable[[torch.Tensor], torch.Tensor], module: str = L0) -> Change:
    return lambda tensors: tensors.update({module + part: make(tensors[L0 + part].clone())})


def with_state(change: Callable[[str], str]) -> Change:
    """Another text as the quantization's state."""

    def put_state(tensors: Tensors) -> None:
        text = change(bytes(tensors[L0 + STATE].tolist()).decode())
        tensors[L0 + STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return put_state


STATE = "weight.quant_state.bitsandbytes__nf4"


def vllm_logits(folder: Path, read: Checkpoint, tokens: Numbers) -> Logits:
    """What vLLM makes of a folder with packed weights."""
    try:
        with child.program(Engine("vllm", vllm_python()), folder, read) as ask:
            return ask(tokens)
    except NeoxconvError as error:
        if "wna16" in str(error).lower():
            skip("vLLM has no kernel for packed weights on this processor")
        raise

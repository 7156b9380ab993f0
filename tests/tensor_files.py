"""Safetensors files from a layout, tensors in memory as entries, and what torch makes of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from neoxconv.core.encoding import Encoding, copied
from neoxconv.core.layout import Entry, FileLayout
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import BF16, F16, F32, DType, Floats, narrow, widen

OFFICIAL = ("neox_2022_tp2_pp4", "neox_2022_sequential_tp2", "neox_2026_bf16_tp2_pp2")  # of EleutherAI's converter
TORCH = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
RAW = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def encoding(dtype: DType) -> Encoding:
    return replace(copied(dtype), encode=lambda rows: narrow(rows, dtype), decode=lambda data: widen(data, dtype))


ENCODINGS = {dtype: encoding(dtype) for dtype in TORCH}


def entry(name: str, values: Floats, dtype: DType) -> Entry:
    """A tensor in memory on its way into a target."""
    rows = values.reshape(values.shape or (1,))
    lazy = LazyTensor(values.shape, F32, lambda start, stop: rows[start:stop], F32)
    return Entry(name, name, lazy, ENCODINGS[dtype])


def write(folder: Path, file: FileLayout) -> Path:
    """The file that a layout describes: its pieces, its slots, zeros elsewhere."""
    data = bytearray(file.size)
    ranges = [*file.pieces]
    for slot in file.slots:
        tensor = slot.entry.tensor
        ranges.append((slot.offset, slot.entry.encoding.encode(tensor.floats(0, tensor.rows)).tobytes()))
    for offset, part in ranges:
        data[offset : offset + len(part)] = part
    assert sum(len(part) for _, part in ranges) == file.size == len(data)
    (folder / file.name).write_bytes(data)
    return folder / file.name


def assert_same(ours: Mapping[str, LazyTensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names, shapes, types and bits, whatever the bands in which ours are read."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        bits = (tensor.view(RAW[tensor.dtype]) if tensor.dtype in RAW else tensor).contiguous().numpy()
        found = ours[name]
        assert (found.shape, found.dtype.numpy) == (tuple(tensor.shape), bits.dtype)
        bands = [found.read(row, min(row + 3, found.rows)) for row in range(0, found.rows, 3)]
        assert b"".join(band.tobytes() for band in bands) == bits.tobytes()

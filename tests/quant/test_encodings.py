"""Encodings: the bytes of ggml, and back to the numbers of gguf."""

from __future__ import annotations

import ctypes
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from neoxconv.core.encoding import Encoding
from neoxconv.dtypes import BF16, F16, F32, F64, DType, narrow
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.quant import ENCODINGS, decode_any, floats
from tests.blocks import (
    KINDS,
    PACKED,
    SIZES,
    data,
    digest,
    every,
    kinds,
    noise,
    packed,
    quants,
    quiet,
    random_bits,
)
from tests.golden.make_blocks import BLOCKS, ggml_encode
from tests.machines import X86, printed
from tests.oracles import ggml_library

# --- the same bytes as others ---------------------------------------------------------------------------------------


@packed
def test_golden_blocks_are_made_again(encoding: Encoding) -> None:
    golden = {name: np.array([list(bytes.fromhex(row)) for row in rows], np.uint8) for name, rows in golden_rows()}
    assert np.array_equal(encoding.encode(golden["F32"].view(np.float32)), golden[encoding.name])


def golden_rows() -> list[tuple[str, list[str]]]:
    return list(json.loads(BLOCKS.read_text()).items())


@packed
@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_ggml(encoding: Encoding, kind: str) -> None:
    library = ggml_library()
    for size in SIZES if X86 else SIZES[:3]:  # of steps that overflow as 1 / step, ggml makes what the processor does
        rows = data(kind, seed=2, size=size)
        assert np.array_equal(encoding.encode(rows), ggml_encode(library, encoding.name, rows)), size


@every
@quiet
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "zeros" not in kind])  # gguf differs in the sign of zero
def test_bytes_are_those_of_gguf(encoding: Encoding, kind: str) -> None:
    rows = data(kind, seed=3)
    ours = np.ascontiguousarray(encoding.encode(rows)).view(np.uint8)
    assert np.array_equal(ours, quants.quantize(rows, kinds[encoding.name]).view(np.uint8))


@every
@quiet
def test_numbers_are_those_of_gguf(encoding: Encoding) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (50, encoding.dtype.size(6144)), np.uint8)
    ours, theirs = decode_any(encoding.name, raw), quants.dequantize(raw, kinds[encoding.name])
    assert ours.dtype == np.float32 and ours.shape == (50, 6144)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    assert np.array_equal(ours.view(np.uint32)[~np.isnan(ours)], theirs.view(np.uint32)[~np.isnan(ours)])


@quiet
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_types_that_are_only_read_go_through_gguf(name: str) -> None:
    block, size = pytest.importorskip("gguf").GGML_QUANT_SIZES[kinds[name]]
    raw = np.random.default_rng(5).integers(0, 256, (3, 2 * size), np.uint8)
    dtype = DType(name, block, size, np.dtype(np.uint8))
    assert np.array_equal(floats(raw, dtype), quants.dequantize(raw, kinds[name]), equal_nan=True)
    with pytest.raises(CheckpointError, match=name):
        decode_any(name, raw[:, :-1])


@pytest.mark.parametrize(("name", "block", "size"), [("Q1_0", 128, 18), ("Q2_0", 64, 18)])
def test_types_that_gguf_does_not_know_are_read_as_ggml_reads_them(name: str, block: int, size: int) -> None:
    raw = np.random.default_rng(6).integers(0, 256, (3, 4 * size), np.uint8)
    raw[:, 1::size] &= 0x3F  # steps are no infinities
    read, theirs = getattr(ggml_library(), f"dequantize_row_{name.lower()}"), np.empty((3, 4 * block), np.float32)
    for row, values in zip(raw, theirs, strict=True):
        read(ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size))
    assert np.array_equal(floats(raw, DType(name, block, size, np.dtype(np.uint8))), theirs)
    with pytest.raises(CheckpointError, match=name):
        decode_any(name, raw[:, :-1])


@pytest.mark.parametrize("name", ["Q8_K", "Q9_Z"])
def test_a_type_that_nobody_reads_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        decode_any(name, np.zeros((1, 256), np.uint8))


# --- laws -----------------------------------------------------------------------------------------------------------


@every
def test_an_encoding_never_sees_slab_borders_or_threads(encoding: Encoding) -> None:
    rows = noise()
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(encoding.encode, [rows[i : i + 5] for i in range(0, 37, 5)]))
    assert encoding.encode(rows).tobytes() == b"".join(part.tobytes() for part in parts)


@every
@pytest.mark.parametrize("shape", [(0, 96), (1, 32), (3, 96), (1, 6144)])
def test_shapes_and_types(encoding: Encoding, shape: tuple[int, int]) -> None:
    rows = noise(*shape)
    stored = encoding.encode(rows)
    assert stored.dtype == encoding.dtype.numpy and stored.nbytes == shape[0] * encoding.dtype.size(shape[1])
    assert len(stored) == shape[0]
    assert encoding.decode(stored).shape == shape and encoding.decode(stored).dtype == np.float32
    assert encoding.wrong(rows, stored).shape == shape and not encoding.wrong(rows, stored).any()


@every
def test_rows_may_lie_apart(encoding: Encoding) -> None:
    wide = noise(8, 192)
    rows = wide[::2, 64:160]
    assert encoding.encode(rows).tobytes() == encoding.encode(rows.copy()).tobytes()
    stored = np.repeat(encoding.encode(rows), 2, axis=0)[::2]
    assert not encoding.wrong(rows, stored).any()


@every
def test_what_was_stored_once_is_stored_the_same_again(encoding: Encoding) -> None:
    stored = encoding.encode(noise(40, 6144))
    assert encoding.encode(encoding.decode(stored)).tobytes() == stored.tobytes()


@packed
def test_rounding_moves_a_weight_by_about_half_a_step(encoding: Encoding) -> None:
    """Q8_0 by 0.5 + 127 / 2048 steps; Q4_0 and Q5_0 by one where both signs of the largest size occur."""
    levels, most = {"Q8_0": (127, 0.563), "Q4_0": (8, 1.005), "Q5_0": (16, 1.009)}.get(encoding.name, (0, 0.53))
    rows = noise(400, 96).reshape(-1, 32)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    step = np.maximum(-low, high) / levels if levels else (high - low) / {"Q4_1": 15, "Q5_1": 31}[encoding.name]
    assert (np.abs(rows - encoding.decode(encoding.encode(rows))) / step).max() < most


def test_a_row_that_the_block_does_not_divide_is_refused() -> None:
    for encoding in PACKED:
        with pytest.raises(PlanError, match=rf"{encoding.name} .* has 50"):
            encoding.encode(noise(2, 50))
        with pytest.raises(CheckpointError, match=encoding.name):
            encoding.decode(np.zeros((2, 35), np.uint8))


def test_other_plain_types_widen() -> None:
    assert floats(np.array([[0.1]]), F64) == np.float32(0.1)


# --- plain numbers --------------------------------------------------------------------------------------------------


def test_every_float16_is_widened_as_numpy_does() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert np.array_equal(ENCODINGS["F16"].decode(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=lambda d: d.name)
def test_rounding_is_that_of_torch(dtype: DType) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    halfway = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000, (np.arange(2**19, dtype=np.uint32) << 13 | 0x1000))
    rows = np.concatenate([random_bits(10**6), *halfway]).view(np.float32).reshape(1, -1)
    rows = np.nan_to_num(rows, posinf=np.inf, neginf=-np.inf)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype.name]
    expected = torch.from_numpy(rows).to(kind).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ENCODINGS[dtype.name].encode(rows).view(np.uint16), expected)
    assert np.array_equal(narrow(rows, dtype).view(np.uint16), expected)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda d: d.name)
def test_nan_stays_nan(dtype: DType) -> None:
    rows = (random_bits(10**5) | 0x7F800001).view(np.float32)
    assert np.isnan(floats(ENCODINGS[dtype.name].encode(rows), dtype)).all()


# --- machines -------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
import neoxconv.quant as quant
assert not {"numba", "torch", "gguf"} & set(sys.modules)
from tests.blocks import digest
print(digest())
"""


@pytest.mark.slow
def test_another_cpu_gives_the_same_bytes() -> None:
    assert printed(ELSEWHERE) == digest()

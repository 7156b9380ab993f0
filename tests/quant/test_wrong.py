"""The check of stored weights: it finds every planted fault, and never one in a correct encoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoxconv.core.encoding import Encoding
from neoxconv.dtypes import Bytes
from neoxconv.quant import ENCODINGS
from tests.blocks import KINDS, data, every, kinds, noise, packed, quants


@every
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(-149, 7))
def test_a_correct_encoding_is_never_flagged(encoding: Encoding, kind: str, seed: int, exponent: int) -> None:
    rows = data(kind, seed, 2.0**exponent)
    assert not encoding.wrong(rows, encoding.encode(rows)).any()


def header(name: str) -> int:
    """Bytes of step and least weight, the float16 numbers that a block begins with."""
    return 4 if name.endswith("_1") else 2


def codes_of(name: str, blocks: Bytes) -> np.ndarray:
    """The codes as gguf reads them: its numbers for a step of 1 and a least weight of 0."""
    plain = blocks.copy()
    plain[:, : header(name)] = np.array([1, 0], np.float16).view(np.uint8)[: header(name)]
    return quants.dequantize(plain, kinds[name]).astype(np.int64)


def with_codes(name: str, blocks: Bytes, codes: np.ndarray) -> Bytes:
    """The blocks with other codes, written down once more in numpy."""
    head = blocks[:, : header(name)]
    if name == "Q8_0":
        return np.hstack([head, codes.astype(np.int8).view(np.uint8)])
    bits = (codes + {"Q4_0": 8, "Q5_0": 16}.get(name, 0)).astype(np.uint8)
    fifth = np.packbits(bits >> 4, axis=1, bitorder="little")[:, : 4 if name.startswith("Q5") else 0]
    return np.hstack([head, fifth, (bits[:, :16] & 15) | (bits[:, 16:] << 4)])


def with_number(blocks: Bytes, at: int, change: float) -> Bytes:
    """The blocks with their step (at 0) or least weight (at 1) multiplied."""
    changed = blocks.copy()
    number = changed[:, 2 * at : 2 * at + 2]
    number[:] = (np.ascontiguousarray(number).view(np.float16) * np.float16(change)).view(np.uint8)
    return changed


ENDS = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q5_1": (0, 31)}


@packed
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("size", [1.0, 0.02])
def test_every_code_that_is_moved_by_a_step_is_found(encoding: Encoding, by: int, size: float) -> None:
    weights = noise(50, 32) * np.float32(size)
    blocks = encoding.encode(weights)
    codes = codes_of(encoding.name, blocks)
    assert np.array_equal(with_codes(encoding.name, blocks, codes), blocks)
    step = np.abs(blocks[:, :2].copy().view(np.float16).astype(np.float32))
    tested = 0
    for j in range(32):
        moved = codes.copy()
        moved[:, j] = np.clip(codes[:, j] + by, *ENDS[encoding.name])
        stored = with_codes(encoding.name, blocks, moved)
        far = np.abs(weights - encoding.decode(stored))[:, j] > 0.6 * step[:, 0]
        far &= moved[:, j] != codes[:, j]
        found = encoding.wrong(weights, stored)
        assert found[far, j].all() and not np.delete(found, j, axis=1).any()
        tested += int(far.sum())
    assert tested > 0.8 * codes.size


@packed
@pytest.mark.parametrize("change", [2, 0.5, 1.03, 0.97, 1.004, np.inf, np.nan])
def test_a_changed_step_or_least_weight_makes_the_block_wrong(encoding: Encoding, change: float) -> None:
    weights = noise(50, 32)
    blocks = encoding.encode(weights)
    for at in range(header(encoding.name) // 2):
        assert encoding.wrong(weights, with_number(blocks, at, change)).all()


@packed
def test_a_doubled_step_is_found_though_its_codes_fit(encoding: Encoding) -> None:
    weights = noise(50, 32)
    blocks = encoding.encode(weights)
    stored = with_codes(encoding.name, with_number(blocks, 0, 2), codes_of(encoding.name, blocks) // 2)
    assert encoding.wrong(weights, stored).all()


@packed
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan, 1e38])
def test_weights_that_cannot_be_stored_are_flagged(encoding: Encoding, bad: float) -> None:
    weights = noise(3, 64)
    weights[1, 40] = bad
    stored = encoding.encode(weights)
    found = encoding.wrong(weights, stored)
    assert found[1, 32:].all() and found.sum() == 32
    assert not np.isfinite(encoding.decode(stored)[1, 32:]).all()
    assert encoding.wrong(weights, encoding.encode(noise(3, 64)))[1, 40]  # finite bytes do not hide them


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS.values() if e.dtype.block == 1], ids=lambda e: e.name)
def test_a_plain_number_that_is_one_step_off_is_found(encoding: Encoding) -> None:
    weights = noise()
    weights[3, 4:7] = np.nan, np.inf, -0.0
    stored = encoding.encode(weights)
    assert not encoding.wrong(weights, stored).any()
    off = stored.copy().view(f"u{encoding.dtype.nbytes}")
    off[5, 6] += 1
    off[3, 4:7] = 0
    assert encoding.wrong(weights, off.view(encoding.dtype.numpy)).nonzero()[0].tolist() == [3, 3, 3, 5]

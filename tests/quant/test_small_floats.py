"""4-bit floating point: gguf reads the same numbers, the error is no larger than ggml's, planted faults are found."""

from __future__ import annotations

import numpy as np
import pytest

from neoxconv.core.encoding import Context, Encoding
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml import small_floats
from tests.golden.make_blocks import ggml_encode
from tests.oracles import ggml_library
from tests.superblocks import columns, weights

quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
kinds = pytest.importorskip("gguf", reason="gguf is not installed").GGMLQuantizationType
FORMS = {form.name: form for form in small_floats.FORMS}
every = pytest.mark.parametrize("encoding", [ENCODINGS[name] for name in FORMS], ids=lambda e: e.name)


@every
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_are_those_of_gguf(encoding: Encoding) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (50, encoding.dtype.size(6144)), np.uint8)
    assert np.array_equal(encoding.decode(raw), quants.dequantize(raw, kinds[encoding.name]), equal_nan=True)


@every
@pytest.mark.parametrize("size", [1e-6, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student"])
def test_the_error_is_no_larger_than_ggmls(encoding: Encoding, kind: str, size: float) -> None:
    library, rows = ggml_library(), weights(kind) * np.float32(size)
    ours, theirs = encoding.encode(rows), ggml_encode(library, encoding.name, rows)
    found, limit = (float(((rows - encoding.decode(each)).astype(np.float64) ** 2).sum()) for each in (ours, theirs))
    assert found <= limit * (1 + 1e-9)
    assert not encoding.wrong(rows, ours).any() and not encoding.wrong(rows, theirs).any()


@every
def test_columns_that_matter_err_less(encoding: Encoding) -> None:
    assert encoding.search
    rows, importance = weights("student"), columns("spiky")
    known = encoding.search(rows, Context(importance))
    found, plain = (float((importance * (rows - encoding.decode(each)) ** 2).sum()) for each in
                    (known, encoding.encode(rows)))  # fmt: skip
    assert found < plain and not encoding.wrong(rows, known, weighted=True).any()


@every
def test_planted_faults_are_found(encoding: Encoding) -> None:
    rows, form = weights("gauss", 40 * 512), FORMS[encoding.name]
    stored = encoding.encode(rows)
    scales = stored.copy().reshape(-1, encoding.dtype.nbytes)
    scales[:, 0] += 1 if form.subs == 1 else 8  # twice as large
    assert encoding.wrong(rows, scales.reshape(stored.shape)).any(axis=1).all()
    moved = stored.copy()
    moved[:, form.subs] ^= 0x0F
    assert encoding.wrong(rows, moved).any(axis=1).mean() > 0.9
    assert encoding.wrong(rows, stored[::-1]).any(axis=1).all()


@every
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_weights_that_cannot_be_stored_are_flagged(encoding: Encoding, bad: float) -> None:
    rows = weights("gauss", 2048)
    rows[1, 300] = bad
    assert encoding.wrong(rows, encoding.encode(rows))[1, 300]


@every
def test_a_row_that_the_block_does_not_divide_is_refused(encoding: Encoding) -> None:
    with pytest.raises(PlanError, match=rf"{encoding.name} .* has 50"):
        encoding.encode(np.zeros((2, 50), np.float32))
    with pytest.raises(CheckpointError, match=encoding.name):
        encoding.decode(np.zeros((2, 35), np.uint8))

"""Super-blocks: gguf reads the same numbers, the error is no larger than ggml's, and nothing breaks them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neoxconv.core.encoding import Encoding
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.quant import ENCODINGS
from tests.fixtures import fixture
from tests.golden.make_blocks import ggml, ggml_encode
from tests.machines import PLAIN, printed
from tests.oracles import ggml_library
from tests.superblocks import NAMES, errors, trained, weights

quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
kinds = pytest.importorskip("gguf", reason="gguf is not installed").GGMLQuantizationType

every = pytest.mark.parametrize("encoding", [ENCODINGS[name] for name in NAMES], ids=lambda e: e.name)


ODD = ("gauss", "zeros", "constant", "outlier", "ties", "below")


@every
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_are_those_of_gguf(encoding: Encoding) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (50, encoding.dtype.size(6144)), np.uint8)
    ours, theirs = encoding.decode(raw), quants.dequantize(raw, kinds[encoding.name])
    assert np.array_equal(ours, theirs, equal_nan=True)


@every
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student"])
def test_the_error_is_no_larger_than_ggmls(encoding: Encoding, kind: str) -> None:
    library = ggml_library()
    rows = weights(kind)
    ours = errors(encoding, rows, encoding.encode(rows))
    theirs = errors(encoding, rows, ggml_encode(library, encoding.name, rows))
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1]


@pytest.mark.slow
@every
def test_the_error_on_a_trained_model_is_no_larger_than_ggmls(encoding: Encoding) -> None:
    library = ggml_library()
    rows = trained(fixture("trained_tp2_pp4/checkpoints"))[::3]
    ours = errors(encoding, rows, encoding.encode(rows))
    theirs = errors(encoding, rows, ggml_encode(library, encoding.name, rows))
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1]


@every
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student"])
def test_a_correct_encoding_is_never_flagged(encoding: Encoding, kind: str) -> None:
    rows = weights(kind, seed=7)
    assert not encoding.wrong(rows, encoding.encode(rows)).any()
    if library := ggml():
        assert not encoding.wrong(rows, ggml_encode(library, encoding.name, rows)).any()


@every
@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(-40, 7),
    st.sampled_from(["gauss", "zeros", "constant", "outlier", "ties", "below"]),
)
def test_odd_rows_are_stored_and_never_flagged(encoding: Encoding, seed: int, exponent: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    gauss = random.standard_normal((2, 512))
    made = {
        "gauss": gauss,
        "zeros": np.where(random.random(gauss.shape) < 0.98, 0.0, gauss),
        "constant": np.repeat(gauss[:, :4], 128, axis=1),
        "outlier": np.where(np.arange(512) == seed % 512, 100, gauss),
        "ties": random.integers(-4, 5, gauss.shape),
        "below": -np.abs(gauss) - 3,
    }[kind]
    rows = (made * 2.0**exponent).astype(np.float32)
    stored = encoding.encode(rows)
    assert np.isfinite(encoding.decode(stored)).all()
    assert not encoding.wrong(rows, stored).any()


@every
def test_slabs_threads_and_neighbours_change_nothing(encoding: Encoding) -> None:
    rows = weights("gauss", 37 * 512)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(encoding.encode, [rows[i : i + 5] for i in range(0, 37, 5)]))
    whole = encoding.encode(rows)
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)
    strange = np.vstack([rows[:3] * 1e6, rows[3:4], rows[:2] * 1e-9])
    assert encoding.encode(strange)[3].tobytes() == whole[3].tobytes()
    apart = np.repeat(rows, 2, axis=0)[::2]
    assert encoding.encode(apart).tobytes() == whole.tobytes()
    assert encoding.encode(rows[:0]).shape == (0, encoding.dtype.size(512))


@every
def test_a_moved_code_and_a_doubled_step_are_found(encoding: Encoding) -> None:
    rows = weights("gauss", 40 * 512)
    stored = encoding.encode(rows)
    field = {"Q6_K": 0, "Q2_K": 20, "Q3_K": 40, "IQ4_NL": 5}.get(encoding.name, 60)  # a byte of low bits of codes
    moved = stored.copy()
    moved[:, field] ^= 3 if encoding.name in ("Q2_K", "Q3_K") else 15
    assert encoding.wrong(rows, moved).any(axis=1).mean() > 0.9
    size, at = encoding.dtype.nbytes, {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(encoding.name, 0)
    doubled = stored.copy().reshape(-1, size)
    doubled[:, at : at + 2] = (np.ascontiguousarray(doubled[:, at : at + 2]).view(np.float16) * 2).view(np.uint8)
    assert encoding.wrong(rows, doubled.reshape(stored.shape)).any(axis=1).all()


@every
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e38])
def test_weights_that_cannot_be_stored_are_flagged(encoding: Encoding, bad: float) -> None:
    rows = weights("gauss", 2048)
    stored = encoding.encode(rows)
    rows[1, 300] = bad
    made = encoding.encode(rows)
    assert encoding.wrong(rows, made)[1, 300] and encoding.wrong(rows, stored)[1, 300]
    if np.isfinite(bad):
        assert not np.isfinite(encoding.decode(made)[1]).all()
    others = np.delete(encoding.decode(made), 1, axis=0)
    assert np.array_equal(others, np.delete(encoding.decode(stored), 1, axis=0))


@every
def test_a_row_that_the_block_does_not_divide_is_refused(encoding: Encoding) -> None:
    with pytest.raises(PlanError, match=rf"{encoding.name} .* has 250"):
        encoding.encode(np.zeros((2, 250), np.float32))
    with pytest.raises(CheckpointError, match=encoding.name):
        encoding.decode(np.zeros((2, 35), np.uint8))


CHILD = """
import hashlib, numpy as np
from neoxconv.core.encoding import Context
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml.searches import SEARCHES
from tests.superblocks import NAMES, weights
rows = np.vstack([weights("gauss", 1 << 14), weights("student", 1 << 14)])
columns = Context(np.exp(np.linspace(-2, 2, rows.shape[1])).astype(np.float32))
made = [ENCODINGS[name].encode(rows) for name in NAMES]
made += [ENCODINGS[name].search(rows, how) for name in SEARCHES for how in (columns, Context(thorough=True))]
print(*(hashlib.sha256(stored.tobytes()).hexdigest() for stored in made))
"""


@pytest.mark.slow
def test_another_cpu_gives_the_same_bytes() -> None:
    """A child that compiles for a plain x86-64 or ARM, without the wider vector units, and with numpy's turned off."""
    outputs = [printed(CHILD, extra) for extra in ({}, PLAIN)]
    assert outputs[0] == outputs[1] and len(set(outputs[0].split())) > 3 * len(NAMES)

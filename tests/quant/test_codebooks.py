"""Codebooks: gguf and ggml read the same numbers, the error is no larger than ggml's, planted faults are found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from neoxconv.core.encoding import Context, Encoding
from neoxconv.dtypes import Bytes, Floats
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml import codebooks
from neoxconv.quant.ggml.bit_places import Places
from neoxconv.quant.ggml.codebook_search import Words
from tests.fixtures import fixture
from tests.golden.make_blocks import ggml_encode
from tests.helpers import few
from tests.machines import PLAIN, printed
from tests.oracles import ggml_library
from tests.superblocks import columns, spread_by, trained, weights

quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
kinds = pytest.importorskip("gguf", reason="gguf is not installed").GGMLQuantizationType

FORMS = {form.name: form for form in codebooks.FORMS}
every = pytest.mark.parametrize("encoding", [ENCODINGS[name] for name in FORMS], ids=lambda e: e.name)
KINDS, SPREADS = ("gauss", "laplace", "student"), ("flat", "usual", "spiky")


def searched(encoding: Encoding, rows: Floats, spread: str = "usual") -> Bytes:
    assert encoding.search
    return encoding.search(rows, Context(columns(spread)[: rows.shape[1]]))


def error(encoding: Encoding, rows: Floats, importance: Floats, stored: Bytes) -> float:
    """The error as ggml's encoder weighs it."""
    squares = (rows - encoding.decode(stored)).astype(np.float64) ** 2
    return float((importance * spread_by(rows, FORMS[encoding.name].spread, 256) * squares).sum())


@every
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_are_those_of_gguf(encoding: Encoding) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (50, encoding.dtype.size(6144)), np.uint8)
    assert np.array_equal(encoding.decode(raw), quants.dequantize(raw, kinds[encoding.name]), equal_nan=True)


some = pytest.mark.parametrize(  # ggml's searches are slow
    "encoding",
    [pytest.param(ENCODINGS[n], marks=() if n == "IQ3_XXS" else pytest.mark.slow, id=n) for n in FORMS],
)


@some
@pytest.mark.parametrize("kind", few(KINDS, "gauss"))
def test_the_error_is_no_larger_than_ggmls(encoding: Encoding, kind: str) -> None:
    library, rows = ggml_library(), weights(kind, 1 << 15)
    for spread in SPREADS:
        theirs = ggml_encode(library, encoding.name, rows, columns(spread))
        ours, limit = (
            error(encoding, rows, columns(spread), each) for each in (searched(encoding, rows, spread), theirs)
        )
        assert ours <= limit, spread
        assert encoding.wrong(rows, theirs, weighted=True).mean() <= encoding.slips, spread


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_matrix_it_is_not_either(kind: str) -> None:
    """By w^2, as ggml weighs it, and plain: of IQ3_S, which alone may be made without one."""
    encoding, library, rows = ENCODINGS["IQ3_S"], ggml_library(), weights(kind)
    ours, theirs = encoding.encode(rows), ggml_encode(library, encoding.name, rows)
    for worth in (rows**2, np.ones_like(rows)):
        found, limit = (float((worth * (rows - encoding.decode(each)) ** 2).sum()) for each in (ours, theirs))
        assert found <= limit


@pytest.mark.slow
@every
def test_the_error_on_a_trained_model_is_no_larger_than_ggmls(encoding: Encoding) -> None:
    library, rows = ggml_library(), np.ascontiguousarray(trained(fixture("trained_tp2_pp4/checkpoints"))[::7])
    for spread in SPREADS:
        importance = columns(spread)[:256]
        theirs = ggml_encode(library, encoding.name, rows, importance)
        assert error(encoding, rows, importance, searched(encoding, rows, spread)) <= error(
            encoding, rows, importance, theirs
        )
        assert encoding.wrong(rows, theirs, weighted=True).mean() <= encoding.slips


def odd_rows() -> Floats:
    random = np.random.default_rng(3)
    gauss = random.standard_normal((2, 512))
    made = (
        gauss,
        np.where(random.random(gauss.shape) < 0.98, 0.0, gauss),
        np.repeat(gauss[:, :4], 128, axis=1),
        np.where(np.arange(512) == 77, 100, gauss),
        random.integers(-4, 5, gauss.shape),
        -np.abs(gauss) - 3,
        np.zeros((1, 512)),
        np.full((1, 512), 1e-42),
    )
    return np.vstack([each * size for each in made for size in (2.0**-40, 1e-6, 0.02, 100.0)]).astype(np.float32)


@every
def test_odd_rows_are_stored_and_never_flagged(encoding: Encoding) -> None:
    rows = odd_rows()
    for stored in (encoding.encode(rows), searched(encoding, rows), searched(encoding, rows, "spiky")):
        assert np.isfinite(encoding.decode(stored)).all()
        assert not encoding.wrong(rows, stored, weighted=True).any()


@every
def test_slabs_threads_and_neighbours_change_nothing(encoding: Encoding) -> None:
    rows = weights("gauss", 37 * 512)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: searched(encoding, rows[i : i + 5]), range(0, 37, 5)))
    whole = searched(encoding, rows)
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)
    strange = np.vstack([rows[:3] * 1e6, rows[3:4], rows[:2] * 1e-9])
    assert searched(encoding, strange)[3].tobytes() == whole[3].tobytes()
    assert encoding.encode(rows[:0]).shape == (0, encoding.dtype.size(512))


def exchange(blocks: Bytes, places: Places, numbers: Words) -> None:
    """Put numbers in the places of others."""
    there = np.zeros_like(blocks)
    codebooks.put(there, places, ~(0 * numbers))
    blocks &= ~there
    codebooks.put(blocks, places, numbers)


@every
def test_planted_faults_are_found(encoding: Encoding) -> None:
    """Doubled and halved steps, exchanged rows, and most of entries that were exchanged for any other."""
    rows, size = weights("gauss", 40 * 512), encoding.dtype.nbytes
    stored = searched(encoding, rows)
    form = FORMS[encoding.name]
    for factor in () if encoding.name.startswith("IQ1") else (2, 0.5):  # IQ1's three levels fit such scales too
        changed = stored.copy().reshape(-1, size)
        steps = codebooks.take(changed, form.step).astype(np.uint16).view(np.float16) * np.float16(factor)
        exchange(changed, form.step, steps.view(np.uint16).astype(np.uint32))
        assert encoding.wrong(rows, changed.reshape(stored.shape), True).any(axis=1).all(), factor
    assert encoding.wrong(rows, stored[::-1], True).any(axis=1).all()
    moved = stored.copy().reshape(-1, size)
    entries = codebooks.take(moved, form.entries)
    entries[:, ::8] ^= np.random.default_rng(5).integers(1, 256, entries[:, ::8].shape).astype(np.uint32)
    exchange(moved, form.entries, entries)
    found = encoding.wrong(rows, moved.reshape(stored.shape), True).any(axis=1).mean()
    assert found > {"IQ1_S": 0.2, "IQ1_M": 0.2}.get(encoding.name, 0.7)


@every
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e38])
def test_weights_that_cannot_be_stored_are_flagged(encoding: Encoding, bad: float) -> None:
    rows = weights("gauss", 2048)
    stored = encoding.encode(rows)
    rows[1, 300] = bad
    made = encoding.encode(rows)
    assert encoding.wrong(rows, made)[1, 300] and encoding.wrong(rows, stored)[1, 300]
    others = np.delete(encoding.decode(made), 1, axis=0)
    assert np.array_equal(others, np.delete(encoding.decode(stored), 1, axis=0))


@every
def test_a_row_that_the_block_does_not_divide_is_refused(encoding: Encoding) -> None:
    with pytest.raises(PlanError, match=rf"{encoding.name} .* has 250"):
        encoding.encode(np.zeros((2, 250), np.float32))
    with pytest.raises(CheckpointError, match=encoding.name):
        encoding.decode(np.zeros((2, 35), np.uint8))


@every
def test_thorough_errs_less(encoding: Encoding) -> None:
    assert encoding.search
    rows, importance = weights("laplace", 1 << 15), columns("usual")
    thorough = encoding.search(rows, Context(importance, thorough=True))
    aims = rows * np.float32(FORMS[encoding.name].stretch)  # what the search is after is made larger at last
    assert error(encoding, aims, importance, thorough) < error(encoding, aims, importance, searched(encoding, rows))


CHILD = """
import hashlib, numpy as np
from neoxconv.core.encoding import Context
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml.codebooks import FORMS
from tests.superblocks import columns, weights
from tests import helpers
rows = np.vstack([weights("gauss", 1 << 13), weights("student", 1 << 13)])
made = [ENCODINGS[form.name].search(rows, Context(columns("usual"))) for form in FORMS]
print(*(hashlib.sha256(stored.tobytes()).hexdigest() for stored in made))
"""


@pytest.mark.slow
def test_another_cpu_gives_the_same_bytes() -> None:
    outputs = [printed(CHILD, extra) for extra in ({}, PLAIN)]
    assert outputs[0] == outputs[1] and len(set(outputs[0].split())) == len(FORMS)

"""The kernels' verdicts on stored weights are those of the rules in numpy, whatever is stored; so are the sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neoxconv.core.encoding import Encoding, Scaled, scale_and_least
from neoxconv.dtypes import F16, Bytes, Floats
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml import codebooks, small_floats
from neoxconv.quant.kernels import tally
from tests.helpers import few
from tests.twins import (
    ENDS,
    ROWS,
    nearest,
    wide,
    wrong_blocks,
    wrong_codebooks,
    wrong_scaled,
    wrong_small_floats,
    wrong_superblocks,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCKS = [encoding for encoding in ENCODINGS.values() if encoding.dtype.block > 1]
RULES = (
    dict.fromkeys(ENDS, wrong_blocks)
    | {form.name: wrong_codebooks for form in codebooks.FORMS}
    | {form.name: wrong_small_floats for form in small_floats.FORMS}
)
SHAPE = (12, 512)


def weights(kind: str) -> Floats:
    random = np.random.default_rng(3)
    gauss, odd = random.standard_normal(SHAPE), random.choice([np.nan, np.inf, -np.inf, 1e38], SHAPE)
    made = {
        "gauss": gauss,
        "heavy": np.clip(random.standard_t(1.2, SHAPE), -200, 200),
        "zeros": np.where(random.random(SHAPE) < 0.97, 0, gauss),
        "constant": np.repeat(gauss[:, :4], 128, axis=1),
        "small": gauss * 1e-6,
        "subnormal": gauss * 1e-38,
        "ties": random.integers(-4, 5, SHAPE),
        "not finite": np.where(random.random(SHAPE) < 0.002, odd, gauss),
    }
    return made[kind].astype(np.float32)


KINDS = ("gauss", "heavy", "zeros", "constant", "small", "subnormal", "ties", "not finite")


def faulty(stored: Bytes) -> dict[str, Bytes]:
    """What was stored, and the same with faults: flipped bits, other bytes, other rows, nothing but noise."""
    random, raw = np.random.default_rng(4), np.ascontiguousarray(stored).view(np.uint8)
    flipped = raw ^ np.where(random.random(raw.shape) < 0.01, 1 << random.integers(0, 8, raw.shape), 0).astype(np.uint8)
    other = np.where(random.random(raw.shape) < 0.003, random.integers(0, 256, raw.shape), raw).astype(np.uint8)
    noise = random.integers(0, 256, raw.shape).astype(np.uint8)
    return {"right": raw, "flipped": flipped, "other": other, "rows": raw[::-1], "noise": noise}


@pytest.mark.parametrize("encoding", BLOCKS, ids=lambda e: e.name)
@pytest.mark.parametrize("kind", few(KINDS, "heavy", "zeros", "ties", "not finite"))
def test_verdicts_on_blocks_are_those_of_the_rule(encoding: Encoding, kind: str) -> None:
    rows = weights(kind)
    rule = RULES.get(encoding.name, wrong_superblocks)
    for fault, stored in faulty(encoding.encode(rows)).items():
        for weighted in (False, True):
            found = encoding.compare(rows, stored, weighted)
            assert np.array_equal(found.wrong, rule(encoding, rows, stored, weighted)), (fault, weighted)
            assert np.array_equal(found.read(), encoding.decode(stored), equal_nan=True)


@pytest.mark.parametrize("encoding", ROWS, ids=lambda e: e.name)
@pytest.mark.parametrize("kind", few(KINDS, "heavy", "zeros", "ties", "not finite"))
def test_verdicts_on_scaled_weights_are_those_of_the_rule(encoding: Scaled, kind: str) -> None:
    """Values are right but for some: of another code, of none, of another scale, or no number."""
    rows, random, groups = weights(kind), np.random.default_rng(5), encoding.groups
    scales = encoding.scales(encoding.sizes(rows), F16)
    (encoded, low), (decoded, least) = (wide(groups, each, SHAPE) for each in (scales.encoded, scales.decoded))
    right = (nearest(encoding, np.nan_to_num((rows + low) / encoded)) * decoded - least).astype(np.float32)
    some = random.random(SHAPE) < 0.003
    off = np.where(some[:, :1], np.float32(1.001), np.float32(1)) * right
    others = {
        "right": right,
        "moved": np.where(some, right + decoded * np.float32(0.1), right),
        "no numbers": np.where(some, random.choice(np.float32([np.nan, np.inf, 0, 1]), SHAPE), right),
        "scale": off,
        "rows": right[::-1],
    }
    some_slack = scales.slack + np.abs(scale_and_least(scales.decoded)[0]) * np.float32(0.02)
    slack = replace(scales, slack=some_slack)
    for known in (scales, slack):
        for fault, values in others.items():
            found = encoding.check(rows, values.astype(np.float32), known, groups.width(SHAPE))
            assert np.array_equal(found, wrong_scaled(encoding, rows, values.astype(np.float32), known)), fault


@pytest.mark.parametrize("encoding", ROWS, ids=lambda e: e.name)
def test_a_scale_that_is_infinite_is_found_though_every_weight_is_the_largest(encoding: Scaled) -> None:
    rows = np.full(SHAPE, 0.5, np.float32)
    scales = encoding.scales(encoding.sizes(rows), F16)
    assert encoding.check(rows, rows * np.float32(np.inf), scales, encoding.groups.width(SHAPE)).all()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 10_007])
def test_sums_are_those_of_numpy(count: int) -> None:
    random = np.random.default_rng(6)
    rows, values = random.standard_normal((2, count)).astype(np.float32)
    error = (rows - values).astype(np.float64)
    found = tally(rows, values)
    assert found[0] == np.abs(error).max(initial=0)
    assert found[1:] == pytest.approx((np.square(error).sum(), np.square(rows, dtype=np.float64).sum()), rel=1e-12)


def test_a_weight_that_is_no_number_is_seen_in_the_sums() -> None:
    rows = np.arange(200, dtype=np.float32)
    rows[100] = np.nan
    assert all(np.isnan(tally(rows, rows)))

"""Encodings with scales beside them: the bytes of bitsandbytes, the numbers of torch, and what they promise."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neoxconv.core.encoding import EXACT, Bound, Encoding, Groups, Scaled
from neoxconv.core.layout import Entry
from neoxconv.core.tensor import LazyTensor, Read
from neoxconv.dtypes import BF16, F16, F32, Array, DType, Floats, narrow, widen
from neoxconv.engine.encode import pieces
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.quant.scaled import float8, fourbit, kernels, nested
from neoxconv.quant.scaled.groups import BlockGroups, RowGroups, TensorGroup, largest
from tests.machines import has_avx2, needs_avx2, needs_x86, printed
from tests.oracles import program
from tests.twins import ROWS, fitting, nearest, wide

FLOAT8 = {torch.float8_e4m3fn: float8.FORM_E4M3, torch.float8_e5m2: float8.FORM_E5M2}
FORMS = {form.dtype.name[3:]: form for form in FLOAT8.values()}
TABLES = {"NF4": fourbit.NF4_TABLE, "FP4": fourbit.FP4_TABLE, "INT8": np.arange(-127, 128) / 127}
TABLES |= {name: float8.table(form) / np.float32(form.largest) for name, form in FORMS.items()}
BOUNDED = [row for row in (*ENCODINGS.values(), *ROWS) if row.bound]
KINDS = ("gauss", "zeros", "nothing", "small", "subnormal", "huge", "ties", "near ties")
SMALL, LARGE = ((168, 56), (5, 13), (1, 1), (7, 9), (3, 64)), ((1000, 448), (256, 1024))
CASES = [*itertools.product(KINDS, SMALL), *itertools.product(("zeros", "huge", "ties"), LARGE)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of scales at the ends of float32
scaled = pytest.mark.parametrize("encoding", ROWS, ids=lambda e: e.name)
float8s = pytest.mark.parametrize(("kind", "form"), FLOAT8.items(), ids=FORMS)
dtypes = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=lambda d: d.name)
shapes = st.tuples(st.integers(1, 90), st.integers(1, 150))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bnb(one_thread: None) -> Iterator[ModuleType]:
    """bitsandbytes' functions, not compiled by torch."""
    functions = program("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):
        yield functions


def weights(kind: str, shape: tuple[int, int], name: str = "NF4") -> Floats:
    """Weights of one kind; ties are those of the table of the encoding `name`."""
    random = np.random.default_rng(0)
    gauss, odd = random.standard_normal(shape) * 0.02, np.arange(shape[0])[:, None] % 2 == 1
    table = np.sort(np.array(TABLES[name.split("_")[0]], np.float32))
    middles = (table[:-1] + table[1:]) / np.float32(2)
    ties = random.choice(np.concatenate([middles, np.nextafter(middles, np.float32(2)), [1, -1]]), shape)
    made = {
        "gauss": gauss,
        "zeros": gauss * odd,
        "nothing": np.copysign(0, gauss),
        "small": np.where(odd, gauss, random.integers(-9, 10, shape) * 2.0**-24),
        "subnormal": gauss * 1e-38,
        "huge": np.clip(random.standard_t(1.2, shape) * 1e4, -6e4, 6e4),
        "ties": ties,
        "near ties": ties * 0.3,
    }[kind]
    return np.asarray(made, np.float32)


def lazy(values: Array, dtype: DType = F32) -> LazyTensor:
    rows = narrow(values.astype(np.float32), dtype)
    return LazyTensor(values.shape, dtype, lambda start, stop: rows[start:stop], dtype)


def as_torch(tensor: LazyTensor) -> torch.Tensor:
    rows = torch.from_numpy(tensor.read(0, tensor.rows))
    return rows.view(torch.bfloat16) if tensor.dtype is BF16 else rows


def written(encoding: Scaled, tensor: LazyTensor) -> dict[str, bytes]:
    """The bytes of every part by its name."""
    entry = Entry("weight", "weight", tensor, encoding)
    found = {part.name: b"" for part in entry.parts}
    for piece in pieces(entry, 1 << 20):
        found[entry.parts[piece.number].name] += piece.data.tobytes()
    return found


def reader(encoding: Scaled, tensor: LazyTensor, made: dict[str, bytes] | None = None) -> Read:
    made, parts = made or written(encoding, tensor), {}
    for part in encoding.parts(tensor):
        rows = np.frombuffer(made[part.name], part.dtype.numpy).reshape(-1 if part.late else part.shape)
        parts[part.name] = LazyTensor(rows.shape, part.dtype, lambda a, b, rows=rows: rows[a:b], part.dtype)
    return encoding.decode(parts, tensor.shape)


def scales_of(encoding: Scaled, rows: Floats, native: DType = F32) -> Iterator[tuple[Floats, Floats]]:
    """What 1 stands for at every weight and what is taken away, when it is encoded and when it is read."""
    found = encoding.scales(encoding.sizes(rows), native)
    return (wide(encoding.groups, each, rows.shape) for each in (found.encoded, found.decoded))


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("name", ["NF4", "NF4_DQ", "FP4", "FP4_DQ"])
def test_four_bits_are_written_and_read_as_by_bitsandbytes(bnb: ModuleType, name: str, dtype: DType) -> None:
    """But for the sign of zeros, which bitsandbytes' C++ reads from code 8 of FP4 and its Python does not."""
    encoding, double = SCALED[name], name.endswith("_DQ")
    if double:
        needs_avx2()
    for kind, shape in CASES:
        wide = np.float32(1e28 if kind == "huge" and dtype is not F16 else 1)
        tensor = lazy(weights(kind, shape, name) * wide, dtype)
        codes, state = bnb.quantize_4bit(as_torch(tensor), quant_type=name[:3].lower(), compress_statistics=double)
        theirs = {"weight": codes} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        ours, parts = written(encoding, tensor), encoding.parts(tensor)
        assert [part.late for part in parts] == [False] * (len(parts) - 1) + [double]
        assert ours == {key: part.numpy().tobytes() for key, part in theirs.items()}, (kind, shape)
        for part in parts:
            stored = theirs[part.name].numpy()
            assert part.dtype.numpy == stored.dtype and (part.late or part.shape == stored.shape)
            assert part.nbytes == stored.nbytes or (part.late and part.nbytes > stored.nbytes)
        values = reader(encoding, tensor, ours)(0, tensor.rows)
        expected = bnb.dequantize_4bit(codes, state).float().numpy()
        assert values.dtype == np.float32 and np.array_equal(widen(narrow(values, dtype), dtype), expected)


@dtypes
def test_eight_bits_are_written_and_read_as_by_bitsandbytes(bnb: ModuleType, dtype: DType) -> None:
    """Weights of other types are rounded to float16 first; a code of 127 gives the largest weight exactly."""
    halves = np.append(np.random.default_rng(0).integers(-253, 254, (40, 99)) / 2, np.full((40, 1), 127), axis=1)
    powers = 2.0 ** np.arange(-31, 9)[:, None]
    for rows in (halves * powers, *(weights(kind, shape, "INT8") for kind, shape in CASES)):
        tensor = lazy(rows, dtype)
        codes, sizes, _ = bnb.int8_vectorwise_quant(as_torch(tensor).half())
        ours = written(SCALED["INT8"], tensor)
        assert ours == {"weight": codes.numpy().tobytes(), "SCB": sizes.numpy().tobytes(), "weight_format": b"\0"}
        values = reader(SCALED["INT8"], tensor, ours)(0, len(rows))
        exact = (codes.double() * sizes.double()[:, None] / 127).numpy()
        assert (np.abs(values - exact) <= np.spacing(np.abs(values))).all()
        assert np.array_equal(np.abs(values).max(axis=1), sizes.numpy())


def test_the_tables_are_those_of_bitsandbytes(bnb: ModuleType) -> None:
    for kind in ("nf4", "fp4"):
        table = np.array(TABLES[kind.upper()], np.float32)
        assert np.array_equal(table, bnb.get_4bit_type(kind, device="cpu").numpy())
    most = 0 if has_avx2() else 1e-7
    assert np.abs(nested.nested_table() - bnb.create_dynamic_map().numpy()).max() <= most
    assert 0 <= nested.WIDEST - np.diff(nested.nested_table()).max() < 2e-4


def test_a_mean_is_that_of_torch(one_thread: None) -> None:
    needs_x86()
    values = np.abs(np.random.default_rng(0).standard_t(3, 300_400)).astype(np.float32)
    powers = [(1 << power) + k for power in range(10, 19) for k in (-1, 0, 1, 33)]
    for count in (*range(1, 600), *powers, *range(1111, 300_000, 9973), 300_000):
        for start in (0, 100, 400):
            numbers = values[start : start + count]
            assert kernels.mean(numbers) == torch.from_numpy(numbers).mean().item(), count


# --- float8 ---------------------------------------------------------------------------------------------------------


@float8s
def test_a_float8_is_that_of_torch(kind: torch.dtype, form: float8.Float8Form) -> None:
    numbers = float8.table(form)[: form.largest_code + 1]
    middles = (numbers[:-1] + numbers[1:]) / np.float32(2)
    near = [np.nextafter(middles, np.float32(way)) for way in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    rows = np.concatenate([halves, random, numbers, middles, *near])
    rows, encoding, every = np.concatenate([rows, -rows]), float8.encoding(form), np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(rows).clamp(-form.largest, form.largest).to(kind).view(torch.uint8).numpy()
    assert np.array_equal(encoding.encode(rows), expected)
    assert not encoding.wrong(rows, expected).any() and encoding.wrong(rows, expected ^ 1)[~np.isnan(rows)].all()
    ends = encoding.encode(np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32))
    assert ends.tolist() == [form.largest_code, form.largest_code | 128, 127, 255]
    assert np.array_equal(encoding.decode(every), torch.from_numpy(every).view(kind).float().numpy(), equal_nan=True)
    limit = np.float32(encoding.limit)
    last, beyond = (torch.tensor([limit, np.nextafter(limit, np.float32(np.inf))]) / 2).to(kind).float().tolist()
    assert limit == encoding.limit and 2 * last == form.largest < 2 * beyond


@float8s
def test_a_scale_is_the_least_power_of_two_that_will_do(kind: torch.dtype, form: float8.Float8Form) -> None:
    tops = np.ldexp(np.float32(form.largest), np.arange(-60, 110)).astype(np.float32)
    near = [np.nextafter(tops, np.float32(way)) for way in (0, np.inf)]
    sizes = np.concatenate([tops, *near, np.exp(np.random.default_rng(0).uniform(-60, 60, 10_000)).astype(np.float32)])
    scales, exact = float8.weight_scales(form, sizes), sizes.astype(np.float64)
    assert scales.dtype == np.float32 and (np.frexp(scales)[0] == 0.5).all() and scales.min() == 2.0**-24
    assert (exact / scales <= form.largest).all()
    assert ((2 * exact / scales > form.largest) | (scales == 2.0**-24)).all()
    assert float8.weight_scales(form, np.zeros(2, np.float32)).tolist() == [1, 1]


# --- groups ---------------------------------------------------------------------------------------------------------


def test_the_picture_of_groups_is_true() -> None:
    lines = (line.split() for line in (Groups.__doc__ or "").splitlines())
    drawn = np.array([line for line in lines if line and line[0].isdigit()], np.float32)
    for k, groups in enumerate((BlockGroups(8), RowGroups(), TensorGroup())):
        found = np.arange(groups.groups_of(0, 4, 6).stop, dtype=np.float32)
        assert np.array_equal(groups.per_weight(found, (4, 6)), drawn[:, 6 * k : 6 * k + 6])
        assert groups.rows_per_whole_group(6) == (4 if k == 0 else 1) and groups.whole == (k == 2)


@scaled
@settings(max_examples=15)
@given(shapes, st.integers(1, 9), st.sampled_from(KINDS), st.data())
def test_borders_of_bands_are_not_seen(
    encoding: Scaled, shape: tuple[int, int], units: int, kind: str, data: st.DataObject
) -> None:
    shape = fitting(encoding, shape)
    rows, groups = weights(kind, shape), encoding.groups
    step, whole, codes = units * groups.rows_per_whole_group(shape[1]), encoding.sizes(rows), b""
    owner = groups.per_weight(np.arange(len(whole), dtype=np.float32), shape)
    assert np.array_equal(whole, np.concatenate([encoding.measure(rows[owner == k][None]) for k in range(len(whole))]))
    assert encoding.numbers == 2 or np.array_equal(whole, [np.abs(rows[owner == k]).max() for k in range(len(whole))])
    for start in range(0, len(rows), step):
        band = rows[start : start + step]
        span = groups.groups_of(start, start + len(band), shape[1])
        assert np.array_equal(groups.per_weight(np.arange(len(whole))[span], band.shape), owner[start : start + step])
        assert np.array_equal(encoding.sizes(band), [np.abs(band).max()] if groups.whole else whole[span])
        codes += encoding.encode(band, whole[span], F32).tobytes()
    assert codes == encoding.encode(rows, whole, F32).tobytes()
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    read = reader(encoding, lazy(rows))
    assert read(start, stop).tobytes() == read(0, shape[0])[start:stop].tobytes()
    assert np.array_equal(np.unique(owner[start:stop]), np.arange(len(whole))[groups.groups_of(start, stop, shape[1])])


@scaled
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_counted(encoding: Scaled, bad: float) -> None:
    rows = weights("gauss", fitting(encoding, (9, 70)))
    rows[4, 5] = bad
    assert sum(piece.nonfinite for piece in pieces(Entry("weight", "", lazy(rows), encoding), 1 << 20)) == 1


# --- how far weights are moved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", BOUNDED, ids=lambda e: e.name)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy"])
def test_weights_are_moved_within_the_bound_and_some_by_half_of_it(encoding: Encoding | Scaled, kind: str) -> None:
    """Beyond it come half a step of subnormal numbers, and what double quantization does to a scale."""
    random, bound = np.random.default_rng(0), encoding.bound or Bound(0, "")
    shape = fitting(encoding, (300, 448)) if isinstance(encoding, Scaled) else (300, 448)
    made = {"normal": random.normal(size=shape), "uniform": random.uniform(-1, 1, shape)}
    rows = made.get(kind, np.clip(random.standard_t(1.5, shape), -999, 999)).astype(np.float16) * np.float32(0.02)
    form = FORMS.get(encoding.name.removeprefix("F8_").split("_")[0])
    step = float8.table(form)[1] if form else np.float32(2.0**-24 if encoding.name == "F16" else 0)
    if isinstance(encoding, Encoding):
        values, base, extra = encoding.decode(encoding.encode(rows)), np.abs(rows), step / 2
    else:
        rows = widen(narrow(rows, F16), F16)
        values, groups = reader(encoding, lazy(rows))(0, len(rows)), encoding.groups
        (size, low), (scale, least) = scales_of(encoding, rows)
        top = groups.per_weight(largest(groups.apart(rows)), shape)
        sizes = encoding.sizes(rows)
        span = groups.per_weight(sizes[:, 1] - sizes[:, 0], shape) if encoding.numbers == 2 else top
        bases = {"weight": np.abs(rows), "largest": top, "range": span, "step": np.abs(size)}
        base = bases[bound.of.split()[-1]]
        lost = np.abs(scale - size) * encoding.table.max() + np.abs(least - low)
        extra = scale / form.largest * step / 2 if form else lost
    error = np.abs(values.astype(np.float64) - rows)
    assert str(bound).startswith(f"{bound.share:.3g} of the {bound.of}")
    assert (error <= (bound.share + 3e-7) * base + extra).all()
    assert (error >= bound.share * base / 2)[base > min(1e-3, base.max() / 2)].any()


@scaled
@pytest.mark.parametrize("kind", ["zeros", "nothing", "small"])
def test_what_is_read_is_the_nearest_number_in_its_group(encoding: Scaled, kind: str) -> None:
    """float16 has all that float8 makes of it."""
    rows = widen(narrow(weights(kind, fitting(encoding, (300, 448))), F16), F16)
    values, ((size, low), (scale, least)) = (
        reader(encoding, lazy(rows))(0, len(rows)),
        scales_of(encoding, rows),
    )
    of_both = ((rows + low, size), (values + least, scale))
    asked, stored = (np.divide(n, of, out=np.zeros_like(n), where=of != 0) for n, of in of_both)
    found, near = nearest(encoding, stored), encoding.scales(encoding.sizes(rows), F32).near
    assert (np.abs(values - (found * scale - least)) <= 3e-7 * (np.abs(values) + np.abs(least))).all()
    near = near if near > EXACT else 3e-7
    slack = near * (np.abs(asked) + np.abs(low / np.where(size, size, 1)))
    assert (np.abs(asked - found) <= np.abs(asked - nearest(encoding, asked)) + slack).all()
    assert encoding.name.split("_")[0] not in FORMS or np.array_equal(values.astype(np.float16), values)


@pytest.mark.parametrize("name", ["NF4_DQ", "FP4_DQ"])
def test_scales_stay_within_the_slack_when_others_sum_the_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SCALED[name].sizes(weights("gauss", (1000, 448)))
    ours, middle = SCALED[name].scales(sizes, F32), np.float32(sizes.mean(dtype=np.float64))
    assert (np.abs(ours.decoded - sizes) <= 0.5001 * ours.slack).all() and np.array_equal(ours.encoded, sizes)
    for ulps in (-3, 3):
        monkeypatch.setattr(kernels, "mean", lambda scales, ulps=ulps: middle + ulps * np.spacing(middle))
        others = SCALED[name].scales(sizes, F32).decoded
        assert (others != ours.decoded).any() and (np.abs(others - ours.decoded) <= ours.slack + 1e-6 * sizes).all()


# --- machines -------------------------------------------------------------------------------------------------------


def digest() -> str:
    rows = np.concatenate([weights(kind, (40, 448)) for kind in KINDS])
    made = [written(encoding, lazy(rows[:, : fitting(encoding, (1, 321))[1]])) for encoding in ROWS]
    means = [kernels.mean(rows.reshape(-1)[:count]) for count in range(1, rows.size, 1009)]
    codes = [ENCODINGS[f"F8_{name}"].encode(rows).tobytes() for name in FORMS]
    return hashlib.sha256(repr((made, means, codes)).encode()).hexdigest()


@pytest.mark.slow
def test_another_cpu_gives_the_same_bytes() -> None:
    assert printed(f"from {__name__} import digest; print(digest())") == digest()

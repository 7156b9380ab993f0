"""`--weights master`: the optimizer's fp32 copies, against what live optimizers held, and with every fault named."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_bytes, verify_weights
from neoxconv.cli.main import main
from neoxconv.core.model import Checkpoint
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32, Floats, narrow
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.neox.zero import flat, with_masters
from neoxconv.formats.neox.zero.flat import Padding
from neoxconv.formats.pt import Placeholder, read_pt
from neoxconv.formats.pt.unpickle import Size
from neoxconv.names import FORMATS
from neoxconv.sources.checkpoint import read_index
from neoxconv.sources.integrity import check, work
from neoxconv.storage import Storage, open_storage
from tests.fixtures import fixture
from tests.toy import toy

REAL = ("neox_2022_tp2_pp4", "neox_2022_sequential_tp2", "neox_2026_bf16_tp2_pp2")
OLD, NEW = REAL[0], REAL[2]
MASTERS = Path(__file__).parents[1] / "golden" / "masters.json"  # tests.data.make_data writes it

Change = Callable[[dict[str, Any]], Any]


def opened(name: str, **settings: Any) -> Checkpoint:
    return open_checkpoint(fixture(f"{name}/checkpoints", "*/*optim_states.pt"), weights="master", **settings)


def oracle(name: str) -> list[dict[str, str]]:
    """What the live optimizers held: for each tensor-parallel rank by `N.name` the SHA-256 of the fp32 numbers."""
    ranks: list[dict[str, str]] = [{}, {}]
    for key, digest in json.loads(MASTERS.read_text())[name].items():
        rank, tensor = key.split()
        ranks[int(rank)][tensor] = digest
    return ranks


def held_by(name: str) -> list[dict[str, Floats]]:
    """The masters as they are read, which are those of the oracle."""
    return [
        {key: whole(masters[key]) for key in held}
        for masters, held in zip(opened(name).index.ranks, oracle(name), strict=True)
    ]


def whole(tensor: LazyTensor) -> Any:
    return tensor.read(0, tensor.rows)


@pytest.mark.parametrize("name", REAL)
def test_masters_are_what_the_optimizer_held(name: str) -> None:
    index = opened(name).index
    for masters, stored, held in zip(index.ranks, index.replaced, oracle(name), strict=True):
        assert list(masters) == list(stored)
        assert set(masters) - set(held) == {key for key in stored if key.endswith("inv_freq")}
        for key, digest in held.items():
            values = whole(masters[key])
            assert masters[key].dtype is masters[key].native is F32
            assert sha256(values.tobytes()).hexdigest() == digest, key
            assert np.array_equal(narrow(values, stored[key].dtype), whole(stored[key])), key
        assert all(masters[key] is stored[key] for key in set(masters) - set(held))


@pytest.mark.parametrize("name", REAL)
def test_a_folder_made_of_masters_is_their_merge_in_fp32(name: str, tmp_path: Path) -> None:
    made = run(make_plan(opened(name), Recipe("hf")), tmp_path / "hf")
    found, held, parallel = load_file(made / "model.safetensors"), held_by(name), name != NEW
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    layers = len({key.split(".")[0] for key in held[0]}) - 3
    for key, first in held[0].items():
        number, inside = key.split(".", 1)
        both = first, held[1][key]
        if inside in ("attention.dense.bias", "mlp.dense_4h_to_h.bias", "mlp.linear2.bias"):
            merged = (both[0] + both[1]) / np.float32(1 if parallel else 2)
        elif "norm" in inside:
            merged = (both[0] + both[1]) / np.float32(2)
        else:
            across = inside in ("attention.dense.weight", "mlp.dense_4h_to_h.weight", "mlp.linear2.weight")
            merged = np.concatenate(both, axis=int(across))
        assert np.array_equal(found[unified(int(number), inside, layers)], merged), key


def unified(number: int, inside: str, layers: int) -> str:
    """The Hugging Face name of a layer's weight."""
    if 2 <= number < layers + 2:
        inside = inside.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
        return f"gpt_neox.layers.{number - 2}.{inside}"
    kind, _, last = inside.rpartition(".")
    return {
        "word_embeddings": "gpt_neox.embed_in.",
        "norm": "gpt_neox.final_layer_norm.",
        "final_linear": "embed_out.",
    }[kind] + last


@pytest.mark.parametrize(
    ("format", "norms"), [*((format, "mean") for format in FORMATS), ("hf", "fold"), ("slim", "rank0")]
)
def test_every_target_takes_masters(format: str, norms: str, tmp_path: Path) -> None:
    if format == "gguf":
        shutil.copytree(fixture(f"{OLD}/checkpoints"), tmp_path / "checkpoints")
        shutil.copy(fixture(f"{OLD}/tiny_tokenizer.json"), tmp_path)
    folder = tmp_path / "checkpoints" if format == "gguf" else fixture(f"{OLD}/checkpoints")
    source = open_checkpoint(folder, norms=norms, weights="master")
    recipe = Recipe(format, type={"bnb": "INT8", "float8": "E4M3"}.get(format))
    made = run(make_plan(source, recipe), tmp_path / "made")
    assert verify_bytes(made).passed
    report = verify_weights(source, open_checkpoint(made))
    assert report.passed, report.findings[:3]


def test_slim_of_masters_keeps_the_type_that_was_trained_in(tmp_path: Path) -> None:
    stored = open_checkpoint(fixture(f"{OLD}/checkpoints"))
    ours, theirs = (run(make_plan(c, Recipe("slim")), tmp_path / c.weights) for c in (opened(OLD), stored))
    for file in theirs.rglob("*.pt"):
        assert (ours / file.relative_to(theirs)).read_bytes() == file.read_bytes(), file.name
    made = run(make_plan(opened(OLD), Recipe("slim", dtype="BF16", tp=1)), tmp_path / "merged")
    report = verify_weights(opened(OLD), open_checkpoint(made))
    assert report.passed, report.findings[:3]


def test_plans_and_manifests_say_master_and_only_then(tmp_path: Path) -> None:
    plans = [make_plan(c, Recipe("hf")) for c in (opened(OLD), open_checkpoint(fixture(f"{OLD}/checkpoints")))]
    assert [plan.facts.get("weights") for plan in plans] == ["master", None]
    kinds = [json.loads((run(p, tmp_path / f"{i}") / "manifest.json").read_text()) for i, p in enumerate(plans)]
    assert [kind.get("weights") for kind in kinds] == ["master", None]
    assert sum("optim_states" in source["name"] for source in kinds[0]["sources"]) == 16


# --- what is wrong is named -----------------------------------------------------------------------------------------


def copied(name: str, folder: Path) -> Path:
    """A real checkpoint's `global_stepN`, which may be changed."""
    made = Path(shutil.copytree(fixture(f"{name}/checkpoints"), folder / "checkpoints"))
    for path in (made, *made.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return next(made.glob("global_step*"))


def plain(value: Any) -> Any:
    """A file's value with torch's tensors, and nothing for objects that are not loaded."""
    if isinstance(value, LazyTensor):
        return torch.from_numpy(whole(value))
    if isinstance(value, Placeholder):
        return None
    if isinstance(value, Size):
        return torch.Size(value)
    if isinstance(value, dict):
        return type(value)((key, plain(item)) for key, item in value.items())
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def edit(path: Path, change: Change) -> None:
    """Write an optimizer file anew with something else in it."""
    value = plain(read_pt(open_storage(path)).value)
    change(value.get("optimizer_state_dict", value))
    torch.save(value, path)


def shard(folder: Path, dp: int, mp: int) -> Path:
    return next(folder.glob(f"*zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"))


Plant = Callable[[Path], Any]  # damage to a `global_stepN`


def edited(dp: int, mp: int, change: Change) -> Plant:
    return lambda folder: edit(shard(folder, dp, mp), change)


def lost(*ranks: tuple[int, int]) -> Plant:
    return lambda folder: [shard(folder, *at).unlink() for at in ranks]


def swapped(one: tuple[int, int], other: tuple[int, int]) -> Plant:
    def swap(folder: Path) -> None:
        first, second = shard(folder, *one), shard(folder, *other)
        held = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(held)

    return swap


def put(*path: Any) -> Change:
    """A change that sets what the first keys lead to, to the last of them, or to what that makes of it."""
    *keys, last, value = path

    def change(state: Any) -> None:
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def reshaped(group: int, old: str, new: str | None, shape: tuple[int, ...]) -> Plant:
    """Another name and shape, or none, for one of the parameters of model-parallel rank 0."""

    def change(state: Any) -> None:
        items = state["param_shapes"][group].items()
        renamed = [(new, torch.Size(shape)) if name == old else (name, held) for name, held in items]
        state["param_shapes"][group] = OrderedDict((name, held) for name, held in renamed if name)

    return lambda folder: edit(folder / "mp_rank_00_model_states.pt", change)


def doubled(folder: Path) -> None:
    """The first stage's files in the place of the second's."""
    for dp in (0, 1):
        shutil.copy(shard(folder, dp, 0), shard(folder, dp, 2))
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_02_model_states.pt")


PARTS, ONES = "local_sub_partitions_of_fp32_groups", "single_partition_of_fp32_groups"
BIAS, DENSE = "2.mlp.linear2.bias", "2.attention.dense.weight"
FAULTS: dict[str, tuple[str, Plant, list[str]]] = {
    "a file is missing": (OLD, lost((1, 5)), ["zero_pp_rank_1_mp_rank_05_optim_states.pt: is missing"]),
    "a rank's files are missing": (
        OLD, lost((0, 7), (1, 7)),
        ["zero_pp_rank_0_mp_rank_07_optim_states.pt: is missing", "zero_pp_rank_1_mp_rank_07"],
    ),
    "a data-parallel rank is missing": (
        NEW, lost((1, 0), (1, 1), (1, 2), (1, 3)), ["bf16_zero_pp_rank_1_mp_rank_03_optim_states.pt: is missing"],
    ),
    "data-parallel ranks are swapped": (
        OLD, swapped((0, 2), (1, 2)),
        ["zero_pp_rank_0_mp_rank_02", "group 0: partition 4 of 6 holds 0 numbers, expected 9152"],
    ),
    "equal ones are swapped": (
        NEW, swapped((0, 0), (1, 0)), ["not their masters rounded", "bf16_zero_pp_rank_0_mp_rank_00"],
    ),
    "tensor-parallel ranks are swapped": (
        OLD, swapped((0, 0), (0, 1)),
        ["not their masters rounded", "layer_02-model_00-model_states.pt: 2.attention", "mp_rank_00"],
    ),
    "a file is of another step": (
        OLD, edited(1, 3, put(PARTS, 0, 1, lambda numbers: numbers * 1.01)),
        ["3 of 152 tensors", "zero_pp_rank_1_mp_rank_03", "rounded to F16: off by", "different steps"],
    ),
    "an interval is gone": (
        OLD, edited(0, 0, put(PARTS, 0, lambda group: group[:1])), ["num_comm_intervals_per_group says [2, 1]"],
    ),
    "a group is gone": (
        NEW, edited(1, 0, lambda state: state[ONES].pop()),
        ["bf16_zero_pp_rank_1_mp_rank_00", "its groups of intervals are not those of"],
    ),
    "a partition is short": (
        OLD, edited(0, 0, put(PARTS, 0, 0, lambda numbers: numbers[:-2])),
        ["zero_pp_rank_1_mp_rank_00", "partition 1 of 4 holds 15120 numbers, expected 15118"],
    ),
    "the last is short": (
        OLD, edited(0, 0, put(PARTS, 0, 1, lambda numbers: numbers[:-2])),
        ["zero_pp_rank_0_mp_rank_00", "partition 2 of 4 holds 10718 numbers, expected 10720"],
    ),
    "padding is not cut": (
        OLD, edited(1, 0, put(PARTS, 0, 1, torch.zeros(4400))), ["partition 3 of 4 holds 4400 numbers, expected 0"],
    ),
    "another rank has padding": (
        NEW, edited(0, 2, put("group_paddings", [2, 0])), ["group 0 has padding, which only the last rank has"],
    ),
    "the count is another": (
        OLD, edited(0, 4, put("partition_count", 1)),
        ["zero_pp_rank_0_mp_rank_04", "one of 1 data-parallel ranks, expected 2"],
    ),
    "the count is huge": (OLD, edited(0, 4, put("partition_count", 1 << 40)), ["not of one run"]),
    "the type is another": (
        OLD, edited(0, 1, put(PARTS, 1, 0, torch.Tensor.half)), ["group 1, interval 0 is F16 [304], expected a row"],
    ),
    "a partition is no tensor": (NEW, edited(0, 1, put(ONES, 1, None)), ["group 1, interval 0 is NoneType"]),
    "the groups are none": (OLD, edited(0, 1, put(PARTS, 7)), ["is not a list of groups of tensors"]),
    "it is no ZeRO-1": (OLD, edited(0, 1, lambda state: state.pop(PARTS)), ["holds neither"]),
    "one rank comes twice": (
        OLD, lambda at: shutil.copy(shard(at, 0, 1), at / "bf16_zero_pp_rank_0_mp_rank_1optim_states.pt"),
        ["bf16_zero_pp_rank_0_mp_rank_1optim_states.pt", "is of the same ranks as"],
    ),
    "the shapes are gone": (
        NEW, lambda at: (at / "mp_rank_02_model_states.pt").unlink(), ["mp_rank_02", "has no param_shapes"],
    ),
    "the shapes are of fewer groups": (
        NEW, lambda at: edit(at / "mp_rank_00_model_states.pt", put("param_shapes", lambda groups: [*groups, {}])),
        ["has 2 groups, param_shapes in mp_rank_00_model_states.pt has 3"],
    ),
    "a tensor is left out": (NEW, reshaped(1, BIAS, None, ()), ["group 1: 2 partitions of 532 numbers hold 1064, but"]),
    "a tensor has another name": (
        NEW, reshaped(1, BIAS, "2.new.bias", (56,)),
        ["2.new.bias is a master of no tensor", f"layer_02-model_00-model_states.pt: {BIAS} has no master"],
    ),
    "a tensor has another shape": (
        NEW, reshaped(0, DENSE, DENSE, (28, 56)), [f"the master of {DENSE} is F32 [28, 56], in layer_02-model_00"],
    ),
    "a stage comes twice": (
        NEW, doubled, ["0.word_embeddings.weight is in bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt already"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault: str, tmp_path: Path) -> None:
    name, plant, words = FAULTS[fault]
    folder = copied(name, tmp_path)
    plant(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, weights="master")
    message = str(caught.value)
    for word in (*words, "leave --weights master out"):
        assert word in message


def test_what_was_only_saved_again_is_read(tmp_path: Path) -> None:
    folder = copied(OLD, tmp_path)
    for path in folder.glob("*optim_states.pt"):
        edit(path, lambda state: None)
    open_checkpoint(folder, weights="master")


@pytest.mark.parametrize("weights", ["master", "best"])
def test_sources_without_masters_are_refused(weights: str, tmp_path: Path) -> None:
    for source in (toy(tmp_path), fixture(f"{OLD}/hf_official_converter")):
        with pytest.raises(PlanError, match="--weights"):
            open_checkpoint(source, weights=weights)


# --- layouts that no fixture has ------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint whose optimizer files a test writes itself."""
    return next(toy(tmp_path).glob("global_step*"))


def groups_of(folder: Path, rank: int, decay: bool) -> list[dict[str, torch.Tensor]]:
    """Masters for a rank's parameters: what is stored, off by less than is rounded away; in one group or in two."""
    parameters = {}
    for file in sorted(folder.glob(f"layer_*-model_{rank:02d}*")):
        for name, tensor in torch.load(file, weights_only=True).items():
            if "inv_freq" not in name:
                parameters[f"{int(file.name[6:8])}.{name}"] = tensor.float() * (1 + 1e-5)
    first = {name: t for name, t in parameters.items() if not (name.endswith("bias") or "norm" in name)}
    rest = {name: t for name, t in parameters.items() if name not in first}
    return [first, rest] if decay else [parameters]


def write_optimizer(
    folder: Path, ways: int, kind: str, *, decay: bool = True, most: int = 10**9, spare: int = 0
) -> None:
    """Optimizer files of a small checkpoint; kind: elastic, padded, whole.

    A partition has `most` numbers at most, and `spare` ones that it does not need.
    """
    for mp in (0, 1):
        groups = groups_of(folder, mp, decay)
        flats = [torch.cat([tensor.flatten() for tensor in group.values()]) for group in groups]
        sizes = [min(math.ceil(len(numbers) / ways) + spare, most) for numbers in flats]
        sizes = [size + size % 2 * (kind == "whole" and not spare) for size in sizes]
        cuts = [list(cut(numbers, ways, size)) for numbers, size in zip(flats, sizes, strict=True)]
        shapes: list[Any] = [{name: tensor.shape for name, tensor in group.items()} for group in groups]
        states = folder / f"mp_rank_{mp:02d}_model_states.pt"
        held = torch.load(states, weights_only=False) | {"dp_world_size": ways, "mp_world_size": 2}
        torch.save(held | ({"param_shapes": shapes} if kind == "whole" else {}), states)
        merged = dict(order(folder, mp, shapes))
        for dp in range(ways):
            mine = [[padded for padded, _ in parts[dp::ways]] for parts in cuts]
            lean = [[padded[:real] for padded, real in parts[dp::ways]] for parts in cuts]
            counts = {"partition_count": ways, "num_comm_intervals_per_group": [len(group) for group in mine]}
            state: dict[str, Any] = {"whole": {ONES: [parts[0] for parts in mine]}, "padded": {PARTS: mine},
                                     "elastic": {PARTS: lean, **counts}}[kind]  # fmt: skip
            value = {"optimizer_state_dict": state} | ({} if kind == "whole" else {"param_shapes": merged})
            torch.save(value, folder / f"zero_pp_rank_{dp}_mp_rank_{mp:02d}{'_' * (dp % 2)}optim_states.pt")


def order(folder: Path, mp: int, shapes: list[Any]) -> list[tuple[str, Any]]:
    """The shapes of all groups in the order of the layers."""
    known = {name: shape for group in shapes for name, shape in group.items()}
    return [(name, known[name]) for name in groups_of(folder, mp, decay=False)[0]]


def cut(numbers: torch.Tensor, ways: int, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The partitions of a group in order, with padding, and how many numbers of each are none."""
    for start in range(0, math.ceil(len(numbers) / size / ways) * size * ways, size):
        real = numbers[start : start + size]
        yield torch.cat([real, torch.full((size - len(real),), 7.0)]), len(real)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("ways", [1, 2, 12])
@pytest.mark.parametrize(("kind", "most"), [("elastic", 10**9), ("elastic", 1000), ("padded", 1000), ("whole", 10**9)])
def test_every_layout_is_put_together(kind: str, most: int, ways: int, decay: bool, small: Path) -> None:
    write_optimizer(small, ways, kind, decay=decay, most=most)
    index = open_checkpoint(small, weights="master").index
    for rank in (0, 1):
        for group in groups_of(small, rank, decay):
            for name, tensor in group.items():
                assert np.array_equal(whole(index.ranks[rank][name]), tensor.numpy()), name


def test_files_without_padding_must_have_none(small: Path) -> None:
    write_optimizer(small, 3, "padded", most=1000)
    for path in small.glob("*optim_states.pt"):
        edit(path, lambda state: state.update(partition_count=3))
    with pytest.raises(CheckpointError, match="group 0: partition"):
        open_checkpoint(small, weights="master")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("told", [None, 2, 0, 1, 4])
def test_padding_is_what_the_files_say(told: int | None, kept: bool, small: Path) -> None:
    write_optimizer(small, 2, "whole", decay=False, spare=1)
    for path in small.glob("*optim_states.pt"):
        last = "rank_1_mp" in path.name
        edit(path, put(ONES, 0, lambda numbers, less=2 * (last and not kept): numbers[: len(numbers) - less]))
        if told is not None:
            edit(path, put("group_paddings", [told * last]))
    if told in (None, 2):
        open_checkpoint(small, weights="master")
        return
    with pytest.raises(CheckpointError, match=r"group 0: .* but the parameters have"):
        open_checkpoint(small, weights="master")


JUNK = (
    None,
    -1,
    0,
    3,
    1 << 61,
    0.5,
    "x",
    True,
    [],
    {},
    (),
    [[]],
    [None],
    {"x": Size((1 << 40,))},
    Size(()),
    Size((0,)),
)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from spots(item)


@pytest.mark.parametrize("kind", ["elastic", "padded", "whole"])
def test_whatever_a_file_says_is_read_or_refused(kind: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_optimizer(small, 2, kind)
    index, random, outcomes = read_index(small, ()), np.random.default_rng(0), Counter[bool]()
    files = {path: read_pt(open_storage(path)) for path in small.glob("*optim_states.pt")}
    for _ in range(150):
        values = {path: copy_of(file.value) for path, file in files.items()}
        states = {rank: copy_of(state) for rank, state in index.states.items()}
        wanted = {key: state.get("param_shapes") for key, state in states.items()}
        places = [*spots(values), *spots(wanted), *spots(states)]
        for _ in range(random.integers(1, 3)):
            container, key = places[random.integers(len(places))]
            container[key] = copy_of(JUNK[random.integers(len(JUNK))])
        made = {path: replace(file, value=values[path]) for path, file in files.items()}
        monkeypatch.setattr("neoxconv.formats.neox.zero.files.read_pt", lambda storage, made=made: made[storage.path])
        try:
            with_masters(replace(index, states=states))
            outcomes[True] += 1
        except CheckpointError as error:
            assert str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 20, outcomes


def copy_of(value: Any) -> Any:
    """The value with containers of its own."""
    if isinstance(value, dict):
        return type(value)((key, copy_of(item)) for key, item in value.items())
    return list(map(copy_of, value)) if isinstance(value, list) else value


# --- bands, and all rows --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_ranges_of_pieces_are_ranges_of_the_whole(sizes: list[int], data: st.DataObject) -> None:
    numbers = np.arange(sum(sizes), dtype=np.float32)
    starts = np.cumsum([0, *sizes]).tolist()
    pieces = [
        (Path(str(i)), row_of(numbers[a : a + size])) for i, (a, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    made = flat.joined(pieces)
    if not len(numbers):
        return
    start = data.draw(st.integers(0, len(numbers) - 1))
    columns = data.draw(st.integers(1, 4))
    rows = data.draw(st.integers(0, (len(numbers) - start) // columns))
    if not rows:
        return
    master = flat.Master(made, start, (rows, columns))
    expected = numbers[start : start + rows * columns].reshape(rows, columns)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    assert np.array_equal(master.tensor.read(first, last), expected[first:last])
    seen = {row for a, b in master.borders for row in range(a, b)}
    inside = [a - start for a in starts if start < a < start + rows * columns]
    assert seen >= {0, rows - 1, *(a // columns for a in inside), *((a - 1) // columns for a in inside)}
    assert max(seen) < rows
    number = data.draw(st.integers(0, rows * columns - 1))
    owner = int(master.file_of(number).name)
    assert starts[owner] <= start + number < starts[owner + 1]


def row_of(numbers: Floats) -> LazyTensor:
    return LazyTensor(numbers.shape, F32, lambda a, b: numbers[a:b], F32)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_sizes_that_writers_make_fit_and_others_do_not(total: int, ways: int, intervals: int) -> None:
    full = math.ceil(total / ways / intervals)
    whole_sizes = [full] * ways * intervals
    lean = [min(full, max(0, total - i * full)) for i in range(len(whole_sizes))]
    anything = range(total + full * len(whole_sizes))
    assert flat.misfit(lean, total, Padding.CUT, anything) is None
    assert flat.misfit(whole_sizes, total, Padding.KEPT, anything) is None
    assert flat.misfit(lean, total + 1, Padding.UNKNOWN, ()) is not None or sum(lean) < sum(whole_sizes) == total + 1
    for i in range(len(lean)):
        for change in (-1, 1):
            wrong = [size + change * (i == j) for j, size in enumerate(lean)]
            assert min(wrong) < 0 or flat.misfit(wrong, total, Padding.CUT, anything) is not None


def test_a_band_reads_its_own_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = opened(OLD).index.ranks
    embedding = ranks[0]["0.word_embeddings.weight"]  # 256 rows of 64; the first partition ends within row 236
    read: list[tuple[str, int]] = []
    real = Storage.read

    def counted(file: Storage, offset: int, length: int, ahead: int = 0) -> Any:
        read.append((file.name, length))
        return real(file, offset, length, ahead)

    monkeypatch.setattr(Storage, "read", counted)
    embedding.read(100, 102)
    embedding.read(236, 237)
    name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    assert read == [(name.format(0), 512), (name.format(0), 64), (name.format(1), 192)]


def middle(state: dict[str, Any]) -> None:
    state[PARTS][0][0][6400] += 1  # row 100 of the embedding


def test_a_check_finds_one_master_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(OLD, tmp_path)
    edit(shard(folder, 0, 0), middle)
    checkpoint, done = open_checkpoint(folder, weights="master"), list[int]()
    found = check(checkpoint, progress=done.append)
    (damage,) = found.damage
    assert damage.tensors == ("gpt_neox.embed_in.weight (0.word_embeddings.weight of rank 0)",)
    assert "1 of 16384 numbers are not their masters as F16, the first in row 100, off by 1 at most" in str(damage)
    assert damage.file.name == "layer_00-model_00-model_states.pt"
    assert sum(done) == work(checkpoint) and found.masters == 152
    assert main(["inspect", str(folder), "--weights", "master", "--check"]) == 3
    assert "gpt_neox.embed_in.weight" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "hf"), "--to", "hf", "--weights", "master", "--check"]) == 1
    assert "gpt_neox.embed_in.weight" in capsys.readouterr().err


@pytest.mark.parametrize("name", REAL)
def test_a_check_of_what_is_whole_passes(name: str) -> None:
    found = check(opened(name))
    assert not found.damage and found.masters == sum(map(len, oracle(name)))
    assert f"{found.masters} tensors equal to the masters rounded" in found.verdict


# --- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands_take_masters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(fixture(f"{OLD}/checkpoints")), str(tmp_path / "hf")
    assert main(["inspect", source, "--weights", "master", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["source"]["weights"] == "master" and {group["dtype"] for group in facts["groups"]} == {"F32"}
    assert main(["inspect", source, "--weights", "MASTER"]) == 0
    assert "master: the optimizer's fp32" in capsys.readouterr().out
    assert main(["convert", source, target, "--to", "hf", "--weights", "master"]) == 0
    assert "master: the optimizer's fp32" in capsys.readouterr().err
    assert main(["verify", source, target]) == 0
    assert "master (from the manifest)" in capsys.readouterr().out
    assert main(["verify", source, target, "--weights", "stored"]) == 3
    assert main(["convert", target, str(tmp_path / "x"), "--to", "safetensors", "--weights", "master"]) == 1
    assert "is no gpt-neox checkpoint" in capsys.readouterr().err

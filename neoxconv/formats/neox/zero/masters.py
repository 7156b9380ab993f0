"""Partitions put together again: each parameter a range of its group, compared with what the layer files have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neoxconv.core.model import Index
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import FLOATS, narrow, widen
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.formats.neox.folder import SEQUENTIAL, home, states_file
from neoxconv.formats.neox.zero.files import ADVICE, Shard, collected, counts_in, extent, find_files, read_shard
from neoxconv.formats.neox.zero.flat import Master, Padding, joined, misfit
from neoxconv.storage import Place

_BUFFERS = ("inv_freq", "_extra_state")  # endings of names that no optimizer has

_Shapes = Mapping[str, tuple[int, ...]]
Masters = Mapping[str, Master]  # by `N.name`


def with_masters(index: Index) -> Index:
    """The index with every parameter made of the optimizer files' fp32 masters; `stored` has what they replace.

    Buffers stay as they are stored. Of every parameter the first rows, the last ones and those where partitions meet
    were compared: rounded, they are what is stored. Raises CheckpointError where files or numbers are missing, or are
    not of these weights; PlanError where there are no optimizer files.
    """
    paths = find_files(index)
    shards = collected(lambda at: read_shard(paths[at]), paths)
    model_ranks, data_ranks = extent(index, shards)
    found = collected(
        lambda mp: _masters_of(index, mp, [shards[mp, dp] for dp in range(data_ranks)]), range(model_ranks)
    )
    degree = len(index.ranks)  # model-parallel rank = stage * degree + tensor-parallel rank
    masters = [_across_stages([found[mp] for mp in range(rank, model_ranks, degree)]) for rank in range(degree)]
    raise_all(CheckpointError, (problem for rank in range(degree) for problem in _unpaired(index, rank, masters[rank])))
    _prove(index, masters)
    made = [
        {name: masters[rank][name].tensor if name in masters[rank] else tensor for name, tensor in stored.items()}
        for rank, stored in enumerate(index.ranks)
    ]
    files = index.files + tuple(shard.source for shard in shards.values())
    return replace(index, files=files, ranks=tuple(made), replaced=index.ranks, set_aside=())


def _masters_of(index: Index, mp: int, shards: Sequence[Shard]) -> list[tuple[str, Master]]:
    """The masters of a model-parallel rank; raises CheckpointError unless its partitions hold what is asked for."""
    first = shards[0]
    for what, value in (("groups of intervals", "intervals"), ("param_shapes", "shapes")):
        odd = (shard for shard in shards if getattr(shard, value) != getattr(first, value))
        raise_all(CheckpointError, (f"{s.path}: its {what} are not those of {first.path.name}; {ADVICE}." for s in odd))
    masters = []
    for number, group in enumerate(_grouped(index, mp, first)):
        pieces = [(shard.path, shard.groups[number][i]) for i in range(first.intervals[number]) for shard in shards]
        total = sum(map(math.prod, group.values()))
        admitted = _admitted_padding(number, shards, pieces[0][1].rows)
        problem = misfit([piece.rows for _, piece in pieces], total, first.padding, admitted)
        if problem:
            raise CheckpointError(f"{pieces[problem.piece][0]}: group {number}: {problem.what}; {ADVICE}.")
        flat, start = joined(pieces), 0
        for name, shape in group.items():
            masters.append((name.removeprefix(SEQUENTIAL), Master(flat, start, shape)))
            start += math.prod(shape)
    return masters


def _admitted_padding(number: int, shards: Sequence[Shard], full: int) -> range:
    """How many numbers of padding a group may have, the first of its partitions having `full` numbers.

    Raises CheckpointError where another data-parallel rank than the last says that it has some.
    """
    *others, last = shards
    if wrong := next((shard for shard in others if shard.padded and shard.padded[number]), None):
        raise CheckpointError(f"{wrong.path}: group {number} has padding, which only the last rank has; {ADVICE}.")
    if last.padded:
        return range(last.padded[number], last.padded[number] + 1)
    if last.padding is Padding.UNKNOWN:  # DeepSpeed's: each partition is a multiple of two numbers
        return range(2 * len(shards))
    return range(full * len(shards))  # DeeperSpeed's: the last interval may be nearly all padding


def _grouped(index: Index, mp: int, shard: Shard) -> list[_Shapes]:
    """The parameters of each of a file's groups, in their order; raises CheckpointError where no list says them.

    Where one list has those of two groups, the first are those with weight decay, the others norms and biases.
    """
    path, groups = param_shapes(index, mp, shard)
    if len(groups) == 1 and len(shard.groups) == 2:
        decayed = {name: shape for name, shape in groups[0].items() if not _spared(name)}
        others = {name: shape for name, shape in groups[0].items() if _spared(name)}
        groups = [decayed, others]
    if len(groups) != len(shard.groups):
        found = f"{len(shard.groups)} groups, param_shapes in {path.name} has {len(groups)}"
        raise CheckpointError(f"{shard.path}: has {found}; {ADVICE}.")
    return groups


def param_shapes(index: Index, mp: int, shard: Shard) -> tuple[Place, list[_Shapes]]:
    """The lists of parameters in an optimizer file, or else in the mp_rank file, and the path of that file.

    Raises CheckpointError where there are none, or something else stands there.
    """
    path, shapes = shard.path, shard.shapes
    if shapes is None:
        state = index.states.get(mp)
        path = index.folder / states_file(mp)
        shapes = state.get("param_shapes") if isinstance(state, dict) else None
    groups = shapes if isinstance(shapes, list) else [shapes]
    if not groups or not all(isinstance(group, dict) and all(map(_is_shape, group.items())) for group in groups):
        raise CheckpointError(f"{path}: has no param_shapes, which say what the masters are; {ADVICE}.")
    return path, groups


def _is_shape(item: tuple[Any, Any]) -> bool:
    """Whether a name and the shape of a tensor."""
    name, shape = item
    return isinstance(name, str) and isinstance(shape, tuple) and len(counts_in(shape)) == len(shape) and 0 not in shape


def _spared(name: str) -> bool:
    """Whether gpt-neox gives a parameter no weight decay: biases, and all of a norm's.

    Source: gpt-neox's megatron/model/utils.py, get_params_for_weight_decay_optimization.
    """
    *modules, last = name.split(".")
    return last == "bias" or bool(modules and "norm" in modules[-1])


def _across_stages(stages: Sequence[list[tuple[str, Master]]]) -> Masters:
    """The masters of one tensor-parallel rank; raises CheckpointError where two are of one parameter."""
    masters: dict[str, Master] = {}
    twice = []
    for name, master in (pair for stage in stages for pair in stage):
        if master is not masters.setdefault(name, master):
            twice.append(f"{master.file_of(0)}: {name} is in {masters[name].file_of(0).name} already; {ADVICE}.")
    raise_all(CheckpointError, twice)
    return masters


def _unpaired(index: Index, rank: int, masters: Masters) -> Iterator[str]:
    """Parameters of a rank without a master, masters of none, and those that differ in shape."""
    stored = index.ranks[rank]
    for name, master in masters.items():
        if name not in stored:
            yield f"{master.file_of(0)}: {name} is a master of no tensor in {index.folder}; {ADVICE}."
        elif master.shape != stored[name].shape or stored[name].dtype.name not in FLOATS:
            found = f"{stored[name].dtype.name} {list(stored[name].shape)}"
            yield (
                f"{master.file_of(0)}: the master of {name} is F32 {list(master.shape)}, "
                f"in {home(index, rank, name).name} it is {found}; {ADVICE}."
            )
    for name in stored:
        if name not in masters and not name.endswith(_BUFFERS):
            yield (
                f"{home(index, rank, name)}: {name} has no master in any optimizer file (was it frozen in training?); "
                "leave --weights master out."
            )


@dataclass(frozen=True)
class Difference:
    """What of a tensor is not its master rounded."""

    count: int = 0  # numbers
    largest: float = 0.0  # how far one is off at most; infinite where one of the two is no finite number
    first: int = 0  # the position of the first, row by row


def difference(master: LazyTensor, stored: LazyTensor, bands: Iterable[tuple[int, int]]) -> Difference:
    """What differs in some bands of rows, rows that are in two of them counted twice.

    Raises CheckpointError where a file cannot be read.
    """
    found = Difference()
    for start, stop in bands:
        rounded = widen(narrow(master.floats(start, stop), stored.dtype), stored.dtype)
        held = stored.floats(start, stop)
        both_nan = np.isnan(rounded) & np.isnan(held)
        wrong = (rounded != held) & ~both_nan
        if not wrong.any():
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.nan_to_num(np.abs(rounded - held)[wrong], nan=np.inf, posinf=np.inf).max()
        first = found.first if found.count else start * master.columns + int(np.flatnonzero(wrong)[0])
        found = Difference(found.count + int(wrong.sum()), max(found.largest, float(far)), first)
    return found


def _prove(index: Index, masters: Sequence[Masters]) -> None:
    """Raise CheckpointError, with a list of the tensors, where a master is not what is stored, only more precise."""
    problems, largest = [], 0.0
    for rank, of_rank in enumerate(masters):
        for name, master in of_rank.items():
            stored = index.ranks[rank][name]
            found = difference(master.tensor, stored, master.borders)
            if found.count:
                largest = max(largest, found.largest)
                file, row = master.file_of(found.first).name, found.first // stored.columns
                problems.append(
                    f"{home(index, rank, name)}: {name} is not its master in {file} rounded to {stored.dtype.name}: "
                    f"off by {found.largest:.3g}, first in row {row}."
                )
    if problems:
        count = sum(map(len, masters))
        told = (
            f"{index.folder}: {len(problems)} of {count} tensors are not their masters rounded, off by {largest:.3g} "
            "at most: files of different steps, or damaged. Download them again, or leave --weights master out."
        )
        raise_all(CheckpointError, [told, *problems])

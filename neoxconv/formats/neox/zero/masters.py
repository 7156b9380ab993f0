"""Partitions put together again: each parameter a range of its group, held against what the layer files have."""

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
from neoxconv.formats.neox.zero.files import ADVICE, Shard, collected, extent, find_files, naturals, read_shard
from neoxconv.formats.neox.zero.flat import Master, joined, misfit

BUFFERS = "inv_freq"  # the ending of names that no optimizer has

Shapes = Mapping[str, tuple[int, ...]]
Masters = Mapping[str, Master]  # by `N.name`


def with_masters(index: Index) -> Index:
    """The index with every parameter made of the optimizer files' fp32 masters; `stored` has what they replace.

    Buffers stay as they are stored. Of every parameter the first rows, the last ones and those where partitions meet
    were compared: rounded, they are what is stored. Raises CheckpointError; PlanError where there are no such files.
    """
    paths = find_files(index)
    shards = collected(lambda at: read_shard(paths[at]), paths)
    ranks, ways = extent(index, shards)
    found = collected(lambda mp: masters_of(index, mp, [shards[mp, dp] for dp in range(ways)]), range(ranks))
    degree = len(index.ranks)
    masters = [across_stages([found[mp] for mp in range(rank, ranks, degree)]) for rank in range(degree)]
    raise_all(CheckpointError, (problem for rank in range(degree) for problem in unpaired(index, rank, masters[rank])))
    prove(index, masters)
    made = [
        {name: masters[rank][name].tensor if name in masters[rank] else tensor for name, tensor in stored.items()}
        for rank, stored in enumerate(index.ranks)
    ]
    files = index.files + tuple(shard.source for shard in shards.values())
    return replace(index, files=files, ranks=tuple(made), replaced=index.ranks, set_aside=())


def masters_of(index: Index, mp: int, shards: Sequence[Shard]) -> list[tuple[str, Master]]:
    """The masters of a model-parallel rank; raises CheckpointError unless its partitions hold what is asked for."""
    first = shards[0]
    for what, value in (("groups of intervals", "intervals"), ("param_shapes", "shapes")):
        odd = (shard for shard in shards if getattr(shard, value) != getattr(first, value))
        raise_all(CheckpointError, (f"{s.path}: its {what} are not those of {first.path.name}; {ADVICE}." for s in odd))
    masters = []
    for number, group in enumerate(grouped(index, mp, first)):
        pieces = [(shard.path, shard.groups[number][i]) for i in range(first.intervals[number]) for shard in shards]
        total = sum(map(math.prod, group.values()))
        padding = admitted(number, shards, pieces[0][1].rows)
        problem = misfit([piece.rows for _, piece in pieces], total, padding, first.cut)
        if problem:
            raise CheckpointError(f"{pieces[problem.piece][0]}: group {number}: {problem.what}; {ADVICE}.")
        flat, start = joined(pieces), 0
        for name, shape in group.items():
            masters.append((name.removeprefix(SEQUENTIAL), Master(flat, start, shape)))
            start += math.prod(shape)
    return masters


def admitted(number: int, shards: Sequence[Shard], full: int) -> range:
    """How much padding a group may have, the first of its partitions having `full` numbers.

    DeeperSpeed's last interval may be nearly all padding; DeepSpeed's partitions are multiples of two numbers.
    """
    *others, last = shards
    if wrong := next((shard for shard in others if shard.paddings and shard.paddings[number]), None):
        raise CheckpointError(f"{wrong.path}: group {number} has padding, which only the last rank has; {ADVICE}.")
    if last.paddings:
        return range(last.paddings[number], last.paddings[number] + 1)
    return range((2 if last.cut is None else full) * len(shards))


def grouped(index: Index, mp: int, shard: Shard) -> list[Shapes]:
    """The parameters of each of a file's groups, in their order.

    Where one list has those of two groups, the first are those with weight decay, the others norms and biases.
    """
    path, shapes = shard.path, shard.shapes
    if shapes is None:
        state = index.states.get(mp)
        path, shapes = index.folder / states_file(mp), state.get("param_shapes") if isinstance(state, dict) else None
    groups = shapes if isinstance(shapes, list) else [shapes]
    if not groups or not all(isinstance(group, dict) and all(map(is_shape, group.items())) for group in groups):
        raise CheckpointError(f"{path}: has no param_shapes, which say what the masters are; {ADVICE}.")
    if len(groups) == 1 and len(shard.groups) == 2:
        decayed = {name: shape for name, shape in groups[0].items() if not spared(name)}
        groups = [decayed, {name: shape for name, shape in groups[0].items() if name not in decayed}]
    if len(groups) != len(shard.groups):
        found = f"{len(shard.groups)} groups, param_shapes in {path.name} has {len(groups)}"
        raise CheckpointError(f"{shard.path}: has {found}; {ADVICE}.")
    return groups


def is_shape(item: tuple[Any, Any]) -> bool:
    """Whether a name and the shape of a tensor."""
    name, shape = item
    return isinstance(name, str) and isinstance(shape, tuple) and len(naturals(shape)) == len(shape) and 0 not in shape


def spared(name: str) -> bool:
    """Whether gpt-neox lets a parameter's weight not decay: biases, and all of a norm's."""
    *modules, last = name.split(".")
    return last == "bias" or bool(modules and "norm" in modules[-1])


def across_stages(stages: Sequence[list[tuple[str, Master]]]) -> Masters:
    """The masters of one tensor-parallel rank; raises CheckpointError where two are of one parameter."""
    masters: dict[str, Master] = {}
    twice = []
    for name, master in (pair for stage in stages for pair in stage):
        if master is not masters.setdefault(name, master):
            twice.append(f"{master.file_of(0)}: {name} is in {masters[name].file_of(0).name} already; {ADVICE}.")
    raise_all(CheckpointError, twice)
    return masters


def unpaired(index: Index, rank: int, masters: Masters) -> Iterator[str]:
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
        if name not in masters and not name.endswith(BUFFERS):
            yield (
                f"{home(index, rank, name)}: {name} has no master in any optimizer file (was it frozen in training?); "
                "leave --weights master out."
            )


@dataclass(frozen=True)
class Difference:
    """How many numbers of a tensor are not their masters rounded, how far they are off at most, and the first one."""

    count: int = 0
    largest: float = 0.0
    first: int = 0


def difference(master: LazyTensor, stored: LazyTensor, bands: Iterable[tuple[int, int]]) -> Difference:
    """What differs in some bands of rows; bands that overlap count twice."""
    found = Difference()
    for start, stop in bands:
        rounded = widen(narrow(master.floats(start, stop), stored.dtype), stored.dtype)
        held = stored.floats(start, stop)
        wrong = (rounded != held) & ~(np.isnan(rounded) & np.isnan(held))
        if not wrong.any():
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.nan_to_num(np.abs(rounded - held)[wrong], nan=np.inf, posinf=np.inf).max()
        first = found.first if found.count else start * master.columns + int(np.flatnonzero(wrong)[0])
        found = Difference(found.count + int(wrong.sum()), max(found.largest, float(far)), first)
    return found


def prove(index: Index, masters: Sequence[Masters]) -> None:
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

"""The optimizer files one by one: which there are, and what each says of its partitions.

{"optimizer_state_dict": {INTERVALS or WHOLE: numbers, "partition_count", "num_comm_intervals_per_group",
                          "group_paddings"}, "param_shapes"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32
from neoxconv.errors import CheckpointError, PlanError, raise_all
from neoxconv.formats.neox.folder import OPTIMIZER
from neoxconv.formats.neox.zero.flat import Padding
from neoxconv.formats.pt import read_pt
from neoxconv.storage import Place, open_storage

_INTERVALS, _WHOLE = "local_sub_partitions_of_fp32_groups", "single_partition_of_fp32_groups"
_MOST = 64  # files expected for each one found, beyond which the expectation is wrong
ADVICE = "download it again, or leave --weights master out"

_At = tuple[int, int]  # model-parallel rank (stage * TP + tensor-parallel rank), data-parallel rank
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Shard:
    """An optimizer file: one rank's numbers by group and interval, and what it says of them."""

    source: SourceFile
    groups: tuple[tuple[LazyTensor, ...], ...]  # [numbers] of F32 each
    counts: tuple[int, ...]  # data-parallel ranks, for all groups or for each; empty where it does not say
    padded: tuple[int, ...]  # numbers that belong to no parameter, for each group; empty where it does not say
    padding: Padding
    shapes: Any  # param_shapes, not judged yet; None in newer checkpoints

    @property
    def path(self) -> Place:
        return self.source.storage.path

    @property
    def intervals(self) -> list[int]:
        """How many intervals each group has."""
        return [len(group) for group in self.groups]


def collected(make: Callable[[Key], Value], keys: Iterable[Key]) -> dict[Key, Value]:
    """What `make` makes of every key; raises CheckpointError with the problems of all."""
    made: dict[Key, Value] = {}
    problems: list[str] = []
    for key in keys:
        try:
            made[key] = make(key)
        except CheckpointError as error:
            problems += error.args
    raise_all(CheckpointError, problems)
    return made


def find_files(index: Index) -> dict[_At, Place]:
    """The optimizer files by their ranks, which are numbers: 10 comes after 9.

    Raises PlanError where the source has none, CheckpointError where two are of the same ranks.
    """
    if index.format != "neox":
        raise PlanError(f"{index.where}: is no gpt-neox checkpoint, so it has no masters; leave --weights master out.")
    matches = [match for name in index.set_aside if (match := OPTIMIZER.fullmatch(name))]
    if not matches:
        raise PlanError(
            f"{index.folder}: has no *zero_pp_rank_D_mp_rank_MM_optim_states.pt files, which hold the masters; "
            "download them too, or leave --weights master out."
        )
    found = sorted(((int(match["mp"]), int(match["dp"])), match[0]) for match in matches)
    names = dict(found)
    twice = (
        f"{index.folder / name}: is of the same ranks as {names[at]}; move one away, or leave --weights master out."
        for at, name in found
        if names[at] != name
    )
    raise_all(CheckpointError, twice)
    return {at: index.folder / name for at, name in names.items()}


def read_shard(path: Place) -> Shard:
    """Index an optimizer file; raises CheckpointError where it is not of ZeRO stage 1 as it is known here."""
    storage = open_storage(path)
    file = read_pt(storage)
    value = _as_dict(file.value)
    state = _as_dict(value.get("optimizer_state_dict"))
    key = next((key for key in (_INTERVALS, _WHOLE) if key in state), None)
    if key is None:
        raise CheckpointError(
            f"{path}: holds neither {_INTERVALS} nor {_WHOLE}; other optimizers' masters cannot be read, "
            "leave --weights master out."
        )
    groups = partitions(path, state[key], key)
    if key == _INTERVALS:
        _check_intervals(path, groups, state.get("num_comm_intervals_per_group"))
    count, padded = state.get("partition_count"), counts_in(state.get("group_paddings"))
    return Shard(
        source=SourceFile(storage, file.checksum),
        groups=groups,
        counts=counts_in(count if isinstance(count, list) else [count]),
        padded=padded if len(padded) == len(groups) else (),
        padding=_padding_by(key, counted=count is not None),
        shapes=value.get("param_shapes"),
    )


def _as_dict(value: Any) -> dict[Any, Any]:
    """A dictionary as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def partitions(path: Place, value: Any, key: str) -> tuple[tuple[LazyTensor, ...], ...]:
    """The tensors of a value by group and interval; raises CheckpointError where one is no row of float32."""
    groups = [group if key == _INTERVALS else [group] for group in value] if isinstance(value, list) else []
    if not groups or not all(isinstance(group, list) and group for group in groups):
        raise CheckpointError(f"{path}: {key} is not a list of groups of tensors; {ADVICE}.")
    raise_all(CheckpointError, _misshapen(path, groups))
    return tuple(map(tuple, groups))


def _misshapen(path: Place, groups: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Partitions that are no rows of float32."""
    for number, group in enumerate(groups):
        for interval, tensor in enumerate(group):
            lazy = isinstance(tensor, LazyTensor)
            found = f"{tensor.dtype.name} {list(tensor.shape)}" if lazy else type(tensor).__name__
            if not lazy or tensor.dtype is not F32 or len(tensor.shape) != 1:
                yield f"{path}: group {number}, interval {interval} is {found}, expected a row of F32; {ADVICE}."


def _check_intervals(path: Place, groups: Sequence[Sequence[LazyTensor]], said: Any) -> None:
    """Raise CheckpointError where the groups have other numbers of intervals than the file says, if it says any."""
    found = [len(group) for group in groups]
    if said is not None and said != found:
        raise CheckpointError(
            f"{path}: its groups have {found} intervals, num_comm_intervals_per_group says {said!r:.80}; {ADVICE}."
        )


def _padding_by(key: str, counted: bool) -> Padding:
    """What the writer of masters under `key` does with padding; `counted`: the file has a partition_count.

    DeeperSpeed writes that count into elastic checkpoints, of which it cuts the padding off. DeepSpeed's fp16 optimizer
    cuts it off and its bf16 one keeps it.
    """
    if key == _WHOLE:
        return Padding.UNKNOWN
    return Padding.CUT if counted else Padding.KEPT


def counts_in(values: Any) -> tuple[int, ...]:
    """A list of counts; empty for anything else."""
    fine = isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)
    return tuple(values) if fine else ()


def extent(index: Index, shards: Mapping[_At, Shard]) -> tuple[int, int]:
    """How many model-parallel and data-parallel ranks there are; raises CheckpointError unless each has its file."""
    counts = {at: shard.counts or _said_by_states(index, "dp_world_size") for at, shard in shards.items()}
    model_ranks = max([*_said_by_states(index, "mp_world_size"), *(1 + mp for mp, _ in shards), len(index.ranks)])
    data_ranks = max([*(count for some in counts.values() for count in some), *(1 + dp for _, dp in shards)])
    if model_ranks * data_ranks > _MOST * len(shards) or model_ranks % len(index.ranks):
        raise CheckpointError(
            f"{index.folder}: has {len(shards)} optimizer files, which speak of {model_ranks} model-parallel and "
            f"{data_ranks} data-parallel ranks; tensor parallelism is {len(index.ranks)}. They are not of one run; "
            f"{ADVICE}."
        )
    match = OPTIMIZER.fullmatch(next(iter(shards.values())).path.name)
    prefix = match["prefix"] if match else ""
    problems = [
        f"{index.folder}/{prefix}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt: is missing; {ADVICE}."
        for mp in range(model_ranks)
        for dp in range(data_ranks)
        if (mp, dp) not in shards
    ]
    problems += [
        f"{shards[at].path}: is one of {' or '.join(map(str, sorted(set(some))))} data-parallel ranks, "
        f"expected {data_ranks}; {ADVICE}."
        for at, some in counts.items()
        if set(some) - {data_ranks}
    ]
    raise_all(CheckpointError, problems)
    return model_ranks, data_ranks


def _said_by_states(index: Index, key: str) -> tuple[int, ...]:
    """What the mp_rank files say of a count."""
    values = [state.get(key) for state in index.states.values() if isinstance(state, Mapping)]
    return counts_in([value for value in values if type(value) is int])

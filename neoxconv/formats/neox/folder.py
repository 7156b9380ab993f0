"""gpt-neox checkpoints as DeepSpeed writes them: pipeline layer files, or sequential mp_rank files.

    SAVE/latest                                     the tag
    SAVE/global_stepN/layer_02-model_01-model_states.pt     weights of layer 2, tensor-parallel rank 1
    SAVE/global_stepN/mp_rank_05_model_states.pt            bookkeeping; in a sequential run also the weights
    SAVE/global_stepN/*zero_pp_rank_3_mp_rank_05_optim_states.pt    optimizer states: see zero/
    SAVE/global_stepN/configs/*.yml                         the training configuration

Which kind it is shows in the files, never in the YAML. Every weight is named `N.name`, N the layer index (numbers.py).
Source: DeepSpeed's deepspeed/runtime/engine.py and deepspeed/runtime/pipe/module.py.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv.core.layout import Entry
from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError, raise_all
from neoxconv.formats.neox.yaml_settings import read_configs
from neoxconv.formats.pt import read_pt
from neoxconv.storage import Place, is_folder, open_storage, together

# The names of files; PARTS are those that stand for the whole folder when one of them is given.
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?P<prefix>.*)zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
PARTS = (re.compile("latest"), _LAYER, STATES, OPTIMIZER)
_MODULE, SEQUENTIAL = "module.", "sequential."  # what stands before a weight's name in an mp_rank file
_MAX_TAG = 4096  # bytes


def tag_folder(path: Place) -> Place | None:
    """The `global_stepN` that `path` means: itself, the one named by `latest`, or the only one; else None.

    Raises CheckpointError where `latest` names no folder beside it, or there are several and no `latest`.
    """
    if _is_checkpoint(path):
        return path
    latest = path / "latest"
    if latest.is_file():
        file = open_storage(latest)
        tag = file.text(0, min(file.size, _MAX_TAG)).decode("utf-8", "replace").strip()
        is_name = bool(tag) and "/" not in tag and tag not in (".", "..")
        if not is_name or not is_folder(path / tag):
            raise CheckpointError(
                f"{latest}: names {tag!r:.80}, which is not a folder beside it; give the global_stepN folder itself."
            )
        return path / tag
    steps = sorted(p for p in path.glob("global_step*") if p.is_dir() and _is_checkpoint(p))
    if len(steps) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(p.name for p in steps)} and no `latest`; give one of them.")
    return steps[0] if steps else None


def _is_checkpoint(folder: Place) -> bool:
    """Whether `folder` itself (a `global_stepN`) holds files with weights of gpt-neox."""
    return any(_LAYER.fullmatch(p.name) or STATES.fullmatch(p.name) for p in folder.iterdir())


def is_ours(folder: Place) -> bool:
    """Whether weights in a `global_stepN` have gpt-neox's names: in layer files, or else in the first mp_rank file.

    Raises CheckpointError where that file is damaged.
    """
    names = sorted(p.name for p in folder.iterdir())
    if any(_LAYER.fullmatch(name) for name in names):
        return True
    states = [name for name in names if STATES.fullmatch(name)]
    return bool(states) and is_numbered(module_of(read_pt(open_storage(folder / states[0])).value))


def module_of(state: Any) -> Any:
    """The weights in an mp_rank file's value; None where it has none."""
    return (state.get("module") if isinstance(state, dict) else None) or None


def is_numbered(module: Any) -> bool:
    """Whether names in an mp_rank file tell layers by number, as those of gpt-neox do."""
    return isinstance(module, dict) and any(re.match(r"(sequential\.)?\d", str(name)) for name in module)


def index(folder: Place, config: Sequence[Place] = ()) -> Index:
    """Index the checkpoint in `folder` (a `global_stepN`), reading zip directories and pickles only.

    `config` are YAML files instead of those beside the weights. Raises CheckpointError where files are missing, damaged
    or there twice.
    """
    names = sorted(p.name for p in folder.iterdir())
    layers = {(layer, rank): name for (layer, rank), name in _by_numbers(folder, names, _LAYER).items()}
    states = {rank: name for (rank,), name in _by_numbers(folder, names, STATES).items()}
    if not layers and not states:
        raise CheckpointError(
            f"{folder}: holds neither layer_NN-model_MM-model_states.pt nor mp_rank_MM_model_states.pt files; "
            "give the folder that does."
        )
    wanted = [*layers.values(), *states.values()]
    storages = together(lambda name: open_storage(folder / name), wanted, folder)
    files = dict(zip(wanted, together(read_pt, storages, folder), strict=True))
    configs = tuple(config) or _find_configs(folder)
    ranks = _pipeline_ranks(folder, layers, files) if layers else _sequential_ranks(folder, states, files)
    return Index(
        format="neox",
        folder=folder,
        files=tuple(SourceFile(file, files[file.name].checksum) for file in storages),
        ranks=ranks,
        settings=read_configs(configs),
        states={rank: files[name].value for rank, name in states.items()},
        sequential=not layers,
        ordered=bool(layers) and isinstance(next(iter(files.values())).value, OrderedDict),
        configs=configs,
        set_aside=tuple(name for name in names if OPTIMIZER.fullmatch(name)),
    )


def _by_numbers(folder: Place, names: Sequence[str], pattern: re.Pattern[str]) -> dict[tuple[int, ...], str]:
    """The file names that match, by the numbers in them and in their order.

    Raises CheckpointError where two have the same numbers: one of them spells them with more zeros.
    """
    found = sorted((tuple(map(int, m.groups())), name) for name in names if (m := pattern.fullmatch(name)))
    files = dict(found)
    twice = (
        f"{folder / name}: has the same numbers as {files[numbers]}; remove one of them."
        for numbers, name in found
        if files[numbers] != name
    )
    raise_all(CheckpointError, twice)
    return files


def _pipeline_ranks(
    folder: Place, layers: dict[tuple[int, int], str], files: dict[str, Any]
) -> tuple[dict[str, LazyTensor], ...]:
    """Each rank's tensors from its layer files, in the order of the layers; `layers` are names by layer and rank.

    Raises CheckpointError where a file is missing.
    """
    numbers, degree = sorted({layer for layer, _ in layers}), 1 + max(rank for _, rank in layers)
    if degree > len(layers):
        raise CheckpointError(
            f"{folder}: holds files of rank {degree - 1} but only {len(layers)} files of layers; remove the strays."
        )
    missing = [(layer, rank) for layer in numbers for rank in range(degree) if (layer, rank) not in layers]
    raise_all(CheckpointError, (f"{folder / _layer_file(*at)}: is missing; download it again." for at in missing))
    return tuple(
        {
            f"{layer}.{name}": tensor
            for layer in numbers
            for name, tensor in tensors_of(folder / layers[layer, rank], files[layers[layer, rank]].value).items()
        }
        for rank in range(degree)
    )


def _sequential_ranks(
    folder: Place, states: dict[int, str], files: dict[str, Any]
) -> tuple[dict[str, LazyTensor], ...]:
    """Each rank's tensors from `module` in its mp_rank file; raises CheckpointError where one of the two is missing."""
    missing = sorted(set(range(max(states) + 1)) - set(states))
    raise_all(CheckpointError, (f"{folder / states_file(rank)}: is missing; download it again." for rank in missing))
    ranks = []
    for _, name in sorted(states.items()):
        module = module_of(files[name].value)
        if module is None:
            raise CheckpointError(
                f"{folder / name}: holds no weights (`module` is empty), and no layer_NN-model_MM files lie beside it. "
                "Download the layer files too."
            )
        ranks.append({key.removeprefix(SEQUENTIAL): t for key, t in tensors_of(folder / name, module).items()})
    return tuple(ranks)


def tensors_of(path: Place, value: Any) -> dict[str, LazyTensor]:
    """A dictionary's tensors; TransformerEngine's extra states, which are not tensors, are left out.

    Raises CheckpointError where it is no dictionary, or holds anything else.
    """
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, found {type(value).__name__}; download it again."
        )
    odd = [
        name for name, t in value.items() if not isinstance(t, LazyTensor) and not str(name).endswith("_extra_state")
    ]
    raise_all(CheckpointError, (f"{path}: {name} is not a tensor that can be read; remove it." for name in odd))
    return {name: t for name, t in value.items() if isinstance(t, LazyTensor)}


def _find_configs(folder: Place) -> tuple[Place, ...]:
    """The YAML files in `configs/`, else beside the weights, else in the folder that holds `latest`."""
    folders = [folder / "configs", folder]
    if (folder.parent / "latest").is_file() or folder.name.startswith("global_step"):
        folders += [folder.parent / "configs", folder.parent]
    for near in folders:
        found = sorted(p for pattern in ("*.yml", "*.yaml") for p in near.glob(pattern))
        if found:
            return tuple(found)
    return ()


def stage_starts(index: Index) -> tuple[int, ...]:
    """The first layer index of every pipeline stage but the first, where the bookkeeping tells; sorted.

    Newer DeepSpeed lists each stage's parameters in its mp_rank files as `N.name`.
    """
    starts = set()
    for state in index.states.values():
        shapes = state.get("param_shapes") if isinstance(state, Mapping) else None
        groups = shapes if isinstance(shapes, list) else [shapes]
        names = [name for group in groups if isinstance(group, Mapping) for name in group if isinstance(name, str)]
        numbers = [int(match[0]) for name in names if (match := re.match(r"\d{1,9}(?=\.|$)", name))]
        starts |= {min(numbers)} if numbers else set()
    return tuple(sorted(starts))[1:]


def _layer_file(layer: int, rank: int) -> str:
    """The name of the file with one layer's weights on one rank."""
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def states_file(rank: int) -> str:
    """The name of a rank's bookkeeping file."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def home(index: Index, rank: int, name: str) -> Place:
    """The file that holds (or should hold) a rank's tensor `N.name`."""
    return index.folder / (states_file(rank) if index.sequential else _layer_file(int(name.split(".")[0]), rank))


def source_name(file: str, path: str) -> tuple[str, int | None]:
    """The index's name for what a file holds under `path`, and its rank; None where it is no weight."""
    if match := _LAYER.fullmatch(file):
        return f"{int(match[1])}.{path}", int(match[2])
    match, name = STATES.fullmatch(file), path.removeprefix(_MODULE)
    if match and name != path:
        return name.removeprefix(SEQUENTIAL), int(match[1])
    return path, None


def by_layer_file(ranks: Sequence[Mapping[str, Entry]], container: type[dict[Any, Any]]) -> dict[str, Any]:
    """What each layer file of each rank holds: `N.name` of the ranks' entries under `name` in layer N's file."""
    numbers = dict.fromkeys(int(name.split(".")[0]) for name in ranks[0])
    files = {_layer_file(number, rank): container() for number in numbers for rank in range(len(ranks))}
    for rank, entries in enumerate(ranks):
        for name, entry in entries.items():
            number, key = name.split(".", 1)
            files[_layer_file(int(number), rank)][key] = entry
    return files

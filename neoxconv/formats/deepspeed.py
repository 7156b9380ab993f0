"""DeepSpeed's checkpoints of models that are not gpt-neox's: a state dict in an mp_rank file, as the Trainer saves it.

    RUN/checkpoint-500/config.json                                          the hyperparameters
    RUN/checkpoint-500/latest                                               the tag
    RUN/checkpoint-500/global_step500/mp_rank_00_model_states.pt            {"module": {name: tensor}, ...}
    RUN/checkpoint-500/global_step500/*zero_pp_rank_D_mp_rank_00_optim_states.pt    optimizer states, left alone

Source: DeepSpeed's deepspeed/runtime/engine.py; transformers' integrations/deepspeed.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from neoxconv.core.model import Index, SourceFile
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import CheckpointError
from neoxconv.formats.neox.folder import OPTIMIZER, STATES, is_numbered, module_of, tensors_of
from neoxconv.formats.pt import read_pt
from neoxconv.formats.safetensors import read_json
from neoxconv.storage import Place, open_storage

_CONFIG = "config.json"


def has_weights(folder: Place) -> bool:
    """Whether a `global_stepN` holds weights in mp_rank files, under names that are not gpt-neox's.

    Raises CheckpointError where the first of these files is damaged.
    """
    files = _states(folder)
    module = module_of(read_pt(open_storage(files[0])).value) if files else None
    return isinstance(module, dict) and not is_numbered(module)


def index(folder: Place) -> Index:
    """Index the state dict in `folder` (a `global_stepN`), with the config.json there or in the two folders above.

    Raises CheckpointError where it is spread over several ranks, or is partitioned as ZeRO stage 3 does.
    """
    path, *others = _states(folder)
    if others:
        raise CheckpointError(
            f"{folder}: holds {1 + len(others)} model-parallel ranks under names that are not gpt-neox's; how they "
            "were split is not known. Save the whole model with the program that trained it, and give that folder."
        )
    file = open_storage(path)
    found = read_pt(file)
    tensors = tensors_of(path, module_of(found.value))
    _check_whole(path, tensors)
    near = next((place for place in (folder, folder.parent, folder.parent.parent) if (place / _CONFIG).is_file()), None)
    return Index(
        format="deepspeed",
        folder=near or folder,
        files=(SourceFile(file, found.checksum),),
        ranks=(tensors,),
        settings=read_json(near / _CONFIG) if near else {},
        set_aside=tuple(sorted(place.name for place in folder.iterdir() if OPTIMIZER.fullmatch(place.name))),
    )


def _states(folder: Place) -> list[Place]:
    """The mp_rank files, in the order of their ranks."""
    found = [(int(match[1]), place) for place in folder.iterdir() if (match := STATES.fullmatch(place.name))]
    return [place for _, place in sorted(found, key=lambda item: item[0])]


def _check_whole(path: Place, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise CheckpointError where tensors are empty: ZeRO stage 3 keeps their numbers elsewhere."""
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise CheckpointError(
            f"{path}: {empty[0]:.200} is empty, as ZeRO stage 3 leaves it; make the model whole with `python "
            "zero_to_fp32.py`, which DeepSpeed puts beside `latest`, and give what it writes."
        )

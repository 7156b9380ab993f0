"""What people have where a model should be, and how it becomes one: told by the names of files, never read.

Sources: DeepSpeed's utils/zero_to_fp32.py and checkpoint/ds_to_universal.py; torch.distributed.checkpoint's
format_utils; peft's utils/save_and_load.py; huggingface_hub's guide to its cache; Megatron-LM's checkpointing.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from neoxconv.errors import CheckpointError
from neoxconv.formats import hf
from neoxconv.storage import Place, is_folder, open_storage

_MAX_REVISION = 1024  # bytes of refs/main
_SHOWN = 5  # of names in a folder


@dataclass(frozen=True)
class _Foreign:
    """Something that is no whole model: how its files or folders are named, what it is, and how a model comes of it."""

    names: tuple[str, ...]
    what: str
    mend: str


_ADAPTER = _Foreign(
    ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "an adapter (peft, LoRA), which holds changes to another model's weights",
    "load that model and this with peft, call merge_and_unload() and save_pretrained(), and give what that writes",
)
_FOREIGN = (  # in the order in which they are looked for, in a folder and in the folders of it
    _ADAPTER,
    _Foreign(
        ("zero_pp_rank_*_mp_rank_*_model_states.pt",),
        "ZeRO stage 3's model states: each rank has a part of every weight",
        "run `python zero_to_fp32.py FOLDER OUTPUT` with the script that DeepSpeed puts beside `latest`, "
        "and give OUTPUT with the model's config.json in it",
    ),
    _Foreign(
        ("*.distcp",),
        "a torch.distributed checkpoint (DCP, as FSDP saves it): each rank has a part of every weight",
        "run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin` "
        "and give the folder of that file with the model's config.json in it",
    ),
    _Foreign(
        ("fp32.pt", "latest_universal", "zero"),
        "a universal checkpoint of DeepSpeed (ds_to_universal.py), which holds no weights as a model has them",
        "give the checkpoint that it was made from, or load it with DeepSpeed (load_universal) and save it again",
    ),
    _Foreign(
        ("latest_checkpointed_iteration.txt", "model_optim_rng.pt"),
        "a checkpoint of Megatron-LM",
        "convert it with Megatron's own tools to a Hugging Face folder, and give that",
    ),
    _Foreign(
        ("tf_model.h5", "flax_model.msgpack", "*.onnx", "rust_model.ot"),
        "a model for another framework",
        "download its model.safetensors or pytorch_model.bin",
    ),
)


def check_no_adapter(path: Place) -> None:
    """Raise CheckpointError where a file is an adapter's, or a folder holds one: transformers would add it."""
    config, *_ = _ADAPTER.names
    if path.name not in _ADAPTER.names and not (path.is_dir() and (path / config).is_file()):
        return
    if hf.has_weights(path):
        raise CheckpointError(
            f"{path / config}: makes of this model another one, as peft and transformers read it; {_ADAPTER.mend}, "
            "or move it away to read the model without it."
        )
    raise CheckpointError(_told(path, _ADAPTER))


def told_of_file(path: Place) -> str | None:
    """What a file is that is no model, or None."""
    return next((_told(path, kind) for kind in _FOREIGN if _is_of(kind, path.name)), None)


def told_of_folder(folder: Place) -> str | None:
    """What a folder is that holds no model as it is, and what to give instead; None where that is unknown."""
    here = sorted(folder.iterdir(), key=str)
    inside = [path for near in here if near.name.startswith(_PARTS) and is_folder(near) for path in near.iterdir()]
    for kind in _FOREIGN:
        for path in (*here, *inside):
            if _is_of(kind, path.name):
                return _told(folder, kind)
    for prefix, what in _MANY.items():
        if found := [path.name for path in here if path.name.startswith(prefix) and is_folder(path)]:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            return f"{folder}: holds {what} ({', '.join(found[:_SHOWN])}{more}), and no model itself; give one of them."
    return None


# Folders in which the files above lie, and others of which each may be a model.
_PARTS = ("global_step", "iter_", "mp_rank_", "pytorch_model_fsdp", "distributed_checkpoint", "zero")
_MANY = {"checkpoint-": "checkpoints of a trainer", "models--": "models of the Hugging Face hub's cache"}


def _is_of(kind: _Foreign, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in kind.names)


def _told(path: Place, kind: _Foreign) -> str:
    return f"{path}: is {kind.what}; {kind.mend}."


def snapshot_of(folder: Place) -> Place | None:
    """The snapshot that the root of a model in the hub's cache means: the one that refs/main names, or the only one.

        models--ORG--NAME/refs/main            the name of a snapshot
        models--ORG--NAME/snapshots/NAME/...   links to models--ORG--NAME/blobs/

    None where the folder is no such root. Raises CheckpointError where none of several is meant.
    """
    if not is_folder(folder / "snapshots"):
        return None
    found = {path.name: path for path in sorted((folder / "snapshots").iterdir(), key=str) if is_folder(path)}
    main = folder / "refs" / "main"
    if main.is_file():
        file = open_storage(main)
        named = file.text(0, min(file.size, _MAX_REVISION)).decode("utf-8", "replace").strip()
        if named in found:
            return found[named]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise CheckpointError(f"{folder}: has a folder `snapshots` without a snapshot in it; download the model again.")
    raise CheckpointError(
        f"{folder}: has {len(found)} snapshots and refs/main names none of them; give one: "
        f"{', '.join(str(path) for path in list(found.values())[:_SHOWN])}."
    )

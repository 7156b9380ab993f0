"""The training configuration of gpt-neox: YAML files, which come with a download and are trusted no more than it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.storage import Place, open_storage

# Far above any configuration.
LARGEST = 1 << 17  # bytes of a file
_DEEPEST = 64  # levels
_MOST_VALUES = 1 << 16  # every alias followed
_LONGEST_VALUE = 3000  # characters
_ODD_SCALARS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)  # what PyYAML raises for them


def read_configs(paths: Sequence[Place]) -> dict[str, Any]:
    """All settings of the YAML files with `_` for `-`; raises CheckpointError where a key has two values."""
    merged: dict[str, Any] = {}
    first_path: dict[str, Place] = {}
    for path in paths:
        for spelled, value in read_yaml(path).items():
            key = str(spelled).replace("-", "_")
            if key in merged and merged[key] != value:
                raise CheckpointError(
                    f"{path}: {key} is {value!r} but {merged[key]!r} in {first_path[key].name}; "
                    "give the right file with --config."
                )
            merged[key] = value
            first_path.setdefault(key, path)
    return merged


def read_yaml(path: Place) -> dict[str, Any]:
    """The settings in one YAML file, in bounded time and memory: nothing is built before its size is known.

    Raises CheckpointError where it is too large, no YAML or no mapping.
    """
    import yaml

    file = open_storage(path)
    if file.size > LARGEST:
        raise CheckpointError(f"{path}: has {file.size} bytes, expected at most {LARGEST}; give another with --config.")
    try:
        loader = yaml.SafeLoader(file.text().decode())
        root = loader.get_single_node()
        _check_size(root)
        settings = loader.construct_document(root) if root else None
    except (*_ODD_SCALARS, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); correct it."
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: expected the settings of gpt-neox (key: value), found {type(settings).__name__}; "
            "give another with --config."
        )
    return settings


def _check_size(root: Any) -> None:
    """Raise ValueError where a YAML, every alias followed, is deeper or larger than any configuration.

    A node's value is a text, a list of nodes, or for a mapping a list of pairs of nodes.
    """
    level, values = [root] if root else [], 0
    for _ in range(_DEEPEST):
        if any(isinstance(node.value, str) and len(node.value) > _LONGEST_VALUE for node in level):
            raise ValueError(f"a value is longer than {_LONGEST_VALUE} characters")
        inside = [node.value for node in level if isinstance(node.value, list)]
        values += sum(map(len, inside))
        if values > _MOST_VALUES:
            raise ValueError("it holds more values than any configuration")
        level = [node for items in inside for item in items for node in (item if isinstance(item, tuple) else (item,))]
        if not level:
            return
    raise ValueError("it is nested deeper than any configuration")

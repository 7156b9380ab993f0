"""What the user says of a model: --metadata FILE, in llama.cpp's form, and --set KEY=VALUE."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neoxconv.errors import PlanError, raise_all
from neoxconv.formats.json_text import object_in
from neoxconv.storage import read_bounded
from neoxconv.targets.recipe import Recipe

_LARGEST = 1 << 20  # bytes of a file
# Keys that weights, configuration and tokenizer decide, or how the file was made.
_DECIDED = ("architecture", "type", "alignment", "file_type", "quantization_version")
_OTHERS = ("split", "tokenizer", "quantize", "neoxconv", "GGUF")
_LISTS = ("general.tags", "general.languages")
_GROUPS = {"general.base_models": "general.base_model", "general.datasets": "general.dataset"}  # lists of tables
_WHOLE = ("count", "top_k", "penalty_last_n", "mirostat")  # the last words of keys that hold a whole number
_KINDS: Mapping[Any, str] = {int: "whole number", float: "number", str: "text"}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")


def is_decided(key: str) -> bool:
    """Whether nobody may set a key: one of the weights, the tokenizer, or the file."""
    from gguf.constants import MODEL_ARCH_NAMES

    first, _, rest = key.partition(".")
    return first in (*_OTHERS, *MODEL_ARCH_NAMES.values()) or (first == "general" and rest in _DECIDED)


def given_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys that the recipe sets, each with a value of its type; an empty text takes a key away.

    Raises PlanError for a file that is no JSON object, a key that is decided elsewhere, and a value of another type.
    """
    found = _in_file(recipe.metadata) if recipe.metadata else {}
    said = [(key, value, f"--metadata {recipe.metadata}") for key, value in found.items()]
    said += [(key, value, f"--set {key}") for key, value in recipe.set]
    raise_all(PlanError, (f"{where}: {problem}" for key, _, where in said if (problem := _problem(key))))
    return {key: _typed(key, value, where) for key, value, where in said}


def _problem(key: str) -> str:
    """What is wrong with a key; empty for none."""
    if not _NAME.fullmatch(key):
        return f"{key!r:.60} is no key; write it as general.author, or as my_tool.note."
    if is_decided(key):
        return f"{key} follows from the model and the file, so it cannot be set; leave it out."
    return ""


def _in_file(path: Path) -> dict[str, Any]:
    """The keys in a file of llama.cpp's form. Raises PlanError where it is no JSON object of keys."""
    found = object_in(read_bounded(path, _LARGEST))
    if not found:
        raise PlanError(f"{path}: holds no JSON object of keys such as general.author; correct it.")
    return {key: value for name, each in found.items() for key, value in _flat(name, each)}


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """A key as GGUF has it; of a list of models or data sets their count, and one for each word of each."""
    if name not in _GROUPS or not isinstance(value, list):
        return [(name, value)]
    return [(f"{_GROUPS[name]}.count", len(value))] + [
        (f"{_GROUPS[name]}.{number}.{word}", each[word])
        for number, each in enumerate(value)
        if isinstance(each, dict)
        for word in each
    ]


def _typed(key: str, value: Any, where: str) -> Any:
    """The value in the type that gguf gives the key. Raises PlanError where it cannot be."""
    kind = _kind_of(key)
    try:
        if value is None or value == "":
            return ""
        if kind is list:
            items = value.split(",") if isinstance(value, str) else value
            return [str(item).strip() for item in items]
        if kind is not None:
            return kind(value)
    except (TypeError, ValueError):
        raise PlanError(f"{where}: {key} is {value!r:.60}, expected a {_KINDS.get(kind, 'list')}.") from None
    if isinstance(value, dict) or (isinstance(value, list) and len({type(item) for item in value}) != 1):
        raise PlanError(f"{where}: {key} is {value!r:.60}, expected a text, a number, or a list of one kind.")
    return value


def _kind_of(key: str) -> Callable[[Any], Any] | None:
    """The type of a general key; None for others, which are as they are given."""
    if not key.startswith("general."):
        return None
    if key in _LISTS:
        return list
    last = key.rpartition(".")[2]
    if last in _WHOLE:
        return int
    return float if key.startswith("general.sampling.") and last != "sequence" else str


def above(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found with what was given in its place; base models or data sets that are counted replace all."""
    replaced = tuple(f"{group}." for group in _GROUPS.values() if f"{group}.count" in given)
    merged = {key: value for key, value in found.items() if not key.startswith(replaced)} | dict(given)
    return _counted({key: value for key, value in merged.items() if value not in ("", None)})


def _counted(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with as many base models and data sets counted as they name."""
    found = dict(keys)
    for group in _GROUPS.values():
        pattern = re.compile(re.escape(group) + r"\.(\d{1,4})\.\w+")
        numbers = [int(match[1]) for match in map(pattern.fullmatch, keys) if match]
        if numbers:
            found[f"{group}.count"] = max(numbers) + 1
    return found

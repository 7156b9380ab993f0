"""What the options of `convert` ask of targets: of one, of several by `--type A,B,C`, or by a file of recipes.

targets:                                    # --recipe FILE: each target by the options of `convert`
  - {to: gguf, type: "Q8_0,Q4_K_M"}
  - {to: gguf, type: IQ3_XXS, imatrix: 20B.imatrix}
  - {to: mlx, type: 4bit, name: 20B-mlx}    # its name in DST; else one that says model, size and type
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from neoxconv.cli.source import Given
from neoxconv.targets import TAKEN_BY, TARGETS
from neoxconv.targets.recipe import Recipe

_OF_A_TARGET = ("format", *Recipe.__dataclass_fields__)  # options that a recipe may have
_OF_ALL = ("metadata", "set")  # of these, what may be said of all targets at once
_SPELLED = {"as_family": "--as"}  # options that are not named as what they set


def is_several(given: Given) -> bool:
    """Whether several targets are asked for."""
    return given["recipe"] is not None or len(given["type"] or ()) > 1


def recipe_of(given: Given) -> Recipe:
    """What is asked of a target. Raises UsageError where an option is not for its format, or its type."""
    if not given["format"]:
        raise click.UsageError(f"--to is missing: the format of DST, one of {', '.join(TARGETS)}.")
    kind, *others = given["type"] or (None,)
    assert not others, "several types are several recipes"
    given = {**given, "type": kind}
    _check_options(given)
    return Recipe(**{name: given[name] for name in Recipe.__dataclass_fields__ if given[name] is not None})


def _check_options(given: Given) -> None:
    """Raise UsageError where an option is for another format, or for another of its types, than the one asked for."""
    target = TARGETS[given["format"]]
    for option, formats in TAKEN_BY.items():
        if given[option] not in (None, ()) and target.name not in formats:
            takes = ", ".join(map(_flag, target.options))
            raise click.UsageError(
                f"{_flag(option)} is for {', '.join(formats)}, not for {target.name}, which takes {takes}."
            )
    kind, dtype = given["type"], given["dtype"]
    if kind and kind not in target.types:
        raise click.UsageError(f"--type {kind} is not for {target.name}, which has {', '.join(target.types)}.")
    for option, types in target.only_of.items():
        if kind and kind not in types and given[option] is not None:
            raise click.UsageError(f"{_flag(option)} is for {target.name}'s {' and '.join(types)}, not for {kind}.")
    if dtype and dtype not in target.dtypes:
        others = " and ".join(other.name for other in TARGETS.values() if dtype in other.dtypes)
        raise click.UsageError(f"--dtype {dtype} is for {others}; {target.name} takes {' or '.join(target.dtypes)}.")


def _flag(option: str) -> str:
    """An option as it stands on the command line."""
    return _SPELLED.get(option, f"--{option.replace('_', '-')}")


def asked_for(given: Given) -> Iterator[tuple[str | None, Recipe]]:
    """The name, if it has one, and the recipe of every target: a type for each. Raises UsageError as `recipe_of`."""
    for name, each in _in_file(given["recipe"], given) if given["recipe"] else [(None, given)]:
        types = each["type"] or (None,)
        if name and len(types) > 1:
            raise click.UsageError(f"{given['recipe']}: {name} is the name of {len(types)} targets; give one type.")
        yield from ((name, recipe_of({**each, "type": kind and (kind,)})) for kind in types)


def _in_file(path: Path, given: Given) -> Iterator[tuple[str | None, Given]]:
    """The targets of a file of recipes, read as the command line is. Raises UsageError for what it does not know."""
    if extra := [name for name in _OF_A_TARGET if name not in _OF_ALL and given[name] not in (None, ())]:
        raise click.UsageError(f"--recipe says what each target is; write {', '.join(extra)} into {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = [dict(entry) for entry in content["targets"]]
    except OSError as error:
        raise click.UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise click.UsageError(
            f"{path}: is no file of recipes; expected YAML such as "
            "`targets: [{to: gguf, type: Q8_0}, {to: hf, dtype: F16}]`."
        ) from error
    if not entries:
        raise click.UsageError(f"{path}: has no targets.")
    for number, entry in enumerate(entries, 1):
        name = entry.pop("name", None)
        if name is not None and (str(name) in ("", ".", "..") or "/" in str(name)):
            raise click.UsageError(f"{path}: target {number}: {name} is no name of a file or a folder in DST.")
        try:
            options = _parsed(entry)
        except click.UsageError as error:
            raise click.UsageError(f"{path}: target {number}: {error.format_message()}") from error
        own = {option: options[option] for option in _OF_A_TARGET if option not in _OF_ALL or options[option]}
        yield name and str(name), {**given, **own}


def _parsed(entry: Mapping[str, Any]) -> Given:
    """The options of a target, by their names on the command line."""
    context = click.get_current_context()
    known = {opt: param for param in context.command.params for opt in param.opts}
    words = ["source", "target"]
    for key, value in entry.items():
        option = f"--{str(key).replace('_', '-')}"
        param = known.get(option)
        if param is None or param.name not in _OF_A_TARGET:
            raise click.UsageError(f"{key} is no option of a target.")
        values = value if isinstance(value, list) else [value]
        if param.name == "type":
            values = [",".join(map(str, values))]
        if len(values) > 1 and not getattr(param, "multiple", False):
            raise click.UsageError(f"{key} takes one value, found {len(values)}.")
        if isinstance(value, bool):
            words += [option] * value
        else:
            words += [word for each in values for word in (option, str(each))]
    return context.command.make_context("convert", words, parent=context.parent).params

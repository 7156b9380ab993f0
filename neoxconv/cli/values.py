"""How the values of options and arguments are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neoxconv.errors import PlanError
from neoxconv.names import TYPES
from neoxconv.words import parse_size

if TYPE_CHECKING:
    from neoxconv.storage import Place


FOLDER_GONE = "the working folder was removed; change to one that exists, and run the command there."


class _Path(click.Path):
    """A path that has a name: an empty text, as an unset variable gives, would mean the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        _check_named(value)
        _check_found(Path(value))
        return super().convert(value, param, ctx)


def _check_named(text: object) -> None:
    """Raise BadParameter for a text that names nothing."""
    if not str(text).strip():
        raise click.BadParameter("the name is empty; give a file or a folder (is a variable unset?).")


def _check_found(path: Place) -> None:
    """Raise PlanError for a path from a working folder that is not there any more."""
    session = click.get_current_context().find_root().obj or {}
    if session.get("gone") and isinstance(path, Path) and not path.is_absolute():
        raise PlanError(FOLDER_GONE)


PATH = _Path(path_type=Path)
COUNT = click.IntRange(min=1)
LENGTH = click.IntRange(min=2)


def location(text: str) -> Place:
    """The path or the URL that an argument means."""
    from neoxconv.storage import place

    _check_named(text)
    found = place(text)
    _check_found(found)
    return found


class _Location(click.Path):
    """A path or a URL; shells complete it as a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return location(value)


class _Destination(click.Path):
    """A path or a URL as it was typed: a slash at its end tells a folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        location(value)
        return value


LOCATION, DESTINATION = _Location(), _Destination()


def setting(text: str) -> tuple[str, str]:
    """The key and the value that `--set` joins with `=`."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise click.BadParameter(f"{text!r} is no KEY=VALUE, such as general.author=NAME.")
    return key.strip(), value.strip()


def among(words: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """How a shell completes one of `words`, or the last of several that commas join: begun in any case, as spelt."""

    def complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        before, comma, last = begun.rpartition(",")
        return [f"{before}{comma}{word}" for word in words if word.lower().startswith(last.lower())]

    return complete


def byte_count(text: str) -> int:
    """The bytes that an option's value means."""
    count = parse_size(text)
    if not count:
        raise click.BadParameter(f"{text!r} is no size; write it as 5GB, 500MB, 2GiB or a number of bytes.")
    return count


def limit(text: str) -> float:
    """The number from 0 on that an option's value is."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise click.BadParameter(f"{text!r} is no number from 0 on.")
    return number


def override(text: str) -> tuple[str, str]:
    """The pattern and the type that `--tensor-type` joins with `=`."""
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals) or name.upper() not in TYPES:
        raise click.BadParameter(f"{text!r} is no PATTERN=TYPE; TYPE is one of {', '.join(TYPES)}.")
    return pattern, name.upper()


class OneOrMore(click.Choice[str]):
    """One of the choices or several of them, joined by commas, each in any case: a tuple, each once."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = value.split(",") if isinstance(value, str) else value
        return tuple(dict.fromkeys(super(OneOrMore, self).convert(word.strip(), param, ctx) for word in words))


def scheduler(text: str) -> str:
    """The address of a Dask scheduler."""
    found = re.fullmatch(r"dask://[^/\s]+:(\d+)", text)
    if not found:
        raise click.BadParameter(f"{text!r} is no scheduler; write it as dask://HOST:PORT.")
    if not 1 <= int(found[1]) <= 65535:
        raise click.BadParameter(f"{text!r}: {found[1]} is no port; they go from 1 to 65535.")
    return text

"""Everything that is printed leaves through here: nothing in it is obeyed by a terminal."""

from __future__ import annotations

import click

from neoxconv.errors import escaped


def say(text: str, *, err: bool = False) -> None:
    """Print lines to stdout or stderr; what a path or a name in a file has of terminal escapes is spelt out."""
    click.echo("\n".join(map(escaped, text.split("\n"))), err=err)

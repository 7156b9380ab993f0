"""What mkdocs asks for when it builds the site: pages made from the code, and the repository's Markdown as its own.

Made when the site is built, so that none of them can be out of date:
    commands/NAME.md    a command's own help
    changes.md          CHANGELOG.md
    <!-- formats -->    in a page: the table of `neoxconv formats`
    <!-- reference -->  in a page: the signatures and docstrings of `neoxconv`'s public names
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click

import neoxconv
from neoxconv.cli.formats import catalog
from neoxconv.cli.main import commands

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/neoxconv/neoxconv/blob/main/"
READ_ON = {
    "inspect": ("sources", "architectures"),
    "convert": ("targets", "sources", "calibration", "scale"),
    "calibrate": ("calibration",),
    "formats": ("targets",),
    "verify": ("verification", "checking"),
    "card": ("publishing", "formats"),
    "demo": ("installing", "index"),
}
_PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_METHOD = re.compile(r"\n+    (?:@|def )")
_DEEP = re.compile(r"^ {2,3}(?=[-*] )")


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file holds."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in a page's markers, lead links that leave docs/ to the repository, and space lists as `spaced` does."""
    for marker, made in (("<!-- formats -->", types), ("<!-- reference -->", reference)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", f"]({REPOSITORY}")
    return "\n".join(spaced(markdown.split("\n")))


# --- the pages --------------------------------------------------------------------------------------------------------


def made_pages() -> dict[str, str]:
    """Every page that is made, by its place in docs/."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return {"changes.md": changes} | {f"commands/{name}.md": command_page(name) for name in commands.commands}


def command_page(name: str) -> str:
    """A command's help: its text, its usage, each option with what `--help` says of it."""
    command = commands.commands[name]
    context = click.Context(command, click.Context(commands, info_name="neoxconv"), info_name=name)
    usage = command.get_usage(context).removeprefix("Usage: ")
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    options = "\n\n".join(f"`{record[0]}`\n:   {record[1]}" for record in records if record and record[1])
    pages = ", ".join(f"[{title(page)}](../{page}.md)" for page in READ_ON[name])
    text = inspect.cleandoc(command.help or "")
    page = f"# neoxconv {name}\n\n```\n{usage}\n```\n\n{text}\n\nRead on: {pages}.\n\n## Options\n\n{options}\n"
    return _PAGE.sub(r"[docs/\1.md](../\1.md)", page)


def title(page: str) -> str:
    """The heading of a page in docs/."""
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def types() -> str:
    """`neoxconv formats` as Markdown: for each format the programs that run it, and a table of its types."""
    formats = groupby(catalog(), lambda row: row.format)
    return "\n".join(line for name, rows in formats for line in _format(name, [*rows]))


def _format(name: str, rows: list[Any]) -> Iterator[str]:
    yield from (f"### `--to {name}`", "", f"Run by {rows[0].programs}.", "")
    yield "| option | bits per weight | 20B in GB | in GiB | a weight is rounded by at most | KL |"
    yield "|-|-:|-:|-:|-|-:|"
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.6f}"
        sizes = f"{row.bits:.2f} | {row.nbytes / 1e9:.2f} | {row.nbytes / 2**30:.2f}"
        yield f"| `{row.option} {row.type}` | {sizes} | {row.bound or ''} | {divergence} |"
    yield ""


def reference() -> str:
    """A directive for each public name, which mkdocstrings fills in; below a class its fields with their comments."""
    return "\n\n".join(
        f"::: {place}.{name}{_fields(getattr(neoxconv, name))}" for name, place in neoxconv.PUBLIC.items()
    )


def _fields(public: object) -> str:
    """A class's own source up to its first method, as a block; nothing for a function."""
    if not inspect.isclass(public):
        return ""
    source = _METHOD.split(inspect.getsource(public))[0]
    return f"\n\n```python\n{source}\n```"


def spaced(lines: list[str]) -> Iterator[str]:
    """The lines as Python-Markdown wants lists: after a blank line, and four spaces deep in another one."""
    fenced, before = False, ""
    for line in lines:
        if not fenced:
            line = _DEEP.sub("    ", line)
            if _ITEM.match(line) and before.strip() and not before.startswith(" ") and not _ITEM.match(before):
                yield ""
        fenced ^= line.lstrip().startswith("```")
        yield line
        before = line

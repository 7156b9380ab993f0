"""What mkdocs asks for when it builds the site: pages made from the code, and the repository's Markdown as its own.

Made when the site is built, so that none of them can be out of date:
    commands/NAME.md    a command's own help
    changes.md          CHANGELOG.md
    <!-- formats -->    in a page: the table of `neoxconv formats`
    <!-- reference -->  in a page: the docstrings of `neoxconv`'s public names
"""

from __future__ import annotations

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
READ_ON = {
    "inspect": ("sources", "architectures"),
    "convert": ("targets", "sources", "calibration", "scale"),
    "calibrate": ("calibration",),
    "formats": ("targets",),
    "verify": ("verification", "checking"),
    "demo": ("installing", "index"),
}
_PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file holds."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Give a page what its markers stand for, links that leave docs/, and the blank lines that Python-Markdown needs."""
    markdown = markdown.replace("<!-- formats -->", types()).replace("<!-- reference -->", reference())
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", f"]({config.repo_url}/blob/main/")
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
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    options = "\n\n".join(f"`{names}`\n:   {told}" for names, told in filter(None, records))
    pages = ", ".join(f"[{title(page)}](../{page}.md)" for page in READ_ON[name])
    text = f"# neoxconv {name}\n\n{command.help}\n\n```\n{usage}\n```\n\n## Options\n\n{options}\n\nRead on: {pages}.\n"
    return _PAGE.sub(r"[docs/\1.md](../\1.md)", text)


def title(page: str) -> str:
    """The heading of a page in docs/."""
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def types() -> str:
    """`neoxconv formats` as Markdown: for each format the programs that run it, and a table of its types."""
    return "\n".join(line for name, rows in groupby(catalog(), lambda row: row.format) for line in _format(name, [*rows]))


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
    """A directive for each public name, for mkdocstrings to fill in."""
    return "\n\n".join(f"::: {neoxconv.PUBLIC[name]}.{name}" for name in neoxconv.PUBLIC)


def spaced(lines: list[str]) -> Iterator[str]:
    """The lines with a blank one before each list: Markdown in a repository needs none after a paragraph."""
    fenced, before = False, ""
    for line in lines:
        begins = _ITEM.match(line) and before.strip() and not before.startswith(" ") and not _ITEM.match(before)
        if begins and not fenced:
            yield ""
        fenced ^= line.lstrip().startswith("```")
        yield line
        before = line

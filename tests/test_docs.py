"""What the documentation says of the program is so: links, figures, types, every command line that it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from neoxconv.cli.formats import row, shapes
from neoxconv.cli.main import commands
from neoxconv.names import FORMATS, TARGET_TYPES
from neoxconv.storage import address
from neoxconv.targets.recipe import Recipe
from neoxconv.version import __version__
from website.pages import command_page, made_pages

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as a repository and our site make them of its headings."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = page.parent / name
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_longer_than_120_columns(page: Path) -> None:
    lines = FENCED.sub("", page.read_text(encoding="utf-8")).split("\n")
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []


def command_lines() -> Iterator[tuple[str, str]]:
    """Every command of ours in a block of a page, with the page's name; those of a loop are not whole."""
    for page in PAGES:
        for block in FENCED.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").split("\n"):
                if line.startswith("neoxconv ") and "..." not in line:
                    yield page.name, line


@pytest.mark.parametrize(("page", "line"), [*command_lines()])
def test_every_command_that_is_shown_can_be_typed(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "pinned", lambda path: path)  # the Hub is not asked
    _, name, *words = shlex.split(line, comments=True)
    commands.commands[name].make_context(name, words)


@pytest.mark.parametrize("page", ["README.md", "docs/shards.md"])
def test_the_table_of_what_to_run_a_model_with_says_what_formats_says(page: str) -> None:
    model = shapes("20B")
    table = re.findall(r"\| `--to (\S+) --type (\S+)` \| (\S+) \| (\S+) \|\n", (ROOT / page).read_text())
    assert len(table) == 5
    for format, type, size, divergence in table:
        found = row(model, Recipe(format, type=type))
        digits = len(divergence.partition(".")[2])
        assert (size, divergence) == (f"{found.nbytes / 1e9:.2f}", f"{found.divergence:.{digits}f}")


def test_the_page_of_targets_names_every_format_and_type() -> None:
    said = set(re.findall(r"[\w-]+", (ROOT / "docs" / "targets.md").read_text()))
    assert {*FORMATS, *TARGET_TYPES} <= said


@pytest.mark.parametrize("name", list(commands.commands))
def test_a_commands_page_has_its_options_and_leads_on(name: str) -> None:
    page = command_page(name)
    options = {option for parameter in commands.commands[name].params for option in parameter.opts if "-" in option}
    assert all(f"{option}" in page for option in options) and "](../" in page


def test_the_site_names_every_page() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {*(page.name for page in (ROOT / "docs").glob("*.md")), *made_pages()}


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()

"""The parts that the page is made of: headings, tables, cards, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def verdict(passed: bool, style: str = "") -> str:
    """A pass or a fail in sign, word and colour."""
    kind, sign = ("pass", "✓ PASS") if passed else ("fail", "✗ FAIL")
    return f'<span class="{f"{style} {kind}".strip()}">{sign}</span>'


def section(title: str, about: str, content: str) -> str:
    """A part of the page: its heading, a sentence about it, and what it shows."""
    return f'<section><h2>{title}</h2><p class="soft">{about}</p>{content}</section>\n'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML, with the first of each row as its heading."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = (f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'

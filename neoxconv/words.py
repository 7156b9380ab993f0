"""Plain text for people: sizes, counts, tables."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from neoxconv.errors import one_line

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_BINARY = ("bytes", "KiB", "MiB", "GiB")


def parse_size(text: str) -> int | None:
    """The bytes that `text` means (5GB, 500MB, 2GiB, 1.5G, a plain count), or None where it is no size above zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()]) or None


def size(count: int) -> str:
    """A count of bytes for people: 41112854242 -> 38.29 GiB."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(_BINARY) - 1)
    return f"{count / 1024**power:.2f} {_BINARY[power]}" if power else f"{count} {_BINARY[0]}"


def plural(count: int, noun: str) -> str:
    """A count and its noun: 1 file, 2 files."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shell(words: Sequence[str]) -> str:
    """A command as it can be typed; what a terminal would obey is spelt out, as bash and zsh read it."""
    return " ".join(shlex.quote(word) if word.isprintable() else _spelt(word) for word in words)


def _spelt(word: str) -> str:
    """A word with characters that are not printable, in $'...'."""
    parts = [
        {"'": r"\'", "\\": r"\\"}.get(char, char) if char.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
        for char in word
    ]  # fmt: skip
    return f"$'{''.join(parts)}'"


def table(align: str, rows: Sequence[Sequence[object]]) -> str:
    """Rows as lines with columns of equal width; `align` has `<` or `>` for each column."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    return "\n".join("  " + line.format(*row).rstrip() for row in cells)


def first_of(items: Sequence[object], most: int = 20) -> list[str]:
    """The first of the items as indented lines, and how many more there are."""
    more = [f"    ... and {len(items) - most} more"] if len(items) > most else []
    return [f"    {item}" for item in items[:most]] + more

"""Lines of a .jsonl file, and their fields as a task expects them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import SURROGATE
from neoxconv.storage import check_size, open_storage


@dataclass(frozen=True)
class Line:
    """The fields of a line, and the file and number that messages name it by."""

    where: str
    fields: dict[str, Any]

    def wrong(self, field: str, expected: str, found: str = "") -> CheckpointError:
        """The error that a field is not what it should be; `found` says in words what it is."""
        shown = f"is {reprlib.repr(self.fields[field])}" if field in self.fields else "is missing"
        return CheckpointError(
            f"{self.where}: {field} {found or shown}, expected {expected}; correct the line, or give another file."
        )

    def text(self, field: str, *, empty: bool = False) -> str:
        """A text. Raises CheckpointError where the field is none, or empty unless it may be."""
        value = self.fields.get(field)
        if not _is_text(value) or not (value or empty):
            raise self.wrong(field, "text" if empty else "text, not empty")
        return str(value)

    def texts(self, field: str, count: int | None = None) -> list[str]:
        """`count` texts, or two and more, none of them empty. Raises CheckpointError where the field has no such."""
        value = self.fields.get(field)
        found = value if isinstance(value, list) and all(_is_text(text) and text for text in value) else []
        if len(found) != count if count else len(found) < 2:
            raise self.wrong(field, f"a list of {count or 'two or more'} texts, none empty")
        return found

    def number(self, field: str, choices: int) -> int:
        """The number of the right choice, which may be written as text. Raises CheckpointError where it is none."""
        value = self.fields.get(field)
        if isinstance(value, int | str) and str(value) in map(str, range(choices)):
            return int(value)
        raise self.wrong(field, f"a number from 0 to {choices - 1}")


def _is_text(value: Any) -> bool:
    """Whether this is a string that UTF-8 can spell."""
    return isinstance(value, str) and not SURROGATE.search(value)


def lines(data: Path) -> Iterator[Line]:
    """The lines of a .jsonl file that are not blank.

    Raises CheckpointError at one that is no JSON object, and where the file is far too large.
    """
    file = open_storage(data)
    check_size(data, file.size)
    for number, text in enumerate(file.text().split(b"\n"), 1):
        if text.strip():
            yield Line(where := f"{data}: line {number}", _parsed(where, text))


def _parsed(where: str, text: bytes) -> dict[str, Any]:
    """The fields that a line holds. Raises CheckpointError where it is no JSON object."""
    advice = "expected a JSON object in UTF-8; correct the line, or give another file."
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON ({error}), {advice}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: is {reprlib.repr(fields)}, {advice}")
    return fields

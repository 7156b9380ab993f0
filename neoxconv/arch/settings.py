"""Settings as people write them: counts, numbers and truth values, each checked; an error names file, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from neoxconv.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """The settings `values` that `where` (a file, or several) holds, there with `prefix` before their names."""

    where: str
    values: Mapping[str, Any]
    prefix: str = ""

    def count(self, key: str, default: Any = None) -> int:
        """A whole number above zero."""
        value = self.values.get(key, default)
        found = _as_number(value)
        if not 1 <= found < float("inf") or found != int(found):
            self.refuse(key, value, "a whole number above zero")
        return int(found)

    def number(self, key: str, default: Any = None, most: float = float("inf")) -> float:
        """A number above zero, `most` at most."""
        value = self.values.get(key, default)
        found = _as_number(value)
        if not 0 < found <= most or found == float("inf"):
            self.refuse(key, value, "a number above zero" + (f", {most:g} at most" if most < float("inf") else ""))
        return found

    def truth(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value

    def refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise the error for a value that cannot be meant."""
        raise CheckpointError(
            f"{self.where}: {self.prefix}{key} is missing; expected {expected}."
            if value is None
            else f"{self.where}: {self.prefix}{key} is {str(value)[:60]!r}; expected {expected}."
        )


def _as_number(value: Any) -> float:
    """The number that a setting is, NaN for none; YAML reads 1e-5, which has no point, as text."""
    try:
        return float("nan") if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")

"""Settings as people write them: counts, numbers and truth values, each checked; an error names file, key and value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from neoxconv.errors import CheckpointError, raise_all

# Of transformers 5, and what it reads in its place where that is given.
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
# Hugging Face's names of ungated activations, and the function that each names.
GELUS = {"gelu": "gelu", "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Other names of what GPT-2's and GPT-J's configurations say, with their own. Source: attribute_map in transformers.
OF_GPT2 = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


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

    def one_of(self, key: str, default: str, known: Collection[str]) -> str:
        """One of the words that are known."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in known:
            self.refuse(key, value, " or ".join(known))
        return value

    def refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise the error for a value that cannot be meant."""
        raise CheckpointError(
            f"{self.where}: {self.prefix}{key} is missing; expected {expected}."
            if value is None
            else f"{self.where}: {self.prefix}{key} is {str(value)[:60]!r}; expected {expected}."
        )


def by_own_names(read: Settings, others: Mapping[str, str]) -> Settings:
    """The settings under a family's own names, where transformers takes `others` (its attribute_map) for them too.

    Raises CheckpointError where two names say two things.
    """
    values = read.values
    found = {own: (other, values[other]) for other, own in others.items() if other in values}
    raise_all(CheckpointError, (
        f"{read.where}: {own} is {str(values[own])[:60]} but {other}, another name for it, is {str(value)[:60]}. "
        "Remove the wrong one, or make them equal."
        for own, (other, value) in found.items()
        if own in values and values[own] != value
    ))  # fmt: skip
    return Settings(read.where, {**values, **{own: value for own, (_, value) in found.items()}}, read.prefix)


def _as_number(value: Any) -> float:
    """The number that a setting is, NaN for none; YAML reads 1e-5, which has no point, as text."""
    try:
        return float("nan") if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def rope_types(settings: Mapping[str, Any]) -> list[Any]:
    """The kinds of rotary positions that a config.json names, other than the default."""
    tables = [_as_table(settings.get(key)) for key in _ROPE_TABLES]
    return [table[key] for table in tables for key in ("rope_type", "type") if table.get(key, "default") != "default"]


def agreed_rotary(read: Settings, old: str, new: str, default: float, most: float = float("inf")) -> float:
    """A rotary setting, under transformers 4's name `old` or, in a table of rotary settings, 5's name `new`.

    Raises CheckpointError where two disagree. `new` outside of a table is read by neither version, so alone it is held
    against the default.
    """
    values = read.values
    tables = {name: _as_table(values.get(name)) for name in _ROPE_TABLES}
    found = {old: values[old]} if old in values else {}
    found |= {f"{name}.{new}": table[new] for name, table in tables.items() if new in table}
    found = found or {old: default}
    found |= {new: values[new]} if new in values else {}
    spelled = Settings(read.where, found)
    numbers = {key: spelled.number(key, most=most) for key in found}
    if len(set(numbers.values())) > 1:
        told = " but ".join(f"{key} is {number:.15g}" for key, number in numbers.items())
        raise CheckpointError(
            f"{read.where}: {told}; transformers 4 takes {old}, 5 takes rope_parameters. "
            "Remove the wrong one, or make them equal."
        )
    return next(iter(numbers.values()))


def stale(where: str, key: str, said: Any, rows: int) -> tuple[str, ...]:
    """A note where a configuration's size of the vocabulary is not the rows that there are."""
    if said in (None, rows):
        return ()
    return (f"{where}: {key} is {str(said)[:60]} but the embedding has {rows} rows; the latter is used",)


def _as_table(value: Any) -> Mapping[str, Any]:
    """A section of a configuration; nothing where it is none."""
    return value if isinstance(value, Mapping) else {}

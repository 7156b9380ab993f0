"""The card that lies in a source's folder: its front matter, which machines read, and its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from neoxconv.core.model import Index
from neoxconv.storage import Place, is_file, open_storage

CARD = "README.md"
MARK = "<!-- neoxconv: files -->"  # where the table of a card of ours begins
TASK = "text-generation"
_LARGEST = 1 << 20  # bytes
_WITH_CARD = ("hf", "ctranslate2", "neox")  # formats whose folders are one model's, so that a card in them is its own
_FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("language", "languages")


@dataclass(frozen=True)
class SourceCard:
    """What the source says of itself; `front` holds plain values under texts."""

    front: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it is one that neoxconv made."""
        return MARK in self.text


def card_of(index: Index) -> SourceCard:
    """The source's own card, as far as it can be read; of one that cannot, a note."""
    path = _path_of(index)
    if path is None:
        return SourceCard()
    file = open_storage(path)
    if file.size > _LARGEST:
        return SourceCard(notes=(f"{CARD} has {file.size} bytes, more than {_LARGEST}: it is left out",))
    return parsed(file.text().decode(errors="replace"))


def _path_of(index: Index) -> Place | None:
    """Where the card lies: in the folder; of gpt-neox's `global_stepN` in the one above too."""
    if index.format not in _WITH_CARD:
        return None
    above = [index.folder.parent] if index.format == "neox" and is_file(index.folder.parent / "latest") else []
    return next((folder / CARD for folder in (index.folder, *above) if is_file(folder / CARD)), None)


def parsed(text: str) -> SourceCard:
    """A card's two parts. What is no front matter stays in the text."""
    match = _FRONT.match(text)
    if match is None:
        return SourceCard(text=text.strip())
    try:
        front = yaml.safe_load(match[1].replace("\t", "  "))
        front = {str(key): value for key, value in front.items()} if isinstance(front, dict) else {}
        front |= {name: _norwegian(front[name]) for name in _LANGUAGES if name in front}
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):  # all by odd tags
        return SourceCard(text=text[match.end() :].strip(), notes=(f"{CARD}: its front matter is no YAML, left out",))
    return SourceCard(front, text[match.end() :].strip())


def _norwegian(value: Any) -> Any:
    """Languages with Norwegian's code, which is YAML's word for false."""
    if isinstance(value, list):
        return [_norwegian(item) for item in value]
    return "no" if value is False else value

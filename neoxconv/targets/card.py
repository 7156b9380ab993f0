"""The card of a target, README.md: front matter for machines, a table of files, how to load them, where they are from.

The table stands between two marks, so that it can be made anew when files or measurements are added; a card without
them is not ours. Under ours the source's own card is carried on, its front matter within ours.

Fields: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from neoxconv.core.layout import Content, Entry
from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import FLOATS
from neoxconv.targets.about import provenance
from neoxconv.targets.metadata import NAME, Words
from neoxconv.targets.recipe import Recipe
from neoxconv.targets.source_card import MARK, TASK, SourceCard
from neoxconv.words import size

_END = "<!-- neoxconv: end of files -->"
_TABLE = re.compile(f"{MARK}.*?{_END}", re.DOTALL)
_OWN = "## The source's own card"
_MEASURED = "model-index"  # what the source's own weights scored: quantized ones do not
# What llama.cpp's converter reads of a card beside the Hub's fields, by our keys.
_NAMES = ("name", "basename", "size_label", "finetune", "version")


@dataclass(frozen=True)
class Loading:
    """What runs a target: the Hub's name of its library, further tags, and how to load it, in Markdown.

    In `how` stands {file} for the first file of weights.
    """

    library: str
    how: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A model in a card's table: its file or files, and what was measured of it; `kl` in nats a token."""

    name: str
    kind: str
    nbytes: int
    parameters: int
    kl: float | None = None

    @property
    def bits(self) -> float:
        """Bits per weight, of all bytes in its files."""
        return 8 * self.nbytes / self.parameters


def names_as_one(names: Sequence[str]) -> str:
    """The names of a model's files: one, or the first and how many."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def kind_of(content: Content, recipe: Recipe) -> str:
    """What the type of a target's matrices is called: as it was asked for, else the encoding that has most bytes."""
    sizes: dict[str, int] = {}
    for entry in _entries(content):
        sizes[entry.encoding.name] = sizes.get(entry.encoding.name, 0) + entry.nbytes
    return content.kind or recipe.type or recipe.dtype or max(sizes, key=lambda name: sizes[name])


def table_of(rows: Sequence[Row]) -> str:
    """The table between its marks; with a column for the divergence where it was measured of any."""
    measured = any(row.kl is not None for row in rows)
    head = ["file", "type", "size", "bits per weight", *(["KL divergence, nats a token"] if measured else [])]
    lines = [head, ["-", "-", "-:", "-:", *(["-:"] if measured else [])]]
    for row in rows:
        kl = "" if row.kl is None else np.format_float_positional(row.kl, 2, fractional=False, trim="-")
        lines.append([row.name, row.kind, size(row.nbytes), f"{row.bits:.2f}", *([kl] if measured else [])])
    return "\n".join([MARK, *(f"| {' | '.join(line)} |" for line in lines), _END])


def with_rows(card: str, rows: Sequence[Row]) -> str | None:
    """A card of ours with another table; None where it is not ours."""
    return _TABLE.sub(lambda _: table_of(rows), card, count=1) if _TABLE.search(card) else None


def card(words: Words, checkpoint: Checkpoint, content: Content, recipe: Recipe, *, loading: Loading) -> bytes:
    """README.md of a target."""
    front = yaml.safe_dump(_front(words, checkpoint, content, loading), sort_keys=False, allow_unicode=True, width=1000)
    names, total = [file.name for file in content.files], sum(file.size for file in content.files)
    row = Row(names_as_one(names), kind_of(content, recipe), total, checkpoint.parameters)
    only = [("A part of the model", f"tensors whose names hold {' or '.join(recipe.only)}")] if recipe.only else []
    facts = [*provenance(checkpoint), ("Tensors", _held(content)), *only]
    text = _carried(words.card)
    own = ["", _OWN, "", text] if text else []
    parts = [
        "---", front.rstrip("\n"), "---", "",
        f"# {words.keys[NAME]}", "",
        *_description(words),
        table_of([row]), "",
        "## How to load it", "",
        loading.how.replace("{file}", names[0]), "",
        "## Where it comes from", "",
        *(f"- {name}: {value}" for name, value in facts), *own, "",
    ]  # fmt: skip
    return "\n".join(parts).encode()


def _carried(card: SourceCard) -> str:
    """Of the source's card what is carried on; of one of ours what that had carried on."""
    return card.text.partition(_OWN)[2].strip() if card.ours else card.text


def _held(content: Content) -> str:
    """How many tensors have each type."""
    return ", ".join(f"{n} {name}" for name, n in Counter(e.encoding.name for e in _entries(content)).items())


def _entries(content: Content) -> Iterator[Entry]:
    """Every tensor of a target."""
    return (slot.entry for file in content.files for slot in file.slots if slot.number == 0)


def _description(words: Words) -> list[str]:
    text = words.keys.get("general.description")
    return [str(text), ""] if text else []


def _front(words: Words, checkpoint: Checkpoint, content: Content, loading: Loading) -> dict[str, Any]:
    """The front matter: what is known of the model, and of the source's own whatever is not decided here."""
    keys, carried = words.keys, dict(words.card.front)
    quantized = is_quantized(content)
    if quantized:
        carried.pop(_MEASURED, None)
    task = carried.get("pipeline_tag", TASK)
    tags = [*loading.tags, checkpoint.architecture.name, *(tag for tag in keys.get("general.tags", ()) if tag != task)]
    bases = _bases(words)
    made = {
        "license": keys.get("general.license"),
        "license_name": keys.get("general.license.name"),
        "license_link": keys.get("general.license.link"),
        "language": keys.get("general.languages"),
        "library_name": loading.library,
        "pipeline_tag": task,
        "base_model": bases[0] if len(bases) == 1 else bases,
        "base_model_relation": "quantized" if quantized and bases else carried.get("base_model_relation"),
        "datasets": words.datasets,
        "tags": list(dict.fromkeys(tags)),
        "quantized_by": keys.get("general.quantized_by"),
        **{f"model_{name}": keys.get(f"general.{name}") for name in _NAMES},
    }
    made = {name: value for name, value in made.items() if value not in (None, "", [])}
    decided = {*made, "languages", "dataset", "quantized_by", "base_model_relation", *_NAMES}
    return {**made, **{name: value for name, value in carried.items() if name not in decided}}


def _bases(words: Words) -> list[str]:
    """The model that this one is another form of: as the user says, else the source, else what that was made of."""
    said: Mapping[str, Any] = words.given
    own = any(key.startswith("general.base_model.") for key in said)
    return words.bases if own or not words.repo else [words.repo]


def is_quantized(content: Content) -> bool:
    """Whether any tensor is stored in less than plain numbers."""
    return any(entry.encoding.name not in FLOATS for entry in _entries(content))

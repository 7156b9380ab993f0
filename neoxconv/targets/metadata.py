"""What a target says of the model beside its weights, under GGUF's keys: name, size, license, where it comes from.

gguf's own code reads them from the source's card, config.json and name, as llama.cpp's converter does. Released models
add what is known of them, and the user's words (--metadata, --set) stand above all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neoxconv.arch.released import Release, released
from neoxconv.core.model import Checkpoint, Index
from neoxconv.formats.json_text import object_in
from neoxconv.storage import is_far, without_dots
from neoxconv.storage.hub import HUB, repository
from neoxconv.targets.about import size_label, title
from neoxconv.targets.given import above, given_keys, is_decided
from neoxconv.targets.recipe import Recipe
from neoxconv.targets.source_card import TASK, SourceCard, card_of

LIBRARY_TAGS = ("gguf", "gpt-neox", "bitsandbytes", "float8", "compressed-tensors", "mlx", "ctranslate2")
NAME, SIZE = "general.name", "general.size_label"
_WEB = "https://huggingface.co/"
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+(?:/|$)")
_STEP = re.compile(r"global_step(\d+)")
_SAMPLING = "sampling_"  # what fields of gguf's Metadata begin with that generation_config.json tells
# Their names in it, where they differ.
_OTHERWISE = {"temp": ("temperature",), "penalty_repeat": ("penalty_repeat", "repetition_penalty")}


@dataclass(frozen=True)
class Words:
    """A model in words: `keys` as GGUF has them; of the `given` ones the user said so.

    `repo` is the source itself on the Hub, ORG/NAME, where that is known.
    """

    keys: Mapping[str, Any]
    given: Mapping[str, Any]
    repo: str | None
    card: SourceCard
    notes: tuple[str, ...]

    @property
    def sampling(self) -> list[str]:
        """The keys that generation_config.json told."""
        return [key for key in self.keys if key.startswith("general.sampling.")]

    @property
    def bases(self) -> list[str]:
        """The models that this one was made of, as a card names them: ORG/NAME, else a URL."""
        return self._named("base_model")

    @property
    def datasets(self) -> list[str]:
        return self._named("dataset")

    def _named(self, kind: str) -> list[str]:
        count = self.keys.get(f"general.{kind}.count", 0)
        urls = [self.keys.get(f"general.{kind}.{i}.repo_url") for i in range(count if type(count) is int else 0)]
        return [url.removeprefix(_WEB).removeprefix("datasets/") for url in urls if isinstance(url, str)]


def words_of(checkpoint: Checkpoint, recipe: Recipe, generation: bytes | None = None) -> Words:
    """What is known of a model, from the source and by the recipe; `generation` is its generation_config.json.

    Raises PlanError where the recipe sets what weights and configuration decide, and CheckpointError for a bad file.
    """
    index, card = checkpoint.index, card_of(checkpoint.index)
    given = given_keys(recipe)
    names = _names(index)
    release = None if "base_model" in card.front else _release(checkpoint, names)
    repo = hub_name(index) or (release.repo if release else None)
    if index.typed:
        found = {k: v for k, v in index.settings.items() if k.startswith("general.") and not is_decided(k)}
    else:
        found = _found(checkpoint, card, repo or next(filter(_is_telling, names), None), generation)
    found = {**(_of_release(release) if release else {}), **found}
    found = {NAME: title(checkpoint), SIZE: size_label(checkpoint.parameters), **found}
    notes = [f"taken for {release.repo}, by its shapes and its name or step (--set changes it)"] if release else []
    return Words(above(given, found), given, repo, card, (*card.notes, *notes))


def file_stem(keys: Mapping[str, Any], kind: str | None = None) -> str:
    """The name of a model's file without its end, as gguf has it: NAME-SIZE-FINETUNE-VERSION-TYPE."""
    from gguf.metadata import Metadata
    from gguf.utility import naming_convention

    parts = [keys.get(f"general.{part}") for part in ("basename", "finetune", "version", "size_label")]
    if parts[0] is None:
        told = Metadata.get_model_id_components(str(keys[NAME]).strip().replace(" ", "-"))[2:]
        parts = [own or found for own, found in zip(parts, told, strict=True)]
    basename, finetune, version, size = (None if part is None else str(part) for part in parts)
    name = naming_convention(str(keys[NAME]), basename, finetune, version, size, kind)
    return re.sub(r"-{2,}", "-", re.sub(r"[^\w.+-]+", "-", name)).strip("-.") or "model"


def hub_name(index: Index) -> str | None:
    """ORG/NAME of a source on the Hub, or in its cache on this machine."""
    folder = index.folder
    if is_far(folder) and folder.protocol == HUB:
        return repository(folder.path).name
    match = _CACHED.search(f"{without_dots(folder)}/")
    return f"{match[1]}/{match[2]}" if match else None


def _names(index: Index) -> list[str]:
    """What the source is called, by its folders alone: of gpt-neox's steps the one above too. Of single files none."""
    if index.single:
        return []
    folder, said = without_dots(index.folder), index.settings.get("_name_or_path")
    above = [folder.parent.name] if _STEP.fullmatch(folder.name) else []
    own = [(hub_name(index) or folder.name).rpartition("/")[2], *above]
    return own + ([said.rpartition("/")[2]] if isinstance(said, str) else [])


def _is_telling(name: str) -> bool:
    """Whether a folder is called as models are, with a size, and not `out` or `checkpoint`."""
    from gguf.metadata import Metadata

    *_, basename, _, _, size = Metadata.get_model_id_components(name)
    return bool(basename and size)


def _release(checkpoint: Checkpoint, names: Collection[str]) -> Release | None:
    """The released model that the source is, if something tells."""
    step = _STEP.fullmatch(checkpoint.index.folder.name) if checkpoint.index.format == "neox" else None
    preset = checkpoint.opening.preset
    return released(checkpoint.architecture, checkpoint.config, names, preset, int(step[1]) if step else None)


def _found(checkpoint: Checkpoint, card: SourceCard, name: str | None, generation: bytes | None) -> dict[str, Any]:
    """The keys that gguf's code makes of a source's card, settings, generation_config.json and name."""
    from gguf.metadata import Metadata

    settings, total = checkpoint.index.settings, checkpoint.parameters
    said = settings.get("_name_or_path")
    usable = isinstance(said, str) and not said.startswith(("/", ".")) and "model_type" in settings
    front = {key: _plain(value) for key, value in (_without_library(card) or _plainly(checkpoint)).items()}
    params = {"_name_or_path": said} if usable else {"_name_or_path": name} if name else {}
    found = Metadata.apply_metadata_heuristic(Metadata(), front, params, Path(name) if name else None, total)
    told = object_in(generation) if generation else {}
    for field in fields(Metadata):
        part = field.name.removeprefix(_SAMPLING)
        values = [told[name] for name in _OTHERWISE.get(part, (part,)) if isinstance(told.get(name), int | float | str)]
        if part != field.name and values:
            setattr(found, field.name, values[0])
    if found.name is None:
        found.name, found.basename = title(checkpoint), found.basename or checkpoint.architecture.title
    return _keys(found)


def _without_library(card: SourceCard) -> dict[str, Any]:
    """A card's front matter; of one of ours without the tags of what runs that target, which the model has not."""
    tags = card.front.get("tags")
    own = [tag for tag in tags if tag not in LIBRARY_TAGS] if card.ours and isinstance(tags, list) else tags
    return {**card.front, **({"tags": own} if own else {})}


def _plainly(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a card would say of a model that has none, so that a way by a folder of ours changes no key."""
    return {"tags": [checkpoint.architecture.name], "pipeline_tag": TASK}


def _keys(metadata: Any) -> dict[str, Any]:
    """The keys that gguf writes of its Metadata, texts where it has texts."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(None, "")
    metadata.set_gguf_meta_model(writer)
    told = {key: value for key, value in writer.kv_data[0].items() if key != "general.architecture"}
    return {
        key: [str(item) for item in each.value]
        if each.type == GGUFValueType.ARRAY
        else (str(each.value) if each.type == GGUFValueType.STRING else each.value)
        for key, each in told.items()
    }


def _of_release(release: Release) -> dict[str, Any]:
    """What is known of a released model, in the words of its card."""
    from gguf.metadata import Metadata

    front = {
        "license": release.license,
        "language": list(release.languages),
        "datasets": list(release.datasets),
        "base_model": release.repo,
        "repo_url": f"{_WEB}{release.repo}",
    }
    made = Metadata.apply_metadata_heuristic(Metadata(), front, {"_name_or_path": release.repo})
    return _keys(made)


def _plain(value: Any) -> Any:
    """A value of a card's front matter with texts in lists, and no dates."""
    if isinstance(value, list):
        return [item if isinstance(item, dict) else str(item) for item in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)

"""Find a model's tokenizer: the files that were named, else those that certainly belong to the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import Tokenizer, from_gguf, load, load_folder
from neoxconv.formats.tokenizer.files import JSON, MERGES, SENTENCEPIECE, SETTINGS, VOCAB, read_bytes
from neoxconv.storage import Place, is_file, without_dots

_USUAL = (JSON, "20B_tokenizer.json")
_WITH_FILES = ("hf", "ctranslate2")  # formats whose folders hold a tokenizer's files as Hugging Face's do
_KINDS = ("HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer")  # gpt-neox's tokenizer_type, of those whose files we know


def tokenizer_of(checkpoint: Checkpoint, explicit: Path | None = None) -> Tokenizer | None:
    """The tokenizer at `explicit` (a file, or a folder with its files), else the source's; None where there is none.

    Raises CheckpointError where `explicit` holds none, where two candidates differ, or where a file cannot be read.
    """
    index = checkpoint.index
    folder = explicit or (index.folder if index.format in _WITH_FILES else None)
    if folder and folder.is_dir() and (found := load_folder(folder)):
        return found
    if "tokenizer.ggml.tokens" in index.settings and not explicit:
        return from_gguf(index.settings, str(index.where))
    path = find(explicit, index.folder, index.settings, [path.parent for path in index.configs])
    return _load_with_settings(path, index.settings) if path else None


def _load_with_settings(path: Place, configs: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file, with the merges that the YAML names, or the settings beside a tokenizer.json."""
    folder = load_folder(path.parent) if path.name == JSON and is_file(path.with_name(SETTINGS)) else None
    if folder:
        return folder
    merges = _setting(configs, "merge_file")
    beside = path.with_name(Path(merges).name) if merges else path.with_name(MERGES)
    return load(path, beside if is_file(beside) else None)


def find(
    explicit: Path | None, folder: Place, configs: Mapping[str, Any], config_dirs: Sequence[Place]
) -> Place | None:
    """The file with the vocabulary of the source in `folder`, or None where there is none.

    `explicit` (a file, or a folder that holds one) wins. Else what lies in `folder`, in the checkpoint's folder (the
    one with `latest`) or in the one above that; the nearest wins, and in it the file that the YAML `configs` name.
    Else where the YAML points, from `config_dirs`; never from the working folder. Raises CheckpointError where
    `explicit` holds nothing, or where two candidates differ.
    """
    if explicit is not None:
        chosen = _only([explicit] if is_file(explicit) else _inside(explicit, None))
        if chosen is None:
            raise CheckpointError(f"{explicit}: is no file, and no folder with a tokenizer.json. Correct --tokenizer.")
        return chosen
    named = _named(configs)
    near = next(filter(None, (_inside(place, named) for place in _places(folder))), [])
    pointed = [directory / named for directory in config_dirs] if named else []
    return _only([path for path in (*near, *pointed) if is_file(path)])


def _setting(configs: Mapping[str, Any], name: str) -> str | None:
    """A text in the YAML, which spells names with hyphens or underscores."""
    found = {str(key).replace("-", "_"): value for key, value in configs.items()}.get(name)
    return found if isinstance(found, str) else None


def _named(configs: Mapping[str, Any]) -> str | None:
    """The vocabulary file that the YAML names, where that is of a kind that we read."""
    kind = _setting(configs, "tokenizer_type") or "HFTokenizer"
    return _setting(configs, "vocab_file") if kind in _KINDS else None


def _places(folder: Place) -> list[Place]:
    """Where to look, nearest first: never further up than one above the folder that holds `latest`."""
    folder = without_dots(folder)
    saved = [path for path in (folder, folder.parent) if is_file(path / "latest")]
    return list(dict.fromkeys([folder, *(place for path in saved for place in (path, path.parent))]))


def _inside(folder: Place, named: str | None) -> list[Place]:
    """The candidates in one folder: the named file, else those of usual names, else every tokenizer-like one."""
    first = [folder / Path(named).name] if named else []
    usual = [folder / name for name in _USUAL]
    others = sorted(path for path in folder.glob("*tokenizer*.json") if path.name != SETTINGS)
    gpt_2 = [folder / VOCAB] if is_file(folder / MERGES) else []
    tiers = (first, usual, others, gpt_2, [folder / name for name in sorted(SENTENCEPIECE)])
    return next(filter(None, ([path for path in tier if is_file(path)] for tier in tiers)), [])


def _only(candidates: Sequence[Place]) -> Place | None:
    """The first candidate, or None; all must hold the same bytes."""
    for other in candidates[1:]:
        if read_bytes(candidates[0]) != read_bytes(other):
            raise CheckpointError(f"{candidates[0]} and {other} differ. Say with --tokenizer which one is the model's.")
    return candidates[0] if candidates else None

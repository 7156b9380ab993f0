"""Find a model's tokenizer: the file that was named, else one that certainly belongs to the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.formats import tokenizer
from neoxconv.formats.tokenizer import read_bytes
from neoxconv.storage import Place, is_file, without_dots

_USUAL = ("tokenizer.json", "20B_tokenizer.json")


def tokenizer_of(checkpoint: Checkpoint, explicit: Path | None = None) -> tokenizer.Tokenizer | None:
    """The tokenizer at `explicit`, else the one in or near the source; None where there is none."""
    index, path = checkpoint.index, tokenizer_path(checkpoint, explicit)
    if path:
        return tokenizer.load(path)
    return tokenizer.from_gguf(index.settings, str(index.where)) if "tokenizer.ggml.tokens" in index.settings else None


def tokenizer_path(checkpoint: Checkpoint, explicit: Path | None = None) -> Place | None:
    """Where the tokenizer of a checkpoint lies, as `find` says; None where no file holds it."""
    index = checkpoint.index
    return find(explicit, index.folder, index.settings, [path.parent for path in index.configs])


def find(
    explicit: Path | None, folder: Place, configs: Mapping[str, Any], config_dirs: Sequence[Place]
) -> Place | None:
    """The tokenizer file of the source in `folder`, or None where there is none.

    `explicit` (a file, or a folder that holds one) wins. Else what lies in `folder`, in the checkpoint's folder (the
    one with `latest`) or in the one above that; the nearest wins, and in it the file that the YAML `configs` name.
    Else where the YAML points, from `config_dirs` or the working folder. Raises CheckpointError where `explicit` holds
    nothing, or where two candidates differ.
    """
    if explicit is not None:
        chosen = _only([explicit] if is_file(explicit) else _inside(explicit, None))
        if chosen is None:
            raise CheckpointError(f"{explicit}: is no file, and no folder with a tokenizer.json. Correct --tokenizer.")
        return chosen
    named = _named(configs)
    near = next(filter(None, (_inside(place, named) for place in _places(folder))), [])
    pointed = [directory / named for directory in config_dirs] if named else []
    found = [path for path in (*near, *pointed) if is_file(path)]
    if not found and named and is_file(Path(named)):
        return Path(named)
    return _only(found)


def _named(configs: Mapping[str, Any]) -> str | None:
    """The vocabulary file that the YAML names, where that is a tokenizer.json (other types read other files)."""
    settings = {key.replace("-", "_"): value for key, value in configs.items()}
    named, kind = settings.get("vocab_file"), settings.get("tokenizer_type", "HFTokenizer")
    return named if isinstance(named, str) and kind == "HFTokenizer" else None


def _places(folder: Place) -> list[Place]:
    """Where to look, nearest first: never further up than one above the folder that holds `latest`."""
    folder = without_dots(folder)
    saved = [path for path in (folder, folder.parent) if is_file(path / "latest")]
    return list(dict.fromkeys([folder, *(place for path in saved for place in (path, path.parent))]))


def _inside(folder: Place, named: str | None) -> list[Place]:
    """The candidates in one folder: the named file, else those of usual names, else every tokenizer-like one."""
    first = [folder / Path(named).name] if named else []
    usual = [folder / name for name in _USUAL]
    others = sorted(path for path in folder.glob("*tokenizer*.json") if path.name != "tokenizer_config.json")
    present = ([path for path in tier if is_file(path)] for tier in (first, usual, others))
    return next(filter(None, present), [])


def _only(candidates: Sequence[Place]) -> Place | None:
    """The first candidate, or None; all must hold the same bytes."""
    for other in candidates[1:]:
        if read_bytes(candidates[0]) != read_bytes(other):
            raise CheckpointError(f"{candidates[0]} and {other} differ. Say with --tokenizer which one is the model's.")
    return candidates[0] if candidates else None

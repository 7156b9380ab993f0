"""Cards of what is made already: beside single files, and made anew when files or measurements were added.

A card tells every target in its folder by the manifests there. What `verify --level logits --json` printed of them is
looked for in verify.json beside them, which may tell of all, and in TARGET.verify.json. Only a README.md that neoxconv
made is changed, and in it only the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neoxconv.engine.manifest import MANIFEST, describe_sidecar, our_files, read_manifest
from neoxconv.engine.side_file import check_side_file, whole
from neoxconv.errors import PlanError
from neoxconv.formats.json_text import object_in
from neoxconv.storage import Place, is_here, read_bounded
from neoxconv.targets.card import Row, names_as_one, with_rows
from neoxconv.targets.source_card import CARD

_REPORT = "verify.json"
_LARGEST = 256 << 20  # bytes of a report, which has a number for every token


def check_card(target: Place) -> None:
    """Raise PlanError where no card can be written beside a single file, or what is there is not ours."""
    if not is_here(target):
        raise PlanError(f"{target}: --card writes a file on this machine; leave it out, or give a target here.")
    path = target.parent / CARD
    if target.parent.is_dir():
        check_side_file(path, ())
    if path.exists() and with_rows(_text(path), ()) is None:
        raise PlanError(f"{path}: is there already, and none of neoxconv's; leave --card out, or move it away.")


def write_card(target: Path, card: bytes) -> Path:
    """The card beside a single file: one of ours with a new table, or `card`, made for the file. Returns its path."""
    check_card(target)
    path = target.parent / CARD
    _write(path, _made_anew(_text(path) if path.exists() else card.decode(), [*rows_in(target.parent)]))
    return path


def refresh(folder: Path) -> tuple[Path, list[Row]]:
    """The card in a folder with a new table, and the table's rows; a target's manifest knows it then.

    Raises PlanError where there is no card of ours, or nothing that it could tell of.
    """
    path, manifest = folder / CARD, read_manifest(folder)
    if not path.is_file() or with_rows(_text(path), ()) is None:
        raise PlanError(f"{path}: is no card of neoxconv's; `convert --card` writes one beside a file.")
    rows = [*rows_in(folder)]
    made = _made_anew(_text(path), rows)
    _write(path, made)
    if manifest:
        entry = describe_sidecar(CARD, made.encode())
        manifest["files"] = [entry if file["name"] == CARD else file for file in manifest["files"]]
        _write(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return path, rows


def rows_in(folder: Path) -> Iterator[Row]:
    """A row for the target that a folder is, else one for each in it, by name."""
    if our_files(folder / MANIFEST) is not None:
        yield from _row(folder, folder / MANIFEST)
        return
    for path in sorted(folder.glob(f"*.{MANIFEST}")):
        yield from _row(path.with_name(path.name.removesuffix(f".{MANIFEST}")), path)
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        yield from _row(path.parent, path, f"{path.parent.name}/")


def _row(target: Path, path: Path, inside: str = "") -> Iterator[Row]:
    """The row of a target, by its manifest at `path`; none where that tells too little."""
    if our_files(path) is None or not target.exists():
        return
    manifest = object_in(path.read_bytes())
    files = [file for file in manifest["files"] if any(part["name"] for part in file["ranges"])]
    kind, parameters = manifest.get("type"), manifest.get("parameters")
    if files and isinstance(kind, str) and type(parameters) is int and parameters > 0:
        names = [inside + file["name"] for file in files] if target.is_dir() else [target.name]
        total = sum(file["bytes"] for file in files)
        yield Row(names_as_one(names), kind, total, parameters, _divergence(target, total))


def _divergence(target: Path, nbytes: int) -> float | None:
    """The mean KL divergence that a report beside a target of so many bytes of weights tells, in nats a token.

    None where there is none, or where it is of other bytes: the target was made anew since.
    """
    reports = (target.with_name(f"{target.name}.{_REPORT}"), target.with_name(_REPORT))
    rows = (row for path in reports if path.is_file() for row in _told_in(path))
    its = (row for row in rows if (Path(str(row.get("target"))).name, row.get("bytes")) == (target.name, nbytes))
    found: list[Any] = [row["kl"].get("mean") for row in its]
    return next((float(mean) for mean in found if isinstance(mean, int | float)), None)


def _told_in(path: Path) -> Iterator[Mapping[str, Any]]:
    """The targets that a report tells of whose predictions were compared."""
    rows = object_in(read_bounded(path, _LARGEST)).get("targets")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and isinstance(row.get("kl"), Mapping):
            yield row


def _made_anew(card: str, rows: Sequence[Row]) -> str:
    """A card of ours with other rows."""
    made = with_rows(card, rows)
    assert made is not None, "it was looked at"
    return made


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _write(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")

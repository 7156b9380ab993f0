"""The journal of a run: the plan's fingerprint, then one line for each written slot, each behind its CRC-32.

A hint; the hashes of what is on disk are the proof.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from neoxconv.core.layout import Digest
from neoxconv.engine.workplace import LOCK, has_files
from neoxconv.errors import PlanError

_FIELDS = {"sha256": str, "crc32": int, "overflow": int, "text": str}


class Journal:
    """What an earlier run wrote, by the slots' keys, in `known`; `add` notes what this run writes.

    `checked` says that they are refused where a value is not finite: what was not checked does not count then.
    """

    NAME: ClassVar[str] = "journal.jsonl"

    def __init__(self, folder: Path, fingerprint: str, *, checked: bool) -> None:
        self.path = folder / self.NAME
        self.known = read_journal(self.path, fingerprint, checked)
        fresh = self.path.with_suffix(".new")
        self.stream = fresh.open("w", encoding="utf-8")
        self.write({"fingerprint": fingerprint, "checked": checked})
        for key, digest in self.known.items():
            self.add(key, digest)
        os.replace(fresh, self.path)

    def write(self, line: dict[str, object]) -> None:
        text = json.dumps(line)
        self.stream.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        self.stream.flush()

    def add(self, key: str, digest: Digest) -> None:
        """Note the written bytes of a slot."""
        self.write({"slot": key, **asdict(digest)})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def read_journal(path: Path, fingerprint: str, checked: bool) -> dict[str, Digest]:
    """What an earlier run noted, if it made files; lines cut short or damaged are skipped.

    Raises PlanError where the earlier run had another plan, and for a folder that no run of ours can have left.
    """
    if not path.exists():
        if {other.name for other in path.parent.glob("*")} - {path.with_suffix(".new").name, LOCK}:
            raise PlanError(f"{path.parent}: is in the way, and not the unfinished work of a conversion; rename it.")
        return {}
    if not has_files(path.parent):
        return {}
    lines = [entry for line in path.read_text(errors="replace").splitlines() if (entry := _parse(line))]
    if not lines or lines[0].get("fingerprint") != fingerprint:
        raise PlanError(
            f"{path.parent}: holds the unfinished work of another conversion (another source, or a changed one, other "
            "options or another version). Finish that one with its own command, or remove the folder."
        )
    if checked and not lines[0].get("checked"):
        return {}
    return {str(entry.pop("slot")): _digest_of(entry) for entry in lines[1:] if set(entry) == {"slot", *_FIELDS}}


def _digest_of(values: dict[str, object]) -> Digest:
    """A digest as a journal's line has it; one that equals none where a value is not what it should be."""
    fits = all(isinstance(values[name], kind) for name, kind in _FIELDS.items())
    return Digest(**values) if fits else Digest("")  # type: ignore[arg-type]


def _parse(line: str) -> dict[str, object] | None:
    """A line's values, or None where it is not as it was written: a power cut left half of it, or it was damaged."""
    checksum, _, text = line.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    value = json.loads(text)
    return value if isinstance(value, dict) else None

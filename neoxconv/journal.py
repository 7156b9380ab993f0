"""The journal of a run: the plan's fingerprint, then one line for each finished step. A hint; hashes are the proof."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from neoxconv.errors import PlanError
from neoxconv.manifest import MANIFEST, Digest


class Journal:
    """Steps of an earlier run by key in `known`; `add` notes finished ones of this run.

    `checked` says that they are refused where a value is not finite: what was not checked does not count then.
    """

    NAME: ClassVar[str] = "journal.jsonl"

    def __init__(self, folder: Path, fingerprint: str, *, checked: bool) -> None:
        self.path, self.lock = folder / self.NAME, threading.Lock()
        self.known = read_journal(self.path, fingerprint, checked)
        fresh = self.path.with_suffix(".new")
        self.stream = fresh.open("w", encoding="utf-8")
        self.write({"fingerprint": fingerprint, "checked": checked})
        for key, digest in self.known.items():
            self.add(key, digest)
        os.replace(fresh, self.path)

    def write(self, line: dict[str, object]) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def add(self, key: str, digest: Digest) -> None:
        """Note a finished step; safe from any thread."""
        with self.lock:
            self.write({"step": key, "sha256": digest.sha256, "crc32": digest.crc32})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def read_journal(path: Path, fingerprint: str, checked: bool) -> dict[str, Digest]:
    """The finished steps that an earlier run noted; lines cut short are skipped.

    Raises PlanError where the earlier run had another plan, and for a folder that no run of ours can have left.
    """
    if not path.exists():
        present = {other.name for other in path.parent.glob("*")} - {path.with_suffix(".new").name}
        if present and MANIFEST not in present:
            raise PlanError(f"{path.parent}: is in the way, and not the unfinished work of a conversion; rename it.")
        return {}
    lines = [entry for line in path.read_text(errors="replace").splitlines() if (entry := parse(line))]
    if not lines or lines[0].get("fingerprint") != fingerprint:
        raise PlanError(
            f"{path.parent}: holds the unfinished work of another conversion (another source, or a changed one, other "
            "options or another version). Finish that one with its own command, or remove the folder."
        )
    if checked and not lines[0].get("checked"):
        return {}
    return {
        str(e["step"]): Digest(str(e["sha256"]), crc32)
        for e in lines[1:]
        if {"step", "sha256"} <= e.keys() and isinstance(crc32 := e.get("crc32"), int)
    }


def parse(line: str) -> dict[str, object] | None:
    """A line's values, or None where a power cut left half of it."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

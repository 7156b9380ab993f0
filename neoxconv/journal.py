"""The journal of a run: the plan's fingerprint, then one line for each finished step. A hint; hashes are the proof."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from neoxconv.errors import PlanError
from neoxconv.manifest import Digest


class Journal:
    """Steps of an earlier run by key in `known`; `add` notes finished ones of this run."""

    NAME: ClassVar[str] = "journal.jsonl"

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path, self.lock = folder / self.NAME, threading.Lock()
        self.known = read_journal(self.path, fingerprint)
        self.stream = self.path.open("w", encoding="utf-8")
        self.write({"fingerprint": fingerprint})
        for key, digest in self.known.items():
            self.add(key, digest)

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


def read_journal(path: Path, fingerprint: str) -> dict[str, Digest]:
    """The finished steps that an earlier run noted; lines cut short are skipped.

    Raises PlanError where the earlier run had another plan.
    """
    if not path.exists():
        return {}
    lines = [entry for line in path.read_text(errors="replace").splitlines() if (entry := parse(line))]
    if not lines:
        return {}
    if lines[0].get("fingerprint") != fingerprint:
        raise PlanError(
            f"{path.parent}: holds the unfinished work of another conversion (another source, recipe or version). "
            "Finish that one with its own command, or remove the folder."
        )
    return {
        str(e["step"]): Digest(str(e["sha256"]), int(str(e["crc32"])))
        for e in lines[1:]
        if {"step", "sha256", "crc32"} <= e.keys()
    }


def parse(line: str) -> dict[str, object] | None:
    """A line's values, or None where a power cut left half of it."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

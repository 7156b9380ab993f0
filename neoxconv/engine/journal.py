"""The journal of a run: the plan's fingerprint, then one line for each written slot, each behind its CRC-32.

A hint; the hashes of what is on disk are the proof.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from neoxconv.core.layout import Digest
from neoxconv.engine.checks import Checks
from neoxconv.engine.workplace import has_files, open_own
from neoxconv.errors import PlanError
from neoxconv.words import shell

NEW = "journal.new"  # one that is being begun
_LONGEST = 16 << 20  # bytes of a line
_CUT = re.compile(rb'[0-9a-f]{0,8}$|[0-9a-f]{8} (\{?"?$|\{"[a-z]{1,11}$|\{"fingerprint")')  # a header cut short
_FIELDS = {"sha256": str, "crc32": int, "overflow": int, "text": str}


class Journal:
    """What an earlier run wrote, by the slots' keys, in `known`; `add` notes what this run writes.

    `checks` are those of this run: what an earlier one wrote without one of them does not count.
    """

    NAME: ClassVar[str] = "journal.jsonl"

    def __init__(self, folder: Path, fingerprint: str, *, checks: Checks, files: Sequence[str], command: str) -> None:
        self.path = folder / self.NAME
        self.known = read_journal(self.path, fingerprint, checks)
        fresh = folder / NEW
        self.stream = open_own(fresh, "wb")
        self.write({"fingerprint": fingerprint, "checks": sorted(checks), "command": command, "files": [*files]})
        for key, digest in self.known.items():
            self.add(key, digest)
        os.replace(fresh, self.path)

    def write(self, line: dict[str, object]) -> None:
        text = json.dumps(line)
        self.stream.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self.stream.flush()

    def add(self, key: str, digest: Digest) -> None:
        """Note the written bytes of a slot."""
        self.write({"slot": key, **asdict(digest)})

    def fail(self) -> None:
        """Note that the run was stopped by what it read: mended, the source may be another one."""
        self.write({"failed": True})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def read_journal(path: Path, fingerprint: str, checks: Checks) -> dict[str, Digest]:
    """What an earlier run noted, if it made files with these checks; lines cut short or damaged are skipped.

    Raises PlanError where the earlier run had another plan.
    """
    if not path.exists() or not has_files(path.parent):
        return {}
    lines = _lines(path)
    if not lines or lines[0].get("fingerprint") != fingerprint:
        raise PlanError(
            f"{path.parent}: holds the unfinished work of another conversion (another source, or a changed one, other "
            "options or another version). Finish that one with its own command, or begin anew with --overwrite (to a "
            f"store: after {shell(['rm', '-r', str(path.parent)])})."
        )
    noted = lines[0].get("checks")
    if not isinstance(noted, list) or not checks.issubset(map(str, noted)):
        return {}
    return {str(entry.pop("slot")): _digest_of(entry) for entry in lines[1:] if set(entry) == {"slot", *_FIELDS}}


def is_of_another(path: Path, fingerprint: str, command: str | None = None) -> bool:
    """Whether the journal is of another plan; with a `command`, of one that failed at the source, mended since."""
    lines = _lines(path) if path.exists() else []
    if not lines or lines[0].get("fingerprint") == fingerprint:
        return False
    failed = any(line.get("failed") is True for line in lines)
    return command is None or (failed and lines[0].get("command") == command)


def is_journal(path: Path) -> bool:
    """Whether a file is a journal of ours: its first line is our header, or what a kill left of it."""
    try:
        with path.open("rb") as stream:
            line = stream.readline(_LONGEST)
    except FileNotFoundError:  # another run has just removed it
        return True
    if line.endswith(b"\n"):
        return "fingerprint" in (_parse(line[:-1].decode(errors="replace")) or {})
    return len(line) < _LONGEST and _CUT.match(line) is not None


def listed_files(path: Path) -> frozenset[str]:
    """The files that a journal's run makes in `target`; none where its header does not list them."""
    lines = _lines(path) if path.exists() else []
    names = lines[0].get("files") if lines else None
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


def _lines(path: Path) -> list[dict[str, object]]:
    """The lines that are as they were written."""
    return [entry for line in path.read_text(errors="replace").splitlines() if (entry := _parse(line))]


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

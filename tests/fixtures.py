"""Real checkpoints: where they are found, or why the test that asked for one is skipped.

$NEOXCONV_FIXTURES may name the folder of whole fixtures. What fits into the repository lies packed in tests/data and is
unpacked once into build/; what is larger may also lie in ../shared/fixtures, beside the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_name("data")
ADVICE = "set NEOXCONV_FIXTURES to the folder of the whole fixtures"


def fixture(path: str, needed: str = "") -> Path:
    """Return a fixture's folder or file, or skip the test if no place has it with `needed` (a pattern) inside."""
    for place in places():
        found = place / path
        if found.exists() and (not needed or any(found.glob(needed))):
            return found
    what = f"{path}/{needed}".rstrip("/")
    pytest.skip(f"{what} is larger than what tests/data holds: {ADVICE}")


def real(name: str) -> Path:
    """Return the folder of a fixture with all that its README tells of."""
    return fixture(name, "checkpoints/*/*model_states.pt")


@cache
def places() -> tuple[Path, ...]:
    """Return the folders to look in, the first first; the 20B tokenizer lies beside the whole fixtures."""
    named = os.environ.get("NEOXCONV_FIXTURES")
    folders = (*([Path(named).absolute()] if named else []), unpacked(), ROOT.parent / "shared" / "fixtures")
    return tuple(place for folder in folders for place in (folder, folder.parent, folder / "tokenizers"))


def unpacked() -> Path:
    """Return the folder of what tests/data packs, made at the first call; its name is a digest of the archives."""
    archives = sorted(DATA.glob("*.tar.xz"))
    digest = sha256(b"".join(sha256(path.read_bytes()).digest() for path in archives)).hexdigest()[:12]
    target = (ROOT / "build" if os.access(ROOT, os.W_OK) else Path(tempfile.gettempdir())) / f"test-data-{digest}"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix="unpacking-"))
    for archive in archives:
        unpack(archive, made)
    try:
        made.rename(target)
    except OSError:  # another worker was faster
        shutil.rmtree(made)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack with Python's lzma, or with the system's tar where Python was built without it."""
    try:
        with tarfile.open(archive) as packed:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            packed.extractall(folder, **safe)
    except tarfile.CompressionError:
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)

"""Whether what `make dist` built is whole: `python -m tests.dist dist` exits with what is missing, or too much.

The sdist holds what git tracks, the wheel what git tracks of the package, and the description links to nothing beside
it. For a checkout only: an sdist has no git.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = re.compile(r"PKG-INFO|setup\.cfg|neoxconv\.egg-info/.*")  # by setuptools, in every sdist
RELATIVE = re.compile(r"\]\((?!https?://|#)[^)]*\)")


def tracked(*under: str) -> set[str]:
    """The files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z", *under], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.rstrip("\0").split("\0"))


def files_of_sdist(path: Path) -> set[str]:
    """The files in an sdist, without its own folder and what setuptools adds."""
    with tarfile.open(path) as archive:
        names = (member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile())
        return {name for name in names if not MADE.fullmatch(name)}


def differences(what: str, found: set[str], expected: set[str]) -> list[str]:
    """One line for each file that is in one of the two only."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    return [f"{what} lacks {name}" for name in missing] + [f"{what} has {name}, untracked" for name in extra]


def faults(folder: Path) -> list[str]:
    """What is wrong with the one sdist and the one wheel in `folder`; raises ValueError where there is not one each."""
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        readme = str(BytesParser().parsebytes(archive.read(metadata)).get_payload())
    return [
        *differences("the sdist", files_of_sdist(sdist), tracked()),
        *differences("the wheel", names, tracked("neoxconv")),
        *(f"the description links to {link}" for link in RELATIVE.findall(readme)),
    ]


if __name__ == "__main__":
    sys.exit("\n".join(faults(Path(sys.argv[1]))) or 0)

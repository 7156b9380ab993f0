"""Convert onto a real disk (a tmpfs of 3 MB) that is too small, fills up in the middle, or may only be read.

    unshare --map-root-user --mount python -m tests.small_disk

It needs a mount namespace of its own, so that nothing else sees the disk. What the user is told is printed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.main import main
from neoxconv.engine.workplace import partial_of
from neoxconv.errors import NeoxconvError
from tests.helpers import digests
from tests.toy import toy

SIZE, CANNOT_MOUNT = 3 << 20, 77


def mount(folder: Path, *options: str) -> int:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join((f"size={SIZE}", *options)), "tmpfs", folder], check=False
    ).returncode


def fill(ballast: Path) -> None:
    """Take all that the disk has left."""
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def too_small(source: Path, disk: Path) -> None:
    """The plan is compared with the disk before anything is written."""
    (disk / "other").write_bytes(bytes(SIZE - (1 << 19)))
    assert main(["convert", str(source), str(disk / "x"), "--to", "hf", "--dtype", "f32", "--quiet"]) == 1
    assert [path.name for path in disk.iterdir()] == ["other"]
    (disk / "other").unlink()


def fills_up(source: Path, disk: Path, whole: Path) -> None:
    """Something else takes the disk while a conversion runs; once it is gone, the same command continues."""
    plan, target, ballast = make_plan(open_checkpoint(source), Recipe("hf")), disk / "x", disk / "ballast"
    for _ in range(2):
        try:
            run(plan, target, jobs=1, progress=lambda count: fill(ballast))
        except NeoxconvError as error:
            print(error)
        else:
            raise AssertionError("a full disk was not noticed")
        assert not target.exists() and partial_of(target).is_dir()
    ballast.unlink()
    assert digests(run(plan, target)) == digests(whole) and not partial_of(target).exists()


def read_only(source: Path, disk: Path) -> None:
    """Nothing may be written: said at once, by `convert` and where a report is asked for."""
    assert mount(disk, "remount", "ro") == 0
    assert main(["convert", str(source), str(disk / "y"), "--to", "hf", "--quiet"]) == 1
    assert main(["convert", str(source), str(disk / "x"), "--to", "hf", "--overwrite", "--quiet"]) == 1
    assert main(["convert", str(source), str(disk / "y.gguf"), "--to", "gguf", "--quiet"]) == 1
    assert main(["verify", str(disk / "x")]) == 0
    assert main(["verify", str(source), str(disk / "x"), "--level", "logits", "--html", str(disk / "r.html")]) == 1


def try_all(folder: Path) -> int:
    """0 where all went as it should."""
    disk = folder / "disk"
    if mount(disk):
        return CANNOT_MOUNT
    try:
        source = toy(folder)
        whole = run(make_plan(open_checkpoint(source), Recipe("hf")), folder / "whole")
        too_small(source, disk)
        fills_up(source, disk, whole)
        read_only(source, disk)
    finally:
        subprocess.run(["umount", disk], check=False)
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        sys.exit(try_all(Path(made)))

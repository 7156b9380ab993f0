"""Where compiled kernels are kept: wherever this user may write, or nowhere; never the code of other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from neoxconv.quant import kernel_cache
from neoxconv.quant.kernel_cache import SOURCES, digest, folder_for
from tests.oracles import ROOT

NOWHERE = "/dev/null/home"  # a file is in the way, for root too
CHILD = """
import numpy as np
from neoxconv.quant import ENCODINGS, kernels
assert ENCODINGS["BF16"].encode(np.ones((1, 2), np.float32)).tolist() == [[0x3F80, 0x3F80]]
print(kernels.narrow_bf16.stats.cache_path)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package in which nothing can be cached beside the sources."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "neoxconv", tmp_path / "installed" / "neoxconv", ignore=ignored)
    for folder in (tmp_path / "installed").rglob("quant/**/"):
        (folder / "__pycache__").touch()
    return tmp_path / "installed"


def cached_in(package: Path, before: str = "", **environment: str) -> str:
    """Where a child keeps the kernels, "None" for nowhere; it runs the code `before` first."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    changed = {"PYTHONPATH": str(package), "HOME": NOWHERE} | environment
    command = [sys.executable, "-c", before + CHILD]
    done = subprocess.run(command, cwd=package, env=kept | changed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_are_kept_in_a_private_temporary_folder_where_there_is_no_home(package: Path, tmp_path: Path) -> None:
    found = cached_in(package, TMPDIR=str(tmp_path))
    private = tmp_path / f"neoxconv-kernels-{os.geteuid()}"
    assert Path(found).is_relative_to(private) and any(Path(found).glob("*.nbc"))
    assert private.stat().st_mode & 0o777 == 0o700


def test_kernels_work_where_no_folder_can_be_written(package: Path) -> None:
    assert cached_in(package, f"import tempfile; tempfile.tempdir = {NOWHERE!r}\n") == "None"


def test_kernels_work_where_a_disk_is_full(package: Path, tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    assert cached_in(package, limited, HOME=str(tmp_path), TMPDIR=str(tmp_path)) == "None"


def test_others_kernels_are_not_kept_with_ours(package: Path, tmp_path: Path) -> None:
    early = "import numba; numba.njit(lambda x: x)\n"
    late = "import numba.core.config as config; assert config.CACHE_DIR == ''\n"
    assert Path(cached_in(package, early, HOME=str(tmp_path))).is_relative_to(tmp_path / ".cache" / "neoxconv")
    assert cached_in(package, f"from neoxconv.quant import kernels\n{late}", HOME=str(tmp_path))


def test_a_change_of_any_source_is_another_folder(tmp_path: Path) -> None:
    copy = tmp_path / "quant"
    shutil.copytree(SOURCES, copy)
    names = {digest(SOURCES, "1"), digest(SOURCES, "2")}
    assert len(names) == 2 and digest(copy, "1") == digest(SOURCES, "1")
    for file in sorted(copy.rglob("*.py")):
        file.write_text(file.read_text() + "\n")
        names.add(digest(copy, "1"))
    assert len(names) == 2 + len(list(copy.rglob("*.py"))) and "" not in names
    assert digest(tmp_path / "absent", "1") == ""


def test_the_users_choice_comes_first_then_the_caches_then_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, cache, home, temporary = (tmp_path / name for name in ("chosen", "cache", "home", "temporary"))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HOME", str(home))
    assert folder_for(str(chosen), "1") == chosen / digest(SOURCES, "1")
    assert folder_for(NOWHERE, "1") == cache / "neoxconv" / "kernels" / digest(SOURCES, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder_for("", "1") == home / ".cache" / "neoxconv" / "kernels" / digest(SOURCES, "1")
    monkeypatch.setenv("HOME", NOWHERE)
    assert folder_for("", "1") == temporary / f"neoxconv-kernels-{os.geteuid()}" / digest(SOURCES, "1")


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_folder_that_others_may_have_prepared_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """What lies in it is run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    private = tmp_path / f"neoxconv-kernels-{os.geteuid()}"
    match trap:
        case "link":
            (tmp_path / "other").mkdir(mode=0o700)
            private.symlink_to(tmp_path / "other")
        case "open":
            private.mkdir()
            private.chmod(0o777)
        case "file":
            private.touch()
    assert folder_for("", "1") is None
    monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: os.getuid() + 1)
    (tmp_path / f"neoxconv-kernels-{os.getuid() + 1}").mkdir(mode=0o700)
    assert folder_for("", "1") is None  # it is another user's


def test_threads_that_make_kernels_at_once_all_find_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of kernels are imported when they are needed, by any thread; a kernel was once cached where one stood."""
    from numba import config

    from neoxconv.quant import kernels

    before, seen = config.CACHE_DIR, []

    def njit(**options: object) -> Callable[[object], object]:
        time.sleep(0.01)
        seen.append(config.CACHE_DIR)
        time.sleep(0.01)
        seen.append(config.CACHE_DIR)
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    monkeypatch.setattr(kernels, "_CACHE", Path("/the/folder"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(kernels.kernel, [len] * 16))
    assert set(seen) == {"/the/folder"} and before == config.CACHE_DIR


def test_a_part_is_for_kernels_only() -> None:
    """It has no machine code of its own; called from Python it must fail, not answer."""
    from neoxconv.quant import kernels

    with pytest.raises((TypeError, ValueError)):
        kernels.half_bits(np.uint32(0))

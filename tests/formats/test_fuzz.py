"""Two thousand damaged and hostile files for every parser: each is read or refused, in bounded time and memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import PARSERS, start_watching, verdict
from tests.fuzz_inputs import nth_input
from tests.helpers import few
from tests.oracles import ROOT


@pytest.mark.parametrize("count", few((500, 2000), 500))
def test_whatever_a_file_holds_is_read_or_refused(count: int, tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(count), "--failures", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == [*PARSERS]
    for _, inputs, read, refused, failed, _ in rows:
        assert (int(inputs), int(failed)) == (count, 0)
        assert int(read) > 0 and int(refused) > 0 and int(read) + int(refused) == count


def test_inputs_are_the_same_every_time() -> None:
    code = "from tests.fuzz_inputs import *; import hashlib; print(hashlib.sha256(b''.join("
    code += "nth_input(n, 0, i) for n in KINDS_OF for i in range(50))).hexdigest())"
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) for _ in range(2)]
    assert runs[0] == runs[1] and nth_input("zip", 0, 1) != nth_input("zip", 1, 1)


# --- the harness sees what it is there for ---------------------------------------------------------------------------


def imports(path: Path) -> None:
    import this  # noqa: F401


def opens(path: Path) -> None:
    Path("/etc/passwd").read_bytes()


def writes(path: Path) -> None:
    path.write_bytes(b"")


def runs(path: Path) -> None:
    subprocess.run(["true"], check=True)


def hides(path: Path) -> None:
    with contextlib.suppress(BaseException):
        opens(path)


def evaluates(path: Path) -> None:
    eval(path.read_text())


def lingers(path: Path) -> None:
    while True:
        pass


def fails(path: Path) -> None:
    raise KeyError("a")


FAULTS: dict[Callable[[Path], None], str] = {
    imports: "import", opens: "open", writes: "open", runs: "subprocess", hides: "swallowed", evaluates: "compile",
    lingers: "TooSlow", fails: "KeyError",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_parser_that_misbehaves_is_found(fault: Callable[[Path], None], tmp_path: Path) -> None:
    start_watching()
    (tmp_path / "x").write_text("1 + 1")
    sys.modules.pop("this", None)
    assert FAULTS[fault] in verdict(fault, tmp_path / "x", 0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such limit")
def test_a_parser_that_takes_too_much_memory_is_found() -> None:
    code = "from pathlib import Path; from tests.fuzz import *; limit_memory(MEMORY); start_watching();"
    code += "print(verdict(lambda path: bytearray(1 << 27), Path('/tmp/x')))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).startswith("MemoryError")

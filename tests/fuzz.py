"""Damaged and hostile files for every parser of untrusted bytes, the same ones every time: `make fuzz`.

    python -m tests.fuzz [--inputs 100000] [--seed 0] [--failures FOLDER] [parser ...]

An input is read, or refused with a CheckpointError that names the file, in printable lines of bounded length. Anything
else is a failure: another exception, more than 5 s of processor time, more than 64 MiB beyond what the process had
before, an import, a file outside the input's folder, or any other event that Python's audit hooks report. Of what is
read, the first and the last rows of every tensor are read too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from neoxconv.arch.gpt_neox.config import from_neox
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.tensor import LazyTensor
from neoxconv.errors import LONGEST, CheckpointError
from neoxconv.formats import imatrix, safetensors
from neoxconv.formats.ctranslate2.read import read_model
from neoxconv.formats.gguf import read as gguf
from neoxconv.formats.neox.yaml_settings import read_configs
from neoxconv.formats.pt import read_pt
from neoxconv.formats.pt.tensors import Record, View, tensor_in
from neoxconv.formats.pt.unpickle import load_pickle
from neoxconv.formats.tokenizer import Tokenizer, charsmap, spiece
from neoxconv.formats.tokenizer.from_spiece import of_spiece
from neoxconv.sources.checkpoint import open_checkpoint
from neoxconv.storage import open_storage
from neoxconv.verify.bytes import verify_bytes
from tests.fuzz_inputs import STORAGES, model, nth_input, seeds

SECONDS, MEMORY = 5.0, 64 << 20
LINES = 11  # of a message, where several problems are told at once
BAND, MOST_TENSORS, MOST_VALUES = 1 << 20, 64, 4096
READS = ("open", "os.listdir", "os.scandir", "glob.glob", "glob.glob/2", "pathlib.Path.glob", "pathlib.Path.rglob")
SAVED = 3  # inputs of each kind of failure


class Forbidden(BaseException):
    """A parser did what none may do; no `except` of a parser's takes it for damage."""


class TooSlow(BaseException):
    """A parser took too long."""


# --- watching --------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What audit events may touch while `folder` is set: that folder, to read from it."""

    folder: str | None = None
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if self.folder is None or self.allowed(event, given):
            return
        self.seen.append(f"{event}{given!r:.200}")
        raise Forbidden(self.seen[-1])

    def allowed(self, event: str, given: tuple[Any, ...]) -> bool:
        """Whether an event is one of reading in the folder."""
        reads = event in READS and not (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        inside = (
            reads and isinstance(given[0], str | Path) and os.path.realpath(given[0]).startswith(self.folder or "/")
        )
        return inside or event in ("builtins.id", "object.__getattr__", "sys._getframe")


WATCH = Watch()


@contextlib.contextmanager
def watched(folder: Path, seconds: float = SECONDS) -> Iterator[None]:
    """Raise Forbidden for whatever is done beyond reading in `folder`, and TooSlow after so much processor time."""
    WATCH.seen, WATCH.folder = [], os.path.realpath(folder)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        WATCH.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)


def too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise TooSlow


@cache
def start_watching() -> None:
    """Install the audit hook, which stays, and the clock."""
    signal.signal(signal.SIGPROF, too_slow)
    sys.addaudithook(WATCH)


def limit_memory(more: int) -> None:
    """Let the process have `more` bytes beyond what it has, where the system tells and keeps such limits (Linux)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- parsers ---------------------------------------------------------------------------------------------------------


def read_bands(tensors: Iterable[LazyTensor]) -> None:
    """Read the first and the last rows of tensors, up to 1 MiB of each."""
    for tensor in list(tensors)[:MOST_TENSORS]:
        row = max(tensor.dtype.size(tensor.columns), 4 * tensor.columns, 1)
        count = min(tensor.rows, BAND // row)
        for start in (0, tensor.rows - count):
            found = tensor.read(start, start + count)
            assert found.nbytes <= BAND, f"{count} rows of {tensor.shape} have {found.nbytes} bytes"
            assert len(found) == count or not tensor.shape, f"{len(found)} rows, not {count}"


def tensors_in(value: Any) -> list[LazyTensor]:
    """The tensors among the first values of a tree."""
    level, found = [value], []
    while level and len(found) < MOST_VALUES:
        found += level[:MOST_VALUES]
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list | tuple)]
        level = [child for each in inside for child in each][:MOST_VALUES]
    return [each for each in found if isinstance(each, LazyTensor)]


def of_pt(path: Path) -> None:
    read_bands(tensors_in(read_pt(open_storage(path)).value))


def of_pickle(path: Path) -> None:
    """A pickle without a zip around it; its storages lie in the file itself."""
    file = open_storage(path)
    sizes = {key: min(len(data), file.size) for key, data in STORAGES.items()}

    def make_tensor(*place: Any) -> LazyTensor:
        if place[0].key not in sizes:
            raise ValueError("no such storage")
        return tensor_in(file, Record(0, sizes[place[0].key], 0), View(*place))

    read_bands(tensors_in(load_pickle(io.BytesIO(file.text()), make_tensor, str(path))))


def of_safetensors(path: Path) -> None:
    read_bands(safetensors.read_header(open_storage(path)).tensors.values())


def of_gguf(path: Path) -> None:
    found = gguf.index(path)
    read_bands(found.ranks[0].values())
    if "gptneox.block_count" in found.settings:
        read_bands(open_checkpoint(path).tensors.values())


def of_ctranslate2(path: Path) -> None:
    """A model.bin alone, and as a model."""
    read_bands(read_model(path).tensors.values())
    read_bands(open_checkpoint(path.parent).tensors.values())


def of_imatrix(path: Path) -> None:
    assert all(values.dtype == "f4" for values in imatrix.read(path).entries.values())


def of_sentencepiece(path: Path) -> None:
    """What would be written of it, and its map of characters."""
    file = spiece.read(path.read_bytes(), str(path))
    found = of_spiece(Tokenizer(b"", path, {path.name: path.read_bytes()}), file)
    assert {*found.types} == {*found.ids} and found.unknown in found.ids
    assert charsmap.makes_spaces(file.charsmap) in (True, False)


def of_hf(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    read_bands([*checkpoint.tensors.values(), *checkpoint.index.ranks[0].values()])


def of_yaml(path: Path) -> None:
    """The settings, and what is told of those that are not supported."""
    settings = read_configs([path])
    index = Index("neox", path.parent, (), (), settings, configs=(path,))
    from_neox(index, Measured(2, 16, 64, 32, False), Opening(Path()))


def of_manifest(path: Path) -> None:
    """A manifest that does not fit is a finding, and printable as one line."""
    for finding in verify_bytes(path.parent).findings:
        assert str(finding).isprintable() and len(str(finding)) <= LONGEST, str(finding)


def in_file(name: str) -> Callable[[Path, bytes], Path]:
    """Puts an input into a file of that name."""

    def put(folder: Path, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return put


def in_model(folder: Path, data: bytes) -> Path:
    """Puts an input, whose first line names a file, into a whole model's folder."""
    for name, content in model().items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
    changed = folder / "changed"
    for name in changed.read_text().split("\n") if changed.exists() else ():
        (folder / name).write_bytes(model()[name])
    name, _, content = data.partition(b"\n")
    target = name.decode("latin1") if name.decode("latin1") in model() else "config.json"
    changed.write_text(target)
    (folder / target).write_bytes(content)
    return folder


@dataclass(frozen=True)
class Parser:
    """A parser: where its input goes, and what reads it."""

    put: Callable[[Path, bytes], Path]
    read: Callable[[Path], None]


PARSERS = {
    "zip": Parser(in_file("x.pt"), of_pt),
    "legacy": Parser(in_file("x.pt"), of_pt),
    "pickle": Parser(in_file("x.pkl"), of_pickle),
    "safetensors": Parser(in_file("x.safetensors"), of_safetensors),
    "gguf": Parser(in_file("x.gguf"), of_gguf),
    "ctranslate2": Parser(in_file("model.bin"), of_ctranslate2),
    "imatrix": Parser(in_file("x.dat"), of_imatrix),
    "sentencepiece": Parser(in_file("x.model"), of_sentencepiece),
    "hf": Parser(in_model, of_hf),
    "yaml": Parser(in_file("x.yml"), of_yaml),
    "manifest": Parser(in_file("manifest.json"), of_manifest),
}


# --- verdicts --------------------------------------------------------------------------------------------------------


def verdict(read: Callable[[Path], None], path: Path, seconds: float = SECONDS) -> str:
    """ "read", "refused", or what is wrong about how a parser took the file or folder at `path`."""
    folder = path if path.is_dir() else path.parent
    try:
        with watched(folder, seconds):
            read(path)
    except CheckpointError as error:
        return about(error, path, folder) or swallowed() or "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return swallowed() or "read"


def swallowed() -> str:
    """What was forbidden and yet did not end the reading."""
    return f"swallowed {WATCH.seen[0]}" if WATCH.seen else ""


def about(error: BaseException, path: Path, folder: Path) -> str:
    """What is wrong with an error's message, or with what caused it; nothing is empty."""
    cause: BaseException | None = error
    while cause := cause and (cause.__cause__ or cause.__context__):
        if isinstance(cause, MemoryError):
            return "took too much memory"
    message = str(error).replace(str(folder), "")
    lines = message.split("\n")
    if str(path) not in str(error):
        return f"the message does not name the file: {message!r:.300}"
    if len(lines) > LINES or any(str(folder) not in line for line in str(error).split("\n")[:10]):
        return f"the message is torn into {len(lines)} lines: {message!r:.300}"
    if not all(line.isprintable() for line in lines):
        return f"the message is not printable: {message!r:.300}"
    longest = max(map(len, str(error).split("\n")))
    return f"the message is {longest} characters long: {message!r:.300}" if longest > LONGEST else ""


@dataclass
class Outcome:
    """What became of a parser's inputs: failures by their kind, each with the first inputs."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[bytes]] = field(default_factory=dict)
    seconds: float = 0

    def add(self, found: str, data: bytes) -> None:
        self.counts[found if found in ("read", "refused") else "failed"] += 1
        if found not in ("read", "refused"):
            self.failures.setdefault(kind_of(found), []).append(data)


def kind_of(found: str) -> str:
    """A failure without its numbers and quoted texts, to tell kinds apart."""
    return re.sub(r"\d+|'.*'|\".*\"", "#", found)[:60]


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> Outcome:
    """Read so many inputs with a parser, in `folder`."""
    parser, outcome, start = PARSERS[name], Outcome(), time.perf_counter()
    for number in range(inputs):
        data = nth_input(name, seed, number)
        outcome.add(verdict(parser.read, parser.put(folder, data)), data)
    outcome.seconds = time.perf_counter() - start
    return outcome


def smallest(parser: Parser, data: bytes, kind: str, folder: Path) -> bytes:
    """The input without whatever it takes to fail in the same way: halves first, single bytes last."""
    size = len(data) // 2
    while size:
        for start in range(0, len(data), size):
            shorter = data[:start] + data[start + size :]
            if kind_of(verdict(parser.read, parser.put(folder, shorter))) == kind:
                data = shorter
                break
        else:
            size //= 2
    return data


def warm_up(name: str, folder: Path) -> None:
    """Read the valid files, so that whatever parsers import is there before anything is watched."""
    parser = PARSERS[name]
    for data in seeds(name):
        with contextlib.suppress(CheckpointError):
            parser.read(parser.put(folder, data))
    for number in range(20):
        with contextlib.suppress(CheckpointError):
            parser.read(parser.put(folder, b"{" + bytes([number])))


def save(name: str, outcome: Outcome, folder: Path, target: Path) -> None:
    """Tell of failures, and keep their smallest inputs in `target`."""
    for number, (kind, found) in enumerate(outcome.failures.items()):
        target.mkdir(parents=True, exist_ok=True)
        print(f"  {len(found)} inputs: {kind}")
        for each, data in enumerate(found[:SAVED]):
            shorter = smallest(PARSERS[name], data, kind, folder)
            file = target / f"{name}-{number}-{each}"
            file.write_bytes(shorter)
            said = verdict(PARSERS[name].read, PARSERS[name].put(folder, shorter))
            print(f"    {file}: {len(shorter)} bytes: {said}\n      {shorter[:200].hex()}")


def fuzz_all(names: Collection[str], inputs: int, seed: int, target: Path) -> int:
    """Print a line for each parser, and return how many inputs failed."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    failed = 0
    print(f"{'parser':12}{'inputs':>8}{'read':>8}{'refused':>9}{'failed':>8}{'seconds':>9}")
    for name in names:  # all of them before memory is limited: what they import takes more
        with tempfile.TemporaryDirectory(dir=shared) as made:
            warm_up(name, Path(made))
    for name in names:
        with tempfile.TemporaryDirectory(dir=shared) as made:
            folder = Path(made)
            limit_memory(MEMORY)
            outcome = fuzz(name, inputs, seed, folder)
            counts = [outcome.counts[word] for word in ("read", "refused", "failed")]
            print(f"{name:12}{inputs:8}{counts[0]:8}{counts[1]:9}{counts[2]:8}{outcome.seconds:9.1f}", flush=True)
            save(name, outcome, folder, target)
            failed += counts[2]
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("parsers", nargs="*", metavar="parser", help=f"of {', '.join(PARSERS)}; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where failing inputs are kept")
    given = parser.parse_args()
    if strangers := set(given.parsers) - set(PARSERS):
        parser.error(f"there is no parser {', '.join(sorted(strangers))}; there are {', '.join(PARSERS)}")
    warnings.simplefilter("ignore")  # numpy's, on weights that are no numbers
    start_watching()
    return 1 if fuzz_all(given.parsers or PARSERS, given.inputs, given.seed, given.failures) else 0


if __name__ == "__main__":
    raise SystemExit(main())

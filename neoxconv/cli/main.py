"""The command line: a command's help text and its one call into the library, errors as messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something differs, 130 and 143 stopped by Ctrl-C and SIGTERM.
What the options are, and their help, stands in `options/`; what a command does in the file of its name. Only click and
plain names are imported at the top, so that `neoxconv --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from neoxconv.cli.options.calibrate import of_calibrate
from neoxconv.cli.options.convert import of_convert
from neoxconv.cli.options.others import of_card, of_demo, of_formats, of_inspect
from neoxconv.cli.options.shared import verbose
from neoxconv.cli.options.verify import of_verify
from neoxconv.cli.printing import say
from neoxconv.cli.values import FOLDER_GONE
from neoxconv.errors import NeoxconvError, PlanError, VerifyError, one_line
from neoxconv.version import __version__
from neoxconv.words import plural, table

if TYPE_CHECKING:
    from neoxconv.storage import Place

_FAILED, _DIFFERS, _INTERRUPTED, _TERMINATED = 1, 3, 130, 143  # 2, wrong usage, is click's


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="neoxconv")
@verbose
def commands() -> None:
    """Convert GPT-NeoX checkpoints in bounded memory, and verify the result."""


@commands.command()
@of_inspect
def inspect(source: Place, **given: Any) -> int:
    """Show what SRC is, its configuration, and what its bytes are for.

    With --check the exit code is 3 where any byte is not as its format's checksums say. With --try only the readings
    are shown (--qkv-layout, --rmsnorm), the best first.
    """
    from neoxconv.cli import inspect
    from neoxconv.cli.source import Reading, checked, chosen, opened

    if given["text"]:
        from neoxconv.cli.readings import tried

        found_by_trying = tried(source, chosen(Reading, given), given["text"])
        say(_as_json(found_by_trying.facts) if given["json"] else found_by_trying.listing)
        return 0
    checkpoint = opened(source, chosen(Reading, given))
    found = checked(checkpoint, jobs=given["jobs"], quiet=given["json"]) if given["check"] else None
    facts = inspect.inspect(checkpoint, found)
    say(_as_json(facts) if given["json"] else inspect.render(facts, given["tensors"]))
    return _DIFFERS if found and found.damage else 0


@commands.command()
@of_convert
def convert(source: Place, target: str, **given: Any) -> None:
    """Convert SRC into DST. Interrupted, the same command continues.

    SRC is a gpt-neox checkpoint (its folder, its global_stepN or a file in it), a Hugging Face folder, a .safetensors
    or a .gguf file, here or at a URL (hf://ORG/NAME, https://, s3://, ...). DST is a folder, or the file itself for
    safetensors and gguf, here, in an object store (s3://, gs://, ...) or in a repository (hf://ORG/NAME). Where DST is
    a folder already, or ends with a slash, such a file goes into it as NAME-SIZE-TYPE.gguf.

    With several types, as in --type Q8_0,Q4_K_M, DST is a folder, in which each target has a name of its own.
    """
    from neoxconv.cli.convert import prepare
    from neoxconv.cli.recipes import is_several
    from neoxconv.cli.several import prepare_several
    from neoxconv.storage import is_here, place

    where = place(target)
    if click.get_current_context().find_root().obj["gone"] and not is_here(where):  # made in the working folder
        raise PlanError(FOLDER_GONE)
    request = prepare_several(source, where, given) if is_several(given) else prepare(source, target, given)
    if given["dry_run"]:
        if given["json"] or not given["quiet"]:
            say(json.dumps(request.facts) if given["json"] else request.listing)
        return
    quiet = given["quiet"] or given["json"]
    if not quiet:
        say(request.summary, err=True)
    result = request.run(quiet)
    if given["json"]:
        say(json.dumps(result))
    elif not quiet:
        say(request.farewell(result))


@commands.command()
@of_card
def card(folder: Path) -> None:
    """Make the table of a card anew: FOLDER's README.md, as `convert` wrote it.

    It tells every target in FOLDER by its manifest. What `verify --level logits --json` printed is looked for in
    FOLDER/verify.json, for all targets there, and in TARGET.verify.json, for the column with the KL divergence.
    """
    from neoxconv.engine.cards import refresh

    path, rows = refresh(folder)
    measured = sum(row.kl is not None for row in rows)
    say(f"{path}: {plural(len(rows), 'target')}, {measured} with a measured divergence")


@commands.command()
@of_calibrate
def calibrate(source: Place, **given: Any) -> None:
    """Make an importance matrix of SRC from a text, for `convert --imatrix` and for llama.cpp's tools.

    SRC is run layer by layer from disk. The matrix has, for each column of each layer's matrices, the mean square of
    what it is multiplied with.
    """
    from neoxconv.cli.calibrate import asked_for, make_matrix

    told = make_matrix(asked_for(source, given))
    if not given["quiet"]:
        say(told)


@commands.command()
@of_formats
def formats(**given: Any) -> None:
    """List every target and type: bits per weight, the size of 20B, how far a weight is rounded at most, and how far
    predictions move; then which programs run each target.

    KL is the mean divergence from the F16 file in nats a token, measured on a small trained model.
    """
    from dataclasses import asdict

    from neoxconv.cli.formats import catalog

    rows = catalog()
    if given["json"]:
        say(json.dumps([asdict(row) for row in rows]))
        return
    lines = [("format", "option", "bits/weight", "20B in GB", "in GiB", "rounded by at most", "KL")]
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.6f}"
        sizes = f"{row.bits:.2f}", f"{row.nbytes / 1e9:.2f}", f"{row.nbytes / 2**30:.2f}"
        lines.append((row.format, f"{row.option} {row.type}", *sizes, row.bound or "", divergence))
    programs = {row.format: row.programs for row in rows}
    say(table("<<>>><>", lines) + "\n\n" + table("<<", [("format", "is run by"), *programs.items()]))


@commands.command()
@of_verify
def verify(paths: tuple[Place, ...], **given: Any) -> int:
    """Check TARGET: its bytes, with SRC every weight, and with --level logits what it predicts.

    SRC is then run as it was trained, rank by rank, and TARGET beside it, streamed from disk layer by layer. Of several
    targets each is checked; SRC is run once for all of them. The last line says which levels ran and whether they
    passed; the exit code is 3 where anything differs.
    """
    from neoxconv.cli.verify import asked_for, audit, digests

    if given["sha256sums"]:
        for line in digests(paths, given):
            say(line)
        return 0
    outcome = audit(asked_for(paths, given))
    shown = outcome.verdict if given["quiet"] else outcome.listing
    say(_as_json(outcome.facts) if given["json"] else shown)
    if outcome.error:
        return _complain(outcome.error, _FAILED)
    return 0 if outcome.passed else _DIFFERS


@commands.command()
@of_demo
def demo(folder: Path) -> int:
    """Make a small checkpoint, convert it to every format, verify each.

    All of it lies in FOLDER (neoxconv-demo by default). Needs no network.
    """
    from neoxconv.cli.demo import run_demo

    return 0 if run_demo(folder, say) else _DIFFERS


def _as_json(facts: Any) -> str:
    """Facts as one line of JSON."""
    return json.dumps(finite(facts), allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: stop as for Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own), print what goes wrong to stderr, and return the exit code."""
    if not hasattr(os, "preadv"):
        return _complain(
            "this system cannot read files at an offset (no os.preadv): Windows is not supported.", _FAILED
        )
    signal.signal(signal.SIGTERM, _terminate)
    session = {"verbose": False, "gone": _leave_removed_folder()}
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        return commands.main(words, "neoxconv", standalone_mode=False, obj=session) or 0
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
        _show_usage(error)
    except (click.Abort, KeyboardInterrupt) as stop:
        message, code = _stopped(stop)
        _complain(message, code)
    except Exception as error:
        if session["verbose"]:
            say(traceback.format_exc().rstrip("\n"), err=True)
        message, code = _explain(error)
        _complain(message, code)
    if "--json" in words[: words.index("--") if "--" in words else None]:
        _answer(message, code)
    return code


def _answer(message: str, code: int) -> None:
    """Tell a machine of an error, on stdout; nothing where that is what is broken."""
    with contextlib.suppress(OSError):
        click.echo(json.dumps({"error": message, "code": code}))


def _show_usage(error: click.ClickException) -> None:
    """Print an error of usage as click does, with nothing in it that a terminal obeys."""
    shown = io.StringIO()
    error.show(shown)
    say(shown.getvalue().rstrip("\n"), err=True)


def _stopped(stop: BaseException) -> tuple[str, int]:
    """How to go on after Ctrl-C or SIGTERM, which click wraps, and the exit code."""
    cause = stop.__cause__ or stop
    return one_line(cause) or "stopped.", _TERMINATED if isinstance(cause, _Terminated) else _INTERRUPTED


def _explain(error: Exception) -> tuple[str, int]:
    """What went wrong, and the exit code for it."""
    if isinstance(error, NeoxconvError):
        return str(error), _DIFFERS if isinstance(error, VerifyError) else _FAILED
    if isinstance(error, OSError) and _is_folder_gone():
        return FOLDER_GONE, _FAILED
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{_file_of(error)}: {error.strerror}."), _FAILED
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "torch, which runs the models, is not installed; pip install 'neoxconv[logits]'.", _FAILED
    what = one_line(" ".join(f"{type(error).__name__}: {error}".split()))
    return f"unexpected {what}; run again with -v to see where, and report it.", _FAILED


def _file_of(error: OSError) -> str:
    """The file that an error of the operating system is about, or the network."""
    if error.filename is not None:
        return os.fsdecode(error.filename)
    network = isinstance(error, ConnectionError | socket.gaierror) and not isinstance(error, BrokenPipeError)
    return "the network" if network else "standard output"


def _leave_removed_folder() -> bool:
    """Whether the working folder is gone. Then we work in another, as libraries and processes need one that exists."""
    gone = _is_folder_gone()
    if gone:
        os.chdir("/")  # relative paths are refused
    return gone


def _is_folder_gone() -> bool:
    """Whether the folder in which the command was started has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _complain(message: str, code: int) -> int:
    """Print a message to stderr, each line under our name, and return the exit code."""
    for line in message.splitlines():
        say(f"neoxconv: {line}", err=True)
    return code

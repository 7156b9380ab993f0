"""The command line: options, one call into the library for each command, errors as messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something differs, 130 and 143 stopped by Ctrl-C and SIGTERM.
Only click and plain names are imported at the top, so that `neoxconv --help` answers at once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from neoxconv.cli.options import (
    PATH,
    as_json,
    check,
    check_logits_options,
    choice_option,
    configuration,
    jobs,
    location,
    norms,
    of_logits,
    override,
    scheduler,
    size_option,
    verbose,
)
from neoxconv.errors import NeoxconvError, VerifyError
from neoxconv.names import DTYPES, FORMATS, SCALES, TARGET_TYPES, TYPES
from neoxconv.version import __version__
from neoxconv.words import table

if TYPE_CHECKING:
    from neoxconv.storage.remote import Place

FAILED, DIFFERS, INTERRUPTED, TERMINATED = 1, 3, 130, 143  # 2, wrong usage, is click's


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="neoxconv")
@verbose
def commands() -> None:
    """Convert GPT-NeoX checkpoints in bounded memory, and verify the result."""


@commands.command()
@click.argument("source", type=location, metavar="SRC")
@configuration
@click.option("--tensors", is_flag=True, help="List every tensor.")
@check
@jobs
@as_json
@verbose
def inspect(source: Place, **given: Any) -> int:
    """Show what SRC is, its configuration, and what its bytes are for.

    With --check the exit code is 3 where any byte is not as its format's checksums say.
    """
    from neoxconv.cli import inspect
    from neoxconv.cli.source import checked, opened

    checkpoint = opened(source, given)
    found = checked(checkpoint, given, quiet=given["json"])
    facts = inspect.inspect(checkpoint, found)
    click.echo(json.dumps(finite(facts), allow_nan=False) if given["json"] else inspect.render(facts, given["tensors"]))
    return DIFFERS if found and found.damage else 0


@commands.command()
@click.argument("source", type=location, metavar="SRC")
@click.argument("target", type=location, metavar="DST")
@choice_option("--to", "format", choices=FORMATS, required=True, help="The format of DST.")
@choice_option(
    "--type",
    choices=TARGET_TYPES,
    metavar="TYPE",
    help="gguf: F16, Q8_0, Q4_K_M, ...; bnb: NF4, FP4, INT8; float8: E4M3, E5M2. See `neoxconv formats`.",
)
@choice_option("--mix", choices=("current", "classic"), help="gguf: attn_qkv as now, or as until early 2025.")
@click.option("--pure", is_flag=True, default=None, help="gguf: the mix's main type for every matrix.")
@choice_option("--output-type", choices=TYPES, metavar="TYPE", help="gguf: the type of output.weight.")
@choice_option("--embedding-type", choices=TYPES, metavar="TYPE", help="gguf: the type of token_embd.weight.")
@click.option("--tensor-type", type=override, multiple=True, metavar="PATTERN=TYPE",
              help="gguf: the type of names that hold the pattern; repeat for several.")  # fmt: skip
@click.option("--imatrix", type=PATH, metavar="FILE", help="gguf: llama.cpp's importance matrix, .gguf or .dat.")
@choice_option("--effort", choices=("normal", "high"), help="gguf: high searches longer for less error.")
@click.option("--double-quant", is_flag=True, default=None, help="bnb: quantize the scales of NF4 and FP4 too.")
@choice_option("--compute-dtype", choices=DTYPES, help="bnb: what NF4 and FP4 are multiplied in.  [default: SRC's]")
@choice_option("--scale", choices=SCALES, help="float8: scales.  [default: channel; none for E5M2]")
@choice_option("--dtype", choices=DTYPES, help="hf, safetensors, slim: the number type.  [default: the source's]")
@click.option("--only", multiple=True, metavar="PATTERN",
              help="hf, safetensors: only tensors whose names hold the pattern; repeat for several.")  # fmt: skip
@norms
@click.option(
    "--tp", type=click.IntRange(min=1), metavar="N", help="slim: ranks to split into.  [default: as SRC, else 1]"
)
@click.option("--pp", type=click.IntRange(min=0), metavar="M",
              help="slim: pipeline stages; 0 for sequential files.  [default: as SRC, else 1]")  # fmt: skip
@configuration
@click.option("--tokenizer", type=PATH, metavar="FILE", help="tokenizer.json.  [default: the one near SRC]")
@size_option("--shard-size", help="hf, bnb, float8: bytes of a file at most.  [default: 5GB]")
@size_option("--split-size", help="gguf: DST is a folder of files of this size at most.")
@jobs
@size_option("--memory", default="512MiB", show_default=True, help="Memory to keep within.")
@click.option("--executor", type=scheduler, metavar="dask://HOST:PORT", help="A Dask cluster's workers do the work.")
@check
@click.option("--overwrite", is_flag=True, help="Replace DST where it exists.")
@click.option("--allow-nonfinite", is_flag=True, default=None, help="Write infinities and NaN as they are.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan and write nothing.")
@as_json
@click.option("--quiet", is_flag=True, help="Print errors only.")
@verbose
def convert(source: Place, target: Place, **given: Any) -> None:
    """Convert SRC into DST. Interrupted, the same command continues.

    SRC is a gpt-neox checkpoint (its folder, its global_stepN or a file in it), a Hugging Face folder, a .safetensors
    or a .gguf file, here or at a URL (https://, s3://, ...). DST is a folder, or the file itself for safetensors and
    gguf, here or in an object store (s3://, gs://, ...).
    """
    from neoxconv.cli.convert import prepare

    request = prepare(source, target, given)
    if given["dry_run"]:
        if given["json"] or not given["quiet"]:
            click.echo(json.dumps(request.facts) if given["json"] else request.listing)
        return
    quiet = given["quiet"] or given["json"]
    if not quiet:
        click.echo(request.summary, err=True)
    result = request.run(quiet)
    if given["json"]:
        click.echo(json.dumps(result))
    elif not quiet:
        click.echo(request.farewell(result))


@commands.command()
@click.argument("source", type=location, metavar="SRC")
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="The matrix: a GGUF file.")
@click.option("--text", type=PATH, metavar="FILE", help="A text such as the model will meet; 100 kB or more.")
@click.option("--tokens", type=PATH, metavar="FILE", help="Or token ids [batch, time] in a .npy file.")
@click.option(
    "--length", type=click.IntRange(min=2), default=512, metavar="N", show_default=True, help="Tokens in a sequence."
)
@click.option("--sequences", type=click.IntRange(min=1), metavar="N", help="Sequences at most.")
@norms
@configuration
@click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda.")
@click.option("--overwrite", is_flag=True, help="Replace FILE where it exists.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@verbose
def calibrate(source: Place, **given: Any) -> None:
    """Make an importance matrix of SRC from a text, for `convert --imatrix` and for llama.cpp's tools.

    SRC is run layer by layer from disk. The matrix has, for each column of each layer's matrices, the mean square of
    what it is multiplied with.
    """
    if bool(given["text"]) == bool(given["tokens"]):
        raise click.UsageError("give either --text FILE or --tokens FILE.")
    from neoxconv.cli.calibrate import make_matrix

    told = make_matrix(source, given)
    if not given["quiet"]:
        click.echo(told)


@commands.command()
@as_json
@verbose
def formats(**given: Any) -> None:
    """List every target and type: bits per weight, the size of 20B, how far a weight is rounded at most, and how far
    predictions move.

    The last column is the mean KL divergence from the F16 file in nats a token, measured on a small trained model.
    """
    from dataclasses import asdict

    from neoxconv.cli.formats import catalog

    rows = catalog()
    if given["json"]:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    lines = [("format", "option", "bits/weight", "20B in GB", "in GiB", "rounded by at most", "KL")]
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.6f}"
        sizes = f"{row.bits:.2f}", f"{row.nbytes / 1e9:.2f}", f"{row.nbytes / 2**30:.2f}"
        lines.append((row.format, f"{row.option} {row.type}", *sizes, row.bound or "", divergence))
    click.echo(table("<<>>><>", lines))


@commands.command()
@click.argument("paths", type=location, nargs=-1, required=True, metavar="[SRC] TARGET")
@choice_option("--level", choices=("bytes", "weights", "logits"), help="[default: weights, or bytes without SRC]")
@norms
@configuration
@of_logits
@click.option(
    "--sha256sums", is_flag=True, help="Print the SHA-256 of TARGET's files for `sha256sum -c`; check nothing."
)
@jobs
@as_json
@click.option("--quiet", is_flag=True, help="Print the verdict only.")
@verbose
def verify(paths: tuple[Place, ...], **given: Any) -> int:
    """Check TARGET: its bytes, with SRC every weight, and with --level logits what it predicts.

    SRC is then run as it was trained, rank by rank, and TARGET beside it, streamed from disk layer by layer. The last
    line says which levels ran and whether they passed; the exit code is 3 where anything differs.
    """
    if len(paths) > (1 if given["sha256sums"] else 2):
        raise click.UsageError(
            f"expected TARGET{'' if given['sha256sums'] else ' or SRC TARGET'}, found {len(paths)} paths."
        )
    if given["sha256sums"]:
        check_logits_options("bytes", given)
        if given["level"] or given["json"]:
            raise click.UsageError("--sha256sums prints digests and checks nothing; leave --level and --json out.")
        from neoxconv.verify.bytes import sha256sums

        for name, digest in sha256sums(paths[0]):
            click.echo(f"{digest}  {name}")
        return 0
    level = given["level"] or ("weights" if len(paths) == 2 else "bytes")
    if level != "bytes" and len(paths) == 1:
        raise click.UsageError(f"--level {level} needs the source too: neoxconv verify SRC TARGET.")
    check_logits_options(level, given)
    from neoxconv.cli.verify import audit

    outcome = audit(paths, level, given)
    shown = outcome.verdict if given["quiet"] else outcome.listing
    click.echo(json.dumps(finite(outcome.facts), allow_nan=False) if given["json"] else shown)
    return 0 if outcome.passed else DIFFERS


def finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@commands.command()
@click.argument("folder", type=PATH, default=Path("neoxconv-demo"), required=False)
@verbose
def demo(folder: Path) -> int:
    """Make a small checkpoint, convert it to every format, verify each.

    All of it lies in FOLDER (neoxconv-demo by default). Needs no network.
    """
    from neoxconv.cli.demo import run_demo

    return 0 if run_demo(folder, click.echo) else DIFFERS


class Terminated(KeyboardInterrupt):
    """SIGTERM came: stop as for Ctrl-C."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own), print what goes wrong to stderr, and return the exit code."""
    if not hasattr(os, "preadv"):
        return complain("this system cannot read files at an offset (no os.preadv): Windows is not supported.", FAILED)
    signal.signal(signal.SIGTERM, terminate)
    session = {"verbose": False}
    try:
        return commands.main(arguments, "neoxconv", standalone_mode=False, obj=session) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        return stopped(stop)
    except Exception as error:
        if session["verbose"]:
            traceback.print_exc()
        return explain(error)


def stopped(stop: BaseException) -> int:
    """Say how to go on after Ctrl-C or SIGTERM, which click wraps."""
    cause = stop.__cause__ or stop
    return complain(str(cause) or "stopped.", TERMINATED if isinstance(cause, Terminated) else INTERRUPTED)


def explain(error: Exception) -> int:
    """Say what went wrong, and return the exit code for it."""
    if isinstance(error, NeoxconvError):
        return complain(str(error), DIFFERS if isinstance(error, VerifyError) else FAILED)
    if isinstance(error, OSError) and error.strerror:
        return complain(f"{error.filename or 'standard output'}: {error.strerror}.", FAILED)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return complain(f"unexpected {what}; run again with -v to see where, and report it.", FAILED)


def complain(message: str, code: int) -> int:
    """Print a message to stderr, each line under our name, and return the exit code."""
    for line in message.splitlines():
        click.echo(f"neoxconv: {line}", err=True)
    return code

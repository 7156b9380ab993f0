"""Every option of every command with its help text, and how their values are read.

A typo in an option's help is here; a command's own text is in `main`. Plain names only, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from neoxconv.cli.values import (
    COUNT,
    DESTINATION,
    LENGTH,
    LOCATION,
    PATH,
    OneOrMore,
    among,
    byte_count,
    limit,
    override,
    scheduler,
    setting,
)
from neoxconv.names import (
    DTYPES,
    ENGINES,
    FORMATS,
    GROUPS,
    MIXES,
    NORMS,
    PRESETS,
    QKV_LAYOUTS,
    RMSNORMS,
    SCALES,
    STAND_INS,
    TARGET_TYPES,
    TYPES,
    WEIGHTS,
)

Command = TypeVar("Command", bound=Callable[..., Any])


def _size_option(name: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes a number of bytes."""
    return click.option(name, type=byte_count, metavar="SIZE", **settings)


def _choice_option(*names: str, choices: Sequence[str], **settings: Any) -> Callable[[Command], Command]:
    """An option that takes one of `choices`, in any case."""
    shown: dict[str, Any] = {"metavar": "|".join(choices), "shell_complete": among(choices)} | settings
    return click.option(*names, type=click.Choice(choices, case_sensitive=False), **shown)


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` lists them."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Note in what `main` shares with every command whether tracebacks are wanted."""
    if value and context.obj is not None:
        context.obj["verbose"] = True


# --- shared by several commands ---------------------------------------------------------------------------------------

verbose = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember, help="Show the traceback of an error."
)
_as_json = click.option("--json", is_flag=True, help="Print one JSON object for machines.")
quiet = click.option("--quiet", is_flag=True, help="Print errors only.")
source = click.argument("source", type=LOCATION, metavar="SRC")
configuration = _options(
    click.option("--config", type=PATH, multiple=True, metavar="FILE", help="The training YAML; repeat for several."),
    _choice_option("--preset", choices=PRESETS, metavar="NAME", help="A released model, such as 20B or pythia-1b."),
    _choice_option("--weights", choices=WEIGHTS, help="SRC's weights: as stored (default), or the optimizer's fp32."),
    _choice_option(
        "--qkv-layout", choices=QKV_LAYOUTS, help="gpt-neox's rows of grouped queries, if files don't tell."
    ),
    _choice_option(
        "--rmsnorm", choices=RMSNORMS, help="Where gpt-neox's RMSNorm has its epsilon, if files don't tell."
    ),
)
norms = _choice_option("--norms", choices=NORMS, help="Ranks' norms: mean (default), exact fold, or rank 0's.")
jobs = click.option("--jobs", type=COUNT, metavar="N", help="Threads; the processors, 8 at most.")
check = click.option("--check", is_flag=True, help="Read every byte of SRC first, and compare its checksums.")

# --- the commands' own, in the order of `--help` ----------------------------------------------------------------------

of_inspect = _options(
    source,
    configuration,
    click.option("--tensors", is_flag=True, help="List every tensor."),
    click.option(
        "--try", "text", type=PATH, metavar="TEXT", help="Read SRC in each way its files leave open: the loss on TEXT."
    ),
    check,
    jobs,
    _as_json,
    verbose,
)

_of_gguf = _options(
    _choice_option("--mix", choices=("current", "classic"), help="gguf: attn_qkv as now, or as until early 2025."),
    click.option("--pure", is_flag=True, default=None, help="gguf: the mix's main type for every matrix."),
    _choice_option("--output-type", choices=TYPES, metavar="TYPE", help="gguf: the type of output.weight."),
    _choice_option("--embedding-type", choices=TYPES, metavar="TYPE", help="gguf: the type of token_embd.weight."),
    click.option(
        "--tensor-type",
        type=override,
        multiple=True,
        metavar="PATTERN=TYPE",
        help="gguf: the type of names that hold the pattern; repeat for several, the first wins.",
    ),
    click.option("--imatrix", type=PATH, metavar="FILE", help="gguf: llama.cpp's importance matrix, .gguf or .dat."),
    click.option(
        "--bits",
        type=click.FloatRange(min=1, max=32),
        metavar="X",
        help="gguf: types by what they cost, at most X bits a weight in all.",
    ),
    _size_option("--size", help="gguf: the same, for a file of at most this size."),
    _choice_option("--types", choices=TYPES, multiple=True, metavar="TYPE", help="gguf: types that --bits may choose."),
    _choice_option("--effort", choices=("normal", "high"), help="gguf: high searches longer for less error."),
    click.option(
        "--allow-other-tokens",
        is_flag=True,
        default=None,
        help="gguf: the nearest tokenizer where llama.cpp has not SRC's; ids may differ.",
    ),
)
_as_family = _choice_option(
    "--as", "as_family", choices=STAND_INS, metavar="NAME",
    help="gguf, slim: write SRC as another family where the format lacks its own (docs/formats.md).",
)  # fmt: skip
_of_words = _options(
    click.option("--metadata", type=PATH, metavar="FILE", help="What card and GGUF keys say of the model: JSON."),
    click.option(
        "--set",
        type=setting,
        multiple=True,
        metavar="KEY=VALUE",
        help="The same, key by key: general.author=NAME; an empty value takes a key away.",
    ),
    click.option("--card", is_flag=True, default=None, help="gguf, safetensors: write README.md beside the file too."),
)
of_convert = _options(
    source,
    click.argument("target", type=DESTINATION, metavar="DST"),
    _choice_option("--to", "format", choices=FORMATS, help="The format of DST."),
    click.option(
        "--type",
        type=OneOrMore(TARGET_TYPES, case_sensitive=False),
        shell_complete=among(TARGET_TYPES),
        metavar="TYPE[,TYPE...]",
        help="gguf: F16, Q8_0, Q4_K_M, ...; bnb: NF4, FP4, INT8; float8: E4M3, E5M2; compressed-tensors: W4A16, W8A16, "
        "FP8_DYNAMIC; mlx: 4bit, mxfp4, ...; ctranslate2: INT8, FLOAT16, ... See `neoxconv formats`. Of several types "
        "each is a target in the folder DST, and SRC is read once.",
    ),
    click.option("--recipe", type=PATH, metavar="FILE", help="Several targets in the folder DST, as a YAML file says."),
    _of_gguf,
    click.option(
        "--calibration",
        type=PATH,
        metavar="FILE",
        help="gguf, bnb, float8, compressed-tensors, mlx: choose codes together; made by calibrate --covariance.",
    ),
    _as_family,
    click.option("--double-quant", is_flag=True, default=None, help="bnb: quantize the scales of NF4 and FP4 too."),
    _choice_option(
        "--compute-dtype", choices=DTYPES, help="bnb: what NF4 and FP4 are multiplied in.  [default: SRC's]"
    ),
    _choice_option("--scale", choices=SCALES, help="float8: scales.  [default: channel; none for E5M2]"),
    _choice_option(
        "--group",
        choices=GROUPS,
        help="compressed-tensors, mlx: columns of one scale.  [default: 128 if it fits; mlx: 64]",
    ),
    click.option(
        "--asymmetric", is_flag=True, default=None, help="compressed-tensors: a zero for each group of W4A16 and W8A16."
    ),
    _choice_option("--dtype", choices=DTYPES, help="hf, safetensors, slim: the number type.  [default: the source's]"),
    click.option(
        "--only",
        multiple=True,
        metavar="PATTERN",
        help="hf, safetensors: only tensors whose names hold the pattern; repeat for several.",
    ),
    norms,
    click.option("--tp", type=COUNT, metavar="N", help="slim: ranks to split into.  [default: as SRC, else 1]"),
    click.option(
        "--pp",
        type=click.IntRange(min=0),
        metavar="M",
        help="slim: pipeline stages; 0 for sequential files.  [default: as SRC, else 1]",
    ),
    click.option(
        "--current-names", is_flag=True, default=None, help="slim: made anew, as gpt-neox names tensors since 2024-09."
    ),
    configuration,
    click.option(
        "--tokenizer", type=PATH, metavar="FILE", help="A tokenizer, or its folder.  [default: the one near SRC]"
    ),
    _size_option(
        "--shard-size", help="hf, bnb, float8, compressed-tensors, mlx: bytes of a file at most.  [default: 5GB]"
    ),
    _size_option("--split-size", help="gguf: DST is a folder of files of this size at most."),
    _of_words,
    jobs,
    _size_option("--memory", default="512MiB", show_default=True, help="Memory to keep within."),
    click.option(
        "--executor", type=scheduler, metavar="dask://HOST:PORT", help="A Dask cluster's workers do the work."
    ),
    check,
    click.option("--overwrite", is_flag=True, help="Replace DST where it exists."),
    click.option("--private", is_flag=True, help="hf://: make DST's repository a private one."),
    click.option("--allow-nonfinite", is_flag=True, default=None, help="Write infinities and NaN as they are."),
    click.option("--verify", is_flag=True, help="Decode what is encoded in the same pass, and compare it with SRC."),
    click.option("--dry-run", is_flag=True, help="Print the whole plan and write nothing."),
    _as_json,
    quiet,
    verbose,
)

of_card = _options(click.argument("folder", type=PATH, metavar="FOLDER"), verbose)

of_calibrate = _options(
    source,
    click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="The matrix: a GGUF file."),
    click.option(
        "--text",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="A text such as the model will meet; repeat to mix.  [default: a built-in one]",
    ),
    click.option(
        "--covariance", is_flag=True, help="Also what `convert --calibration` needs; FILE grows by columns squared."
    ),
    click.option(
        "--gradients",
        is_flag=True,
        help="Also what `convert --bits` chooses best by: how much predictions depend on each matrix.",
    ),
    _choice_option(
        "--through",
        choices=MIXES,
        metavar="TYPE",
        help="Quantize layer after layer, as `convert --type TYPE`, so that later ones make up for earlier ones.",
    ),
    click.option(
        "--outputs",
        is_flag=True,
        help="Also gradients at outputs: codes of rows are chosen together too. FILE grows by rows squared.",
    ),
    click.option("--tokens", type=PATH, metavar="FILE", help="Or token ids [batch, time] in a .npy file."),
    click.option("--length", type=LENGTH, default=512, metavar="N", show_default=True, help="Tokens in a sequence."),
    click.option("--sequences", type=COUNT, metavar="N", help="Sequences at most."),
    _as_family,
    norms,
    configuration,
    click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda."),
    click.option("--overwrite", is_flag=True, help="Replace FILE where it exists."),
    quiet,
    verbose,
)

of_formats = _options(_as_json, verbose)

_of_logits = _options(
    click.option(
        "--text",
        type=PATH,
        metavar="FILE",
        help="A text whose token ids are compared; logits: whose predictions are.  [default: a built-in one]",
    ),
    click.option("--tokens", type=PATH, metavar="FILE", help="logits: token ids [batch, time] in a .npy file."),
    click.option("--length", type=LENGTH, metavar="N", help="logits: tokens in a sequence.  [default: 256]"),
    click.option("--sequences", type=COUNT, metavar="N", help="logits: sequences, and questions, at most."),
    _choice_option(
        "--task", choices=("lambada", "piqa", "hellaswag", "mmlu"), help="logits: also answer questions, both sides."
    ),
    click.option(
        "--data", type=PATH, metavar="FILE", help="logits: the task's questions, .jsonl with the task's fields."
    ),
    click.option("--shots", type=COUNT, metavar="N", help="logits: examples with answers before each question."),
    click.option("--shots-data", type=PATH, metavar="FILE", help="logits: what they are taken from, like --data."),
    _choice_option(
        "--engine",
        choices=ENGINES,
        default="native",
        show_default=True,
        metavar="NAME",
        help=f"logits, and --text: what runs TARGET: {', '.join(ENGINES[:-1])} or {ENGINES[-1]}.",
    ),
    click.option(
        "--engine-python", type=PATH, metavar="FILE", help="The Python that has the engine.  [default: neoxconv's]"
    ),
    click.option("--device", metavar="NAME", help="logits: cpu or cuda, for native.  [default: cpu]"),
    click.option("--max-kl", type=limit, metavar="X", help="logits: mean KL divergence.  [default: by TARGET's type]"),
    click.option("--max-kl-p99", type=limit, metavar="X", help="logits: its 99th percentile."),
    click.option("--min-top1", type=limit, metavar="X", help="logits: share of equal first choices."),
    click.option("--max-ppl-ratio", type=limit, metavar="X", help="logits: TARGET's perplexity over SRC's."),
    click.option("--bisect", is_flag=True, help="logits: find the tensor that breaks the first broken layer."),
    click.option("--html", type=PATH, metavar="FILE", help="logits: write a report as one page."),
)
of_verify = _options(
    click.argument("paths", type=LOCATION, nargs=-1, required=True, metavar="[SRC] TARGET..."),
    _choice_option(
        "--level",
        choices=("bytes", "tokenizer", "weights", "logits"),
        help="weights and logits have those before them.  [default: weights, or bytes without SRC]",
    ),
    norms,
    configuration,
    click.option("--calibration", type=PATH, metavar="FILE", help="weights: the one that `convert` was given."),
    _of_logits,
    click.option(
        "--sha256sums", is_flag=True, help="Print the SHA-256 of TARGET's files for `sha256sum -c`; check nothing."
    ),
    jobs,
    _as_json,
    click.option("--quiet", is_flag=True, help="Print the verdict only."),
    verbose,
)

of_demo = _options(
    click.argument("folder", type=PATH, default=Path("neoxconv-demo"), required=False),
    verbose,
)

"""The options of `convert`."""

from __future__ import annotations

import click

from neoxconv.cli.options.shared import (
    as_family,
    as_json,
    check,
    choice_option,
    configuration,
    jobs,
    norms,
    options,
    quiet,
    size_option,
    source,
    verbose,
)
from neoxconv.cli.values import COUNT, DESTINATION, PATH, OneOrMore, among, override, scheduler, setting
from neoxconv.names import DTYPES, FORMATS, GROUPS, SCALES, TARGET_TYPES, TYPES

_of_gguf = options(
    choice_option("--mix", choices=("current", "classic"), help="gguf: attn_qkv as now, or as until early 2025."),
    click.option("--pure", is_flag=True, default=None, help="gguf: the mix's main type for every matrix."),
    choice_option("--output-type", choices=TYPES, metavar="TYPE", help="gguf: the type of output.weight."),
    choice_option("--embedding-type", choices=TYPES, metavar="TYPE", help="gguf: the type of token_embd.weight."),
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
    size_option("--size", help="gguf: the same, for a file of at most this size."),
    choice_option("--types", choices=TYPES, multiple=True, metavar="TYPE", help="gguf: types that --bits may choose."),
    choice_option("--effort", choices=("normal", "high"), help="gguf: high searches longer for less error."),
    click.option(
        "--allow-other-tokens",
        is_flag=True,
        default=None,
        help="gguf: the nearest tokenizer where llama.cpp has not SRC's; ids may differ.",
    ),
)
_of_words = options(
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
of_convert = options(
    source,
    click.argument("target", type=DESTINATION, metavar="DST"),
    choice_option("--to", "format", choices=FORMATS, help="The format of DST."),
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
    as_family,
    click.option("--double-quant", is_flag=True, default=None, help="bnb: quantize the scales of NF4 and FP4 too."),
    choice_option("--compute-dtype", choices=DTYPES, help="bnb: what NF4 and FP4 are multiplied in.  [default: SRC's]"),
    choice_option("--scale", choices=SCALES, help="float8: scales.  [default: channel; none for E5M2]"),
    choice_option(
        "--group",
        choices=GROUPS,
        help="compressed-tensors, mlx: columns of one scale.  [default: 128 if it fits; mlx: 64]",
    ),
    click.option(
        "--asymmetric", is_flag=True, default=None, help="compressed-tensors: a zero for each group of W4A16 and W8A16."
    ),
    choice_option("--dtype", choices=DTYPES, help="hf, safetensors, slim: the number type.  [default: the source's]"),
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
    size_option(
        "--shard-size", help="hf, bnb, float8, compressed-tensors, mlx: bytes of a file at most.  [default: 5GB]"
    ),
    size_option("--split-size", help="gguf: DST is a folder of files of this size at most."),
    _of_words,
    jobs,
    size_option("--memory", default="512MiB", show_default=True, help="Memory to keep within."),
    click.option(
        "--executor", type=scheduler, metavar="dask://HOST:PORT", help="A Dask cluster's workers do the work."
    ),
    check,
    click.option("--overwrite", is_flag=True, help="Replace DST where it exists."),
    click.option("--private", is_flag=True, help="hf://: make DST's repository a private one."),
    click.option("--allow-nonfinite", is_flag=True, default=None, help="Write infinities and NaN as they are."),
    click.option("--verify", is_flag=True, help="Decode what is encoded in the same pass, and compare it with SRC."),
    click.option("--dry-run", is_flag=True, help="Print the whole plan and write nothing."),
    as_json,
    quiet,
    verbose,
)

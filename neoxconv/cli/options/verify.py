"""The options of `verify`."""

from __future__ import annotations

import click

from neoxconv.cli.options.shared import as_json, choice_option, configuration, jobs, norms, options, verbose
from neoxconv.cli.values import COUNT, LENGTH, LOCATION, PATH, limit
from neoxconv.names import ENGINES

_of_logits = options(
    click.option(
        "--text",
        type=PATH,
        metavar="FILE",
        help="A text whose token ids are compared; logits: whose predictions are.  [default: a built-in one]",
    ),
    click.option("--tokens", type=PATH, metavar="FILE", help="logits: token ids [batch, time] in a .npy file."),
    click.option("--length", type=LENGTH, metavar="N", help="logits: tokens in a sequence.  [default: 256]"),
    click.option("--sequences", type=COUNT, metavar="N", help="logits: sequences, and questions, at most."),
    choice_option(
        "--task", choices=("lambada", "piqa", "hellaswag", "mmlu"), help="logits: also answer questions, both sides."
    ),
    click.option(
        "--data", type=PATH, metavar="FILE", help="logits: the task's questions, .jsonl with the task's fields."
    ),
    click.option("--shots", type=COUNT, metavar="N", help="logits: examples with answers before each question."),
    click.option("--shots-data", type=PATH, metavar="FILE", help="logits: what they are taken from, like --data."),
    choice_option(
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
of_verify = options(
    click.argument("paths", type=LOCATION, nargs=-1, required=True, metavar="[SRC] TARGET..."),
    choice_option(
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
    as_json,
    click.option("--quiet", is_flag=True, help="Print the verdict only."),
    verbose,
)

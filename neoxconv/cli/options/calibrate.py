"""The options of `calibrate`."""

from __future__ import annotations

import click

from neoxconv.cli.options.shared import as_family, choice_option, configuration, norms, options, quiet, source, verbose
from neoxconv.cli.values import COUNT, LENGTH, PATH
from neoxconv.names import MIXES

of_calibrate = options(
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
    choice_option(
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
    as_family,
    norms,
    configuration,
    click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu or cuda."),
    click.option("--overwrite", is_flag=True, help="Replace FILE where it exists."),
    quiet,
    verbose,
)

"""The options of `inspect`, `card`, `formats` and `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from neoxconv.cli.options.shared import as_json, check, configuration, jobs, options, source, verbose
from neoxconv.cli.values import PATH

of_inspect = options(
    source,
    configuration,
    click.option("--tensors", is_flag=True, help="List every tensor."),
    click.option(
        "--try", "text", type=PATH, metavar="TEXT", help="Read SRC in each way its files leave open: the loss on TEXT."
    ),
    check,
    jobs,
    as_json,
    verbose,
)

of_card = options(click.argument("folder", type=PATH, metavar="FOLDER"), verbose)

of_formats = options(as_json, verbose)

of_demo = options(
    click.argument("folder", type=PATH, default=Path("neoxconv-demo"), required=False),
    verbose,
)

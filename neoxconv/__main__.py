"""`python -m neoxconv` is the command `neoxconv`."""

from __future__ import annotations

import os
import sys


def run() -> int:
    """The command's exit code; Ctrl-C may come while it is still being imported, or twice."""
    _fill_streams()
    try:
        from neoxconv.cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("neoxconv: stopped.\n")
        return 130


def _fill_streams() -> None:
    """Give a standard stream that was closed to nothing, else a target's file would get its number.

    What a library then prints would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


if __name__ == "__main__":
    raise SystemExit(run())

"""`python -m neoxconv` is the command `neoxconv`."""

from __future__ import annotations

import sys


def run() -> int:
    """The command's exit code; Ctrl-C may come while it is still being imported, or twice."""
    try:
        from neoxconv.cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("neoxconv: stopped.\n")
        return 130


if __name__ == "__main__":
    raise SystemExit(run())

"""`python -m neoxconv` is the command `neoxconv`."""

from neoxconv.cli import main

raise SystemExit(main())

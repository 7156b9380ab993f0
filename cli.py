from neoxconv.__main__ import run

raise SystemExit(run())

"""Settings that hold for every test; the line at the end that says which were not run, and how to run them."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a processor of its own
    os.environ["OMP_NUM_THREADS"] = "1"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us with & has it ignored

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SLOW = pytest.StashKey[int]()
#            in the reason of a skip               what to do
REMEDIES = (
    (r"NEOXCONV_FIXTURES",                         "need the whole fixtures (NEOXCONV_FIXTURES=FOLDER make test)"),
    (r"make oracles|llama.cpp",                    "need `make oracles`"),
    (r"",                                          "cannot run here (make test PYTEST_ARGS=-rs says why)"),
)  # fmt: skip


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        stash = items[0].config.stash
        stash[SLOW] = stash.get(SLOW, 0) + sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (told := getattr(session.config, "workeroutput", None)) is not None:  # a worker of xdist tells its controller
        told["slow"] = session.config.stash.get(SLOW, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker of xdist collects the same tests."""
    node.config.stash[SLOW] = max(node.config.stash.get(SLOW, 0), getattr(node, "workeroutput", {}).get("slow", 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    if line := not_run(reasons, config.stash.get(SLOW, 0)):
        terminalreporter.write_line(line)


def not_run(reasons: list[str], slow: int) -> str:
    """The line that says how many tests were not run and which command would run them; nothing where all were run."""
    counts = Counter(next(remedy for pattern, remedy in REMEDIES if re.search(pattern, why)) for why in reasons)
    told = [f"{count} {remedy}" for _, remedy in REMEDIES if (count := counts[remedy])]
    if slow:
        told.append(f"{slow} are slow (make test PYTEST_ARGS='-m slow')")
    return f"{len(reasons) + slow} tests were not run: {', '.join(told)}" if told else ""
